"""What loading and augmenting images cost in a training run as users start it.

Runs of `python -m trainers.finetune` on JPEG photographs, with several numbers of data loading workers and with
augmentation on the training device and in the data loader, beside the bare training step (forward, cross-entropy in
fp32, backward, fused AdamW) of the same model on a batch that is there. In every round each of them has its turn, and
another one begins each round, so that a machine that slows down slows all alike.

Give it photographs as people train on, of about 500 x 375 pixels: digits, icons or camera files of 20 megapixels load
at quite another rate. A few hundred are enough. They are copied to a temporary folder, under two classes without a
meaning, as often as a run needs images; after the first time they come from the system's file cache.

Example:
    python tests/benchmarks/loop.py --data path/to/photographs --output loop.md
    python tests/benchmarks/loop.py --data path/to/photographs --recipe deit --workers 4 8 16 --steps 500
"""

import argparse
import gc
import io
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import Image
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_device, add_output
from benchmarks.costs import make_step
from benchmarks.environment import describe_environment, format_environment
from benchmarks.steps import MIN_ROUNDS, format_quartiles, rotated, time_step
from model_cards.figures import GROUP_COLORS
from model_cards.pages import tabulate
from modeling_vit_custom.command_line import not_negative, positive, report_user_errors
from trainers.arguments import COMMON_GROUPS, DataArguments, TrainingArguments, TrainingCommand
from trainers.arguments import parse_arguments as parse_training_arguments
from trainers.data import IMAGE, TRAIN, label_names, load_splits
from trainers.draws import Draws
from trainers.memory import keep_freed_memory
from trainers.models import make_model, read_processor
from trainers.runs import load_training_splits, prepare_images


ROOT = Path(__file__).resolve().parents[2]
# On a device: images a step, steps of a run, and the dtype that runs there use.
DEFAULTS = {"cpu": (8, 50, "float32"), "cuda": (128, 250, "autocast")}
# Who augments images, and how --augment_on_device says it.
AUGMENTED_BY = {"training device": "true", "data loader": "false"}
# What a run is made of: a training step on normal noise, augmentation on the training device of an 8-bit batch that is
# there, and decoding and cropping by one core, as in a data loading worker, without and with augmentation.
BARE, AUGMENTATION, LOADING, BOTH = PARTS = ("bare step", "augmentation", "loading", "loading and augmentation")
OF_WORKERS = (LOADING, BOTH)
LINES = 5  # of a run's log; the first is left out
MAX_PHOTOGRAPHS = 1000
LOST_SHARE = 0.05  # of a step, at most, by loading or augmenting


@dataclass
class Run:
    """A run of the Trainer: what the lines of its log say, without the first."""

    round: int
    workers: int
    augmented_by: str
    images_per_second: list[float]
    data_wait: list[float]

    @property
    def rate(self) -> float:
        """Images a second of all lines, which are as many images each."""
        return 1 / np.mean(1 / np.array(self.images_per_second))

    @property
    def waiting(self) -> float:
        """The share of the time that went by in waiting for data."""
        return np.average(self.data_wait, weights=1 / np.array(self.images_per_second))


@dataclass
class Parts:
    """Seconds that a batch takes in each of `PARTS`, over and over."""

    round: int
    seconds: dict[str, list[float]]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    environment = describe_environment("loop.py", argv, arguments.device)
    runs, parts = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with report_user_errors("loop.py"):
            photographs = read_photographs(arguments.data)
            write_photographs(photographs, arguments, folder / "images")
            bare = BareParts(arguments, folder)
        if arguments.device == "cpu":
            keep_freed_memory()  # as the runs do
        report = [header(environment, photographs, arguments)]
        print(report[0], flush=True)
        turns = [None, *itertools.product(arguments.workers, AUGMENTED_BY)]
        bar = tqdm(total=arguments.repeats * len(turns), unit="run", disable=arguments.no_progress)
        for number in range(arguments.repeats):
            for turn in rotated(turns, number):
                if turn is None:
                    bar.set_description(BARE)
                    parts.append(bare.measure(number, arguments.seconds))
                else:
                    bar.set_description(f"{turn[0]} workers, the {turn[1]} augments")
                    runs.append(run(number, *turn, arguments, folder))
                bar.update()
            # After every round, because it is long and may be cut short.
            if arguments.output is not None:
                write(arguments, environment, [*report, format_tables(runs, parts, arguments)], runs, parts)
        bar.close()
    print(f"\n{format_tables(runs, parts, arguments)}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--data", type=data_folder, required=True, metavar="FOLDER", help="of JPEG photographs of about 500 x 375 "
        "pixels, at any depth, or of parquet files that hold them; required. The first "
        f"{MAX_PHOTOGRAPHS:,} are used")  # fmt: skip
    add("--model", default="vit_small_patch16_224", help="preset or folder (default: vit_small_patch16_224)")
    add("--recipe", default="finetune", metavar="NAME|FILE", help="of trainers.finetune, which says how images are "
        "augmented (default: finetune)")  # fmt: skip
    add("--workers", nargs="+", type=not_negative, default=[0, 1, 2, 4], metavar="N", help="processes that load "
        "images; with 0 the training process does (default: 0 1 2 4)")  # fmt: skip
    add("--batch_size", type=positive, help="images a step (default: 8 on a CPU, 128 on a GPU)")
    add("--steps", type=positive, help=f"of a run, a multiple of {LINES}; the first of {LINES} parts is left out "
        "(default: 50 on a CPU, 250 on a GPU)")  # fmt: skip
    add("--dtype", choices=("float32", "autocast"), help="default: float32 on a CPU, autocast (bf16) on a GPU")
    add("--repeats", type=positive, default=3, help="rounds (default: 3)")
    add("--seconds", type=float, default=10.0, help="time for the bare step, augmentation and loading in each round; "
        f"each is done {MIN_ROUNDS} times at least (default: 10)")  # fmt: skip
    add_device(parser, default_device)
    add_output(parser, "markdown file to write; all times go beside it as JSON lines, and a picture")
    add("--no_progress", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    batch_size, steps, dtype = DEFAULTS[arguments.device]
    arguments.batch_size = arguments.batch_size or batch_size
    arguments.steps = arguments.steps or steps
    arguments.dtype = arguments.dtype or dtype
    if arguments.steps % LINES:
        parser.error(f"--steps {arguments.steps} must be a multiple of {LINES}, the lines of a run's log")
    return arguments


def data_folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return Path(text)


# ------------------------------------------------------------------------------------------------------------- images


def read_photographs(folder: Path) -> list[bytes]:
    """JPEG files of a folder as they are.

    Raises:
        ValueError: if one of them is another kind of image, or cannot be read.
    """
    splits = load_splits(DataArguments(dataset=str(folder), validation_fraction=0.0), needs_labels=False)
    images = (
        splits[TRAIN].select(range(min(len(splits[TRAIN]), MAX_PHOTOGRAPHS))).cast_column(IMAGE, Image(decode=False))
    )
    photographs = []
    for row, image in enumerate(images[IMAGE]):
        encoded = image["bytes"] or Path(image["path"]).read_bytes()
        kind = PIL.Image.open(io.BytesIO(encoded)).format
        if kind != "JPEG":
            raise ValueError(f"--data {folder}: image {image['path'] or row} is of kind {kind}, not JPEG")
        photographs.append(encoded)
    return photographs


def write_photographs(photographs: Sequence[bytes], arguments: argparse.Namespace, folder: Path) -> None:
    """A folder that trainers.finetune takes, with more images to train on than a run reads.

    Photographs come again under other names, since workers start anew at the end of an epoch; the more there are left,
    the longer workers go on, as they do in a long run.
    """
    prefetched = 2 * max(arguments.workers)
    count = arguments.batch_size * (arguments.steps + prefetched + 1)
    for split, total in {"train": max(count, len(photographs)), "test": 2}.items():
        for name in ("even", "odd"):
            (folder / split / name).mkdir(parents=True)
        paths = [folder / split / ("even", "odd")[index % 2] / f"{index:06}.jpg" for index in range(total)]
        for index, path in enumerate(paths):
            if index < len(photographs):
                path.write_bytes(photographs[index])
            else:
                os.link(paths[index % len(photographs)], path)


# ---------------------------------------------------------------------------------------------------------- measuring


def training_argv(workers: int, augmented_by: str, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """What trainers.finetune is told."""
    options = {
        "recipe": arguments.recipe,
        "dataset": folder / "images",
        "model": arguments.model,
        "per_device_train_batch_size": arguments.batch_size,
        "max_steps": arguments.steps,
        "logging_steps": arguments.steps // LINES,
        "dataloader_num_workers": workers,
        "augment_on_device": AUGMENTED_BY[augmented_by],
        "bf16": "true" if arguments.dtype == "autocast" else "false",
        "use_cpu": "true" if arguments.device == "cpu" else "false",
        "validation_fraction": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "card_images": 0,
        "disable_tqdm": "true",
        "report_to": "none",
        "output_dir": folder / "run",
        "overwrite": "true",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run(number: int, workers: int, augmented_by: str, arguments: argparse.Namespace, folder: Path) -> Run:
    """A run in a process of its own."""
    command = [sys.executable, "-m", "trainers.finetune", *training_argv(workers, augmented_by, arguments, folder)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"loop.py: error: trainers.finetune ended with {done.returncode}: {done.stderr[-2000:]}")
    state = json.loads((folder / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    _, *lines = [line for line in state["log_history"] if "images_per_second" in line]
    return Run(
        number, workers, augmented_by, *([line[name] for line in lines] for name in ("images_per_second", "data_wait"))
    )


class BareParts:
    """What a run is made of, each by itself: as trainers.finetune puts it together.

    Raises:
        ValueError: as trainers.finetune refuses its arguments.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.batch_size, self.device, self.dtype = arguments.batch_size, arguments.device, arguments.dtype
        commands = [read_command(training_argv(0, augmented_by, arguments, folder)) for augmented_by in AUGMENTED_BY]
        splits = load_training_splits(commands[0])
        self.make_model = lambda: make_model(commands[0].model, label_names(splits))
        _, processor = self.make_model()
        self.size, _, _ = read_processor(processor)
        self.seed = commands[0].training.seed
        (self.images, self.augmentation, _), (self.augmented_images, _, _) = (
            prepare_images(command, splits, processor) for command in commands
        )

    def measure(self, number: int, seconds: float) -> Parts:
        """Every part in turn, for so many seconds and a few times at least."""
        parts, threads = Parts(number, {name: [] for name in PARTS}), torch.get_num_threads()
        self.time_parts(parts, seconds, threads)
        torch.set_num_threads(threads)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()  # for the runs
        return parts

    def time_parts(self, parts: Parts, seconds: float, threads: int) -> None:
        model, _ = self.make_model()
        noise = torch.randn(self.batch_size, 3, *self.size).to(self.device)
        step = make_step(model.to(self.device).train(), noise, self.dtype)
        batch = self.images.__getitems__(list(range(self.batch_size)))["pixel_values"].to(self.device)
        functions = {
            BARE: lambda numbers: step(),
            AUGMENTATION: lambda numbers: self.augmentation(batch, Draws.of(self.seed, numbers, "augmentation")),
            LOADING: self.images.__getitems__,
            BOTH: self.augmented_images.__getitems__,
        }
        start = math.inf
        for count in itertools.count():
            if count > MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            numbers = list(range(count * self.batch_size, (count + 1) * self.batch_size))
            for name in rotated(list(functions), count):
                torch.set_num_threads(1 if name in OF_WORKERS else threads)
                device = "cpu" if name in OF_WORKERS else self.device
                taken = time_step(partial(functions[name], numbers), device)
                if count:  # the first time warms up
                    parts.seconds[name].append(taken)
            start = min(start, time.perf_counter())


def read_command(argv: list[str]) -> TrainingCommand:
    groups = [*COMMON_GROUPS, TrainingArguments]
    return TrainingCommand("finetune", argv, *parse_training_arguments(groups, argv, "loop.py", "", ""))


# ---------------------------------------------------------------------------------------------------------- reporting


def header(environment: dict[str, str], photographs: Sequence[bytes], arguments: argparse.Namespace) -> str:
    sizes = [PIL.Image.open(io.BytesIO(encoded)).size for encoded in photographs]
    width, height = (round(side) for side in np.median(sizes, axis=0))
    kilobytes = np.median([len(encoded) for encoded in photographs]) / 1000
    model, recipe = Path(arguments.model).name, Path(arguments.recipe).name
    left_out = arguments.steps // LINES
    return f"""# Loading and augmentation in the training loop

{format_environment(environment)}
- data: {len(photographs):,} JPEG files, at the median {width} pixels wide, {height} high and {kilobytes:.0f} kB
- model: {model} on {arguments.device} in {arguments.dtype}
- a run: recipe {recipe}, {arguments.steps} steps of {arguments.batch_size} images, the first {left_out} left out

Figures are medians with [quartiles]: of runs, and of ratios to the bare step of the same round, over rounds; of parts,
over every time. The bare step is forward, cross-entropy in fp32, backward and fused AdamW on a batch that is there."""


def format_tables(runs: Sequence[Run], parts: Sequence[Parts], arguments: argparse.Namespace) -> str:
    rows = []
    bare = {each.round: arguments.batch_size / np.median(each.seconds[BARE]) for each in parts}
    for workers, augmented_by in itertools.product(arguments.workers, AUGMENTED_BY):
        own = [each for each in runs if (each.workers, each.augmented_by) == (workers, augmented_by)]
        ratios = [each.rate / bare[each.round] for each in own]
        rates, waits = [each.rate for each in own], [each.waiting for each in own]
        cells = (format_quartiles(ratios, "{:.2f}".format), format_quartiles(rates))
        rows.append((str(workers), augmented_by, *cells, format_quartiles(waits, "{:.1%}".format)))
    rows.append((BARE, "-", "1", format_quartiles(list(bare.values())), "-"))
    titles = ("workers", "augmented by", "**images/s / bare step**", "images/s", "waiting for data")
    return f"{tabulate(titles, rows)}\n\n{format_parts(parts, arguments)}"


def format_parts(parts: Sequence[Parts], arguments: argparse.Namespace) -> str:
    rows = []
    threads = f"{torch.get_num_threads()} thread(s)" if arguments.device == "cpu" else "the GPU"
    rates = {}
    for name in PARTS:
        seconds = [each for part in parts for each in part.seconds[name]]
        # Neighbours in time.
        ratios = [own / step for part in parts for own, step in zip(part.seconds[name], part.seconds[BARE])]
        speeds = [arguments.batch_size / each for each in seconds]
        goal = f"at most {LOST_SHARE}: {'met' if np.median(ratios) <= LOST_SHARE else 'missed'}"
        cells = (
            name,
            "one core" if name in OF_WORKERS else threads,
            format_quartiles([1000 * each / arguments.batch_size for each in seconds]),
            format_quartiles(speeds),
            "1" if name == BARE else format_quartiles(ratios, "{:.3f}".format),
            goal if name == AUGMENTATION else "-",
        )
        rows.append(cells)
        rates[name] = np.median(speeds)
    loading, both = (count_cores(rates[BARE], rates[name]) for name in OF_WORKERS)
    titles = ("part", "by", "ms an image", "images/s", "**time / bare step**", "goal")
    return tabulate(titles, rows) + (
        "\n\nComputed from these medians, not measured: for loading to cost at most "
        f"{LOST_SHARE:.0%} of the bare step's rate, images must come from {loading} core(s) that do nothing else, from "
        f"{both} where they augment as well."
    )


def count_cores(step_rate: float, rate_of_core: float) -> int:
    """Cores that load as many images a second as steps take, less the share that may be lost."""
    return math.ceil((1 - LOST_SHARE) * step_rate / rate_of_core)


def write(
    arguments: argparse.Namespace,
    environment: dict[str, str],
    report: Sequence[str],
    runs: Sequence[Run],
    parts: Sequence[Parts],
) -> None:
    """The tables, every figure beside them, and a picture."""
    picture = arguments.output.with_suffix(".png")
    plot_runs(runs, parts, arguments).savefig(picture, dpi=150)
    text = "\n\n".join([*report, f"![Images a second, and time waiting for data]({picture.name})"])
    arguments.output.write_text(text + "\n", encoding="utf-8")
    without_folders = {
        name: value.name if isinstance(value, Path) else value for name, value in vars(arguments).items()
    }
    records = [{"environment": environment, "arguments": without_folders}, *map(asdict, [*parts, *runs])]
    lines = map(json.dumps, records)
    arguments.output.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot_runs(runs: Sequence[Run], parts: Sequence[Parts], arguments: argparse.Namespace) -> Figure:
    """Draws images a second, beside the bare step's, and the share of time in waiting, against workers.

    Dots are medians over rounds, bars quartiles.
    """
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    rates, waits = figure.subplots(1, 2)
    for augmented_by, color, shift in zip(AUGMENTED_BY, GROUP_COLORS, (-0.04, 0.04)):
        for panel, name in ((rates, "rate"), (waits, "waiting")):
            values = [
                [getattr(run, name) for run in runs if (run.workers, run.augmented_by) == (workers, augmented_by)]
                for workers in arguments.workers
            ]
            low, median, high = np.array([np.percentile(each, [25, 50, 75]) for each in values]).T
            # Beside each other, where they are the same.
            places = np.arange(len(values)) + shift
            panel.errorbar(
                places, median, [median - low, high - median], color=color, marker="o", markersize=5, linewidth=1.4,
                elinewidth=1, label=f"{augmented_by} augments",
            )  # fmt: skip
    bare = np.median([arguments.batch_size / each for part in parts for each in part.seconds[BARE]])
    rates.axhline(bare, color="0.3", linestyle="--", linewidth=1.2, label=BARE)
    rates.set_ylabel("images/s")
    waits.set_ylabel("time waiting for data")
    waits.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for panel in (rates, waits):
        panel.margins(x=0.08, y=0.1)
        panel.set_ylim(bottom=0)
        panel.set_xticks(range(len(arguments.workers)), map(str, arguments.workers))
        panel.set_xlabel("data loading workers")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.92")
        panel.set_axisbelow(True)
    figure.legend(*rates.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


if __name__ == "__main__":
    main()
