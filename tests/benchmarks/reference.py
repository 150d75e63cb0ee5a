"""The project's own results: train what model_cards/results/experiments.yaml compares, and write the tables.

Every run is one command of a training script. Of what it leaves, its facts (run.json) go into the repository, with its
card where one is wanted, and so does the page of the grid of recipe cifar10_scaling. What is there is not trained
again. The tables, a page beside the facts and a part of README.md, hold nothing but what the facts say.

Examples:
    python tests/benchmarks/reference.py --experiments distillation imbalance
    python tests/benchmarks/reference.py --dataset path/to/cifar10
    python tests/benchmarks/reference.py --report
"""

import argparse
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from transformers import set_seed

from model_cards.facts import RUN, TrainingRun, list_origins, read_run
from model_cards.pages import tabulate
from model_cards.rendering import CARD, break_lines, escape_markdown, fence, find_parts, format_duration
from model_cards.scaling import FACTS, FILES, REPORT, group, list_verdicts
from modeling_vit_custom.command_line import report_user_errors
from trainers.arguments import ModelArguments
from trainers.hub import RECIPE, render_recipe
from trainers.models import make_model


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "model_cards" / "results"
README, PART = ROOT / "README.md", "results"
DATASET = "uoft-cs/cifar10"
COPY = "../../tests/benchmarks/README.md#reference-the-projects-own-results"  # what the page means by it
SCALING = "scaling"
ABOUT_GRID = (
    "The ResNet sees images enlarged to 64 pixels, the ViT as they are. An earlier grid, by AdamW and of larger "
    "widths, was judged on the same test images and could tell nothing, since its ViTs had learnt next to nothing: "
    "optimizer, widths and the least number of steps were changed after it, the last by a trial on images held out of "
    "training."
)
RESET = "reset_positions"
NUM_CLASSES = 3  # of the rarest and of the most frequent ones
MEASURES = {
    "accuracy": "accuracy",
    "rare_recall": f"recall of the {NUM_CLASSES} rarest classes",
    "frequent_recall": f"recall of the {NUM_CLASSES} most frequent classes",
}
# A card, and what it shows or speaks of.
CARD_FILES = (CARD, "*.png", "examples/*", RECIPE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """Runs that are compared.

    Attributes:
        name: Of its folder.
        title: What is compared, in a line.
        text: How, in a few sentences.
        measures: Keys of `MEASURES`; differences are of the first.
        seeds: Of each run.
        options: Words of the command line that all runs have.
        runs: Commands by the runs' names: the script and words of their own, where {NAME} is another run's folder.
        compared: Runs that the table shows; differences are to the first.
        cards: Runs whose card is kept, of the first seed.
    """

    name: str
    title: str
    text: str
    measures: Sequence[str]
    seeds: Sequence[int]
    options: str
    runs: Mapping[str, str]
    compared: Sequence[str]
    cards: Sequence[str]

    @property
    def trained(self) -> list[str]:
        """The runs that leave facts."""
        return [name for name in self.runs if not self.runs[name].startswith(RESET)]

    def argv(self, run: str, folders: Mapping[str, str | Path]) -> list[str]:
        """The script of a run and its options, less those of data set, seed and output folder.

        Args:
            run: One of `runs`.
            folders: Of all runs.
        """
        return [word.format_map(folders) for word in shlex.split(f"{self.runs[run]} {self.options}")]

    def sources(self, run: str) -> list[str]:
        """The runs that a run starts from or learns from."""
        return [name for _, name, _, _ in string.Formatter().parse(self.runs[run]) if name]

    def folder(self, run: str, seed: int) -> Path:
        """Where the facts of a run are kept."""
        return RESULTS / self.name / slug(run) / f"seed_{seed}"

    def find(self, run: str, seed: int, folder: Path | None = None) -> TrainingRun | None:
        """The facts of a run that is done, those that are kept or those in another folder.

        Raises:
            ValueError: if another command left them.
        """
        folder = self.folder(run, seed) if folder is None else folder
        if not (folder / RUN).is_file():
            return None
        facts = read_run(folder)
        script, *options = self.argv(run, {name: f"{slug(name)}_{seed}" for name in self.runs})
        wanted = ["python", "-m", f"trainers.{script}", *options]
        if facts.seed != seed or shlex.split(facts.command)[: len(wanted)] != wanted:
            raise ValueError(
                f"{str(folder / RUN)!r} is of another command than {run!r} of {self.name} with seed {seed}: remove its "
                "folder to train it again"
            )
        return facts

    def read(self) -> dict[str, list[TrainingRun]]:
        """The facts of all runs, seed by seed; empty as long as one is missing."""
        found = {name: [self.find(name, seed) for seed in self.seeds] for name in self.trained}
        return {} if any(facts is None for runs in found.values() for facts in runs) else found


Facts = Mapping[str, Sequence[TrainingRun]]


def main(argv: list[str] | None = None) -> None:
    experiments = read_experiments()
    arguments = parse_arguments(argv)
    with report_user_errors("reference.py"):
        for name in () if arguments.report else arguments.experiments:
            if name == SCALING:
                train_grid(arguments)
            else:
                train(experiments[name], arguments)
        pages = render(experiments.values())
    for file, text in pages.items():
        file.write_text(text, encoding="utf-8")
        print(file)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    names = [*read_experiments(), SCALING]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--experiments", nargs="+", choices=names, default=names, metavar="EXPERIMENT",
        help=f"of {', '.join(names)} (default: all)")  # fmt: skip
    add("--dataset", default=DATASET, help=f"CIFAR-10's train and test on the Hub or in a folder (default: {DATASET})")
    add("--dataset_title", help="what to call it in a folder")
    add("--folder", type=Path, default=Path("runs/reference"), help="where the models go (default: runs/reference)")
    add("--report", action="store_true", help="train nothing: write the tables alone")
    return parser.parse_args(argv)


def read_experiments() -> dict[str, Experiment]:
    known = yaml.safe_load((RESULTS / "experiments.yaml").read_text(encoding="utf-8"))
    return {name: Experiment(name=name, **fields) for name, fields in known.items()}


def slug(name: str) -> str:
    """A run's name as that of a folder."""
    return re.sub(r"\W+", "_", name)


# ------------------------------------------------------------------------------------------------------------ training


def train(experiment: Experiment, arguments: argparse.Namespace) -> None:
    """All runs of an experiment that are not done, seed by seed."""
    for seed in experiment.seeds:
        for name in experiment.trained:
            if experiment.find(name, seed) is None:
                patterns, note = [RUN], None
                if name in experiment.cards and seed == experiment.seeds[0]:
                    patterns, note = [RUN, *CARD_FILES], describe_card(experiment)
                keep(make(experiment, name, seed, arguments), experiment.folder(name, seed), patterns, note)


def make(experiment: Experiment, name: str, seed: int, arguments: argparse.Namespace) -> Path:
    """The folder of a run, trained with what it needs unless it is there."""
    folders = {each: arguments.folder / experiment.name / f"{slug(each)}_{seed}" for each in experiment.runs}
    script, *options = experiment.argv(name, folders)
    if (folders[name] / "config.json").is_file() if script == RESET else experiment.find(name, seed, folders[name]):
        return folders[name]
    for source in experiment.sources(name):
        make(experiment, source, seed, arguments)
    print(f"\n{experiment.name}, {name}, seed {seed}", flush=True)
    if script == RESET:
        reset_positions(Path(option(options, "--model")), int(option(options, "--image_size")), seed, folders[name])
    else:
        # A seed decides on the images as well, where a share of them is taken.
        drawn = ["--seed", str(seed), "--split_seed", str(seed)]
        run(script, [*options, *name_data(arguments), *drawn], folders[name])
    return folders[name]


def train_grid(arguments: argparse.Namespace) -> None:
    if (RESULTS / SCALING).exists():
        return
    folder, left = arguments.folder / SCALING, None
    while left != 0:
        run("scaling", ["--recipe", "cifar10_scaling", *name_data(arguments)], folder)
        before, left = left, json.loads((folder / FACTS).read_text(encoding="utf-8"))["unfinished"]
        if left == before:
            raise SystemExit(f"{left} runs of the grid do not fit into its time: see {folder}")
    keep(folder, RESULTS / SCALING, FILES)


def name_data(arguments: argparse.Namespace) -> list[str]:
    title = [] if arguments.dataset_title is None else ["--dataset_title", arguments.dataset_title]
    return ["--dataset", arguments.dataset, *title]


def run(script: str, options: Sequence[str], folder: Path) -> None:
    """Raises SystemExit if a training script fails, which has said why."""
    argv = [sys.executable, "-m", f"trainers.{script}", *options, "--output_dir", str(folder), "--report_to", "none"]
    status = subprocess.run(argv).returncode
    if status:
        raise SystemExit(status)


def option(options: Sequence[str], name: str) -> str:
    return options[options.index(name) + 1]


def reset_positions(source: str | Path, image_size: int, seed: int, folder: str | Path) -> None:
    """A copy of a classifier at another image size with new random positions."""
    set_seed(seed)
    model, processor = make_model(ModelArguments(str(source), image_size=image_size))
    new = type(model)(model.config)
    new.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "position" not in name}, strict=False
    )
    new.save_pretrained(folder)
    processor.save_pretrained(folder)


def keep(source: Path, folder: Path, patterns: Sequence[str], note: str | None = None) -> None:
    """Copies files of a run into a new folder, with a note in its card, all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as made:
        copies = Path(made, folder.name)
        for file in (file for pattern in patterns for file in source.glob(pattern)):
            copy = copies / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.name == RECIPE:
                copy.write_text(render_recipe(file), encoding="utf-8")
            else:
                shutil.copy(file, copy)
        if note is not None:
            annotate(copies / CARD, note)
        os.rename(copies, folder)


def describe_card(experiment: Experiment) -> str:
    """What a run with a card was for, and where its weights are."""
    return (
        f"A run of seed {experiment.seeds[0]} in the comparison "
        f"[{experiment.title}]({'../' * 3}README.md#{experiment.name}). Its weights are not kept here: the commands "
        "there make them again, each after those whose folders it names, and what is said of use holds in the folder "
        "that they leave. In the command below data sets and models without a slash, but for presets, are local "
        "folders."
    )


def annotate(card: Path, note: str) -> None:
    """Puts a note above the generated parts of a card, where it stays.

    Raises:
        ValueError: if the card has no such place.
    """
    title, begin = f"# {escape_markdown(read_run(card.parent).name)}\n\n", "<!-- begin summary:"
    before, place, after = card.read_text(encoding="utf-8").partition(title + begin)
    if not place:
        raise ValueError(f"{card} has no title right before its summary")
    card.write_text(f"{before}{title}{note}\n\n{begin}{after}", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- tables


def render(experiments: Iterable[Experiment]) -> dict[Path, str]:
    """The page and README.md with its table, by their files.

    Raises:
        ValueError: if README.md has no place for it.
    """
    found = {experiment: experiment.read() for experiment in experiments}
    found = {experiment: runs for experiment, runs in found.items() if runs}
    grid = RESULTS / SCALING / FACTS
    grid = json.loads(grid.read_text(encoding="utf-8")) if grid.is_file() else None
    readme = README.read_text(encoding="utf-8")
    old = find_parts(readme).get(PART)
    if old is None:
        raise ValueError(
            f"{README.name} has no part {PART!r}: put <!-- begin {PART}: --> and <!-- end {PART} --> there"
        )
    begin, *_, end = old.splitlines()
    new = f"{begin}\n{render_summary(found, grid)}\n{end}"
    return {RESULTS / "README.md": render_page(found, grid), README: readme.replace(old, new)}


def render_summary(found: Mapping[Experiment, Facts], grid: Mapping | None) -> str:
    """A row for each experiment."""
    if not found and grid is None:
        return "None of them has been run yet."
    rows = []
    for experiment, runs in found.items():
        figures = []
        for each in experiment.measures:
            of_runs = [f"{name} {format_percent(measure(runs[name], each))}" for name in experiment.compared]
            figures.append(f"{MEASURES[each]}: {', '.join(of_runs)}")
        link = f"[{experiment.title}](model_cards/results/README.md#{experiment.name})"
        rows.append((link, "; ".join(figures), count(experiment.seeds)))
    if grid is not None:
        seeds = {result["seed"] for result in grid["results"]}
        title = f"{len(grid['results'])} runs of a grid of models, widths, shares of the images and seeds"
        link = f"[{title}](model_cards/results/{SCALING}/{REPORT})"
        rows.append((link, " ".join(list_verdicts(grid)), count(seeds)))
    return tabulate(("", "mean ± standard deviation", "seeds"), rows)


def render_page(found: Mapping[Experiment, Facts], grid: Mapping | None) -> str:
    parts = [
        "# Results on CIFAR-10",
        "Of short runs: they compare, and set no records. All are judged on the 10,000 test images, once, at the end, "
        "and no setting was chosen by a figure of this page; where one was a reason to try again, it is said. Means "
        "and sample standard deviations are over seeds, which also draw the images where only a share of them is "
        "taken; differences are taken seed by seed. Of two seeds a deviation says next to nothing. That the test "
        "images are a sample, too, is not in it: it is worth about a point (95 %) of an accuracy, up to two of the "
        "recall of three classes, less of a difference.",
        "GFLOPs are those of a prediction. Training is three times that an image, or less where images grow "
        "(`--initial_image_size`), and a teacher adds a prediction of its own. Images and time are those of training, "
        "with those of the runs that one starts from or learns from. Time is that of the hardware named below each "
        "table, where other things may have run as well: it tells what to expect, not which is faster.",
        "Written by `python tests/benchmarks/reference.py --report` from the facts of the runs, each a `run.json` "
        f"beside this page. Without `--report` it trains what is missing there. In the commands N is a seed; they name "
        f"{DATASET} on the Hub, on which figures may differ from those of [a copy stored as JPEG]({COPY}).",
    ]
    for experiment, runs in found.items():
        origin = [f"{name}: {fact}" for name, fact in {"Data": describe_data(runs), **list_origins(flat(runs))}.items()]
        parts += [
            f'<a id="{experiment.name}"></a>\n\n## {experiment.title}',
            experiment.text,
            tabulate_runs(experiment, runs),
            *list_cards(experiment),
            "<details><summary>Commands</summary>",
            *(f"{name}:\n\n{fence(command(experiment, name), 'bash')}" for name in experiment.runs),
            "</details>",
            escape_markdown("; ".join(origin) + "."),
        ]
    if grid is not None:
        parts += ["## A grid of models and shares of the images", f"[Its report]({SCALING}/{REPORT}). {ABOUT_GRID}"]
    return "\n\n".join(parts) + "\n"


def describe_data(runs: Facts) -> str:
    return "; ".join(dict.fromkeys(run.dataset_title or run.dataset or run.dataset_folder for run in flat(runs)))


def flat(runs: Facts) -> list[TrainingRun]:
    return [run for seeds in runs.values() for run in seeds]


def list_cards(experiment: Experiment) -> list[str]:
    places = {name: experiment.folder(name, experiment.seeds[0]).relative_to(RESULTS) for name in experiment.cards}
    links = [f"[{name}]({place.as_posix()}/{CARD})" for name, place in places.items()]
    return [f"Cards of seed {experiment.seeds[0]}: {', '.join(links)}."] if links else []


def command(experiment: Experiment, run: str) -> str:
    folders = {name: f"runs/{slug(name)}_N" for name in experiment.runs}
    script, *options = experiment.argv(run, folders)
    if script == RESET:
        source, size = option(options, "--model"), option(options, "--image_size")
        call = f'reset_positions("{source}", {size}, N, "{folders[run]}")'
        return f"PYTHONPATH=tests python -c 'from benchmarks.reference import {RESET}; {call}'"
    own = ["--dataset", DATASET, "--output_dir", folders[run]]
    return break_lines(f"python -m trainers.{script} {shlex.join([*options, *own])} --seed N --split_seed N")


def tabulate_runs(experiment: Experiment, runs: Facts) -> str:
    reference, *_ = experiment.compared
    first, *_ = experiment.measures
    has_many = len({run.hardware for run in flat(runs)}) > 1
    rows = []
    for name in experiment.compared:
        values, run = measure(runs[name], first), runs[name][0]
        images, seconds = add_sources(experiment, name, runs)
        rows.append(
            (
                name,
                *(format_percent(measure(runs[name], each)) for each in experiment.measures),
                ", ".join(f"{100 * value:.2f}" for value in values) + " %",
                "-" if name == reference else format_points(values - measure(runs[reference], first)),
                f"{run.num_parameters / 1e6:.2f}",
                f"{run.flops / 1e9:.3f}",
                f"{images.mean():,.0f}",
                format_times(seconds, [run.hardware for run in runs[name]] if has_many else ()),
            )
        )
    title = MEASURES[first]
    titles = ("", *(MEASURES[each] for each in experiment.measures), f"{title}, seeds {count(experiment.seeds)}")
    titles = (*titles, f"{title} against {reference}", "M parameters", "GFLOPs", "images seen", "time of training")
    return tabulate(titles, rows)


def add_sources(experiment: Experiment, name: str, runs: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Images and seconds of a run with those of its sources, seed by seed."""
    own = runs.get(name, ())
    images = np.array([run.sights for run in own] or [0.0])
    seconds = np.array([run.wall_time for run in own] or [0.0])
    for source in experiment.sources(name):
        more = add_sources(experiment, source, runs)
        images, seconds = images + more[0], seconds + more[1]
    return images, seconds


def format_times(seconds: np.ndarray, hardware: Sequence[str] = ()) -> str:
    """The mean, or one for each hardware."""
    if not hardware:
        return format_duration(seconds.mean())
    groups = group(zip(hardware, seconds), lambda run: run[0])
    means = {name: np.mean([each for _, each in runs]) for name, runs in groups.items()}
    return ", ".join(f"{format_duration(mean)} on {name}" for name, mean in means.items())


def measure(runs: Sequence[TrainingRun], what: str) -> np.ndarray:
    """One of `MEASURES` of each run."""
    if what == "accuracy":
        return np.array([run.results["accuracy"] for run in runs])
    # Classes become rarer in their order.
    chosen = slice(-NUM_CLASSES, None) if what == "rare_recall" else slice(NUM_CLASSES)
    recalls = [run.confusion_matrix.diagonal() / run.confusion_matrix.sum(axis=1) for run in runs]
    return np.array([recall[chosen].mean() for recall in recalls])


def format_percent(shares: np.ndarray) -> str:
    """Mean and standard deviation, or the only value."""
    return f"{100 * shares.mean():.1f}{_format_deviation(shares)} %"


def format_points(differences: np.ndarray) -> str:
    return f"{100 * differences.mean():+.1f}{_format_deviation(differences)} points"


def _format_deviation(shares: np.ndarray) -> str:
    return f" ± {100 * shares.std(ddof=1):.1f}" if len(shares) > 1 else ""


def count(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


if __name__ == "__main__":
    main()
