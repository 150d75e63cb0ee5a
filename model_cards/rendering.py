"""The card of a training run: README.md and its figures, rendered from known facts only.

A fact that is not known is left out of the card; none is guessed. Generated parts stand between markers, so that what
people write outside of them survives the next rendering.
"""

import html
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from huggingface_hub import ModelCard
from matplotlib.figure import Figure

from model_cards.citations import PAPERS, REBALANCING
from model_cards.facts import CLASSIFICATION, TrainingRun, is_fraction, write_run
from model_cards.figures import (
    collect_curves,
    plot_calibration,
    plot_confusion_matrix,
    plot_training_curves,
)
from model_cards.metadata import build_metadata, split_card
from modeling_vit_custom.interpretability.figures import plot_attention_distance


CARD = "README.md"
TEMPLATE_PATH = Path(__file__).with_name("template.md")
TRAINING_CURVES = "training_curves.png"
CONFUSION_MATRIX = "confusion_matrix.png"
CALIBRATION = "calibration.png"
PREDICTIONS = "predictions.png"
ATTENTION = "attention.png"
RECONSTRUCTIONS = "reconstructions.png"
FILTERS = "filters.png"
POSITIONS = "positions.png"
ATTENTION_DISTANCE = "attention_distance.png"
# The first are drawn from facts; the others show images or weights, which facts do not hold.
DRAWN = (TRAINING_CURVES, CONFUSION_MATRIX, CALIBRATION, ATTENTION_DISTANCE)
FIGURES = (*DRAWN, PREDICTIONS, ATTENTION, RECONSTRUCTIONS, FILTERS, POSITIONS)
FIGURE_DPI = 150
SCORES_OF_CLASSES = ("Recall", "Precision", "F1")
MAX_WORST_CLASSES = 5
MAX_LISTED_CLASSES = 100
MAX_COMMAND_WIDTH = 90
# In the order in which a run reports them.
METRIC_TITLES = {
    "accuracy": "Accuracy",
    "top5_accuracy": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy (mean recall)",
    "macro_f1": "Macro F1",
    "expected_calibration_error": "Calibration error (ECE, 15 bins)",
    "knn_accuracy": "Accuracy of 20 nearest neighbours",
    "linear_probe_accuracy": "Accuracy of a linear classifier",
    "loss": "Loss",
}
# Facts that people do not change, nor leave behind when a newer run does not have them.
FACTS = (
    "base_model",
    "base_model_relation",
    "co2_eq_emissions",
    "library_name",
    "metrics",
    "model-index",
    "pipeline_tag",
)
BEGIN = re.compile(r"<!-- begin (\w+):[^>]*-->")


def write_card(
    output_dir: str | Path, run: TrainingRun, pictures: Mapping[str, Figure] | None = None, keep_edits: bool = False
) -> Path:
    """Writes facts, figures and README.md into a checkpoint's folder, and gives the path of the last.

    Args:
        output_dir: Older figures in it are replaced or removed.
        run: What is known.
        pictures: Figures of images by their names in `FIGURES`; without them those that are there stay.
        keep_edits: Whether what was written into an older card outside of its generated parts stays.
    """
    output_dir = Path(output_dir)
    drawn = {}
    if collect_curves(run.log_history):
        drawn[TRAINING_CURVES] = plot_training_curves(run.log_history)
    if run.confusion_matrix is not None:
        drawn[CONFUSION_MATRIX] = plot_confusion_matrix(run.confusion_matrix, run.label_names)
    if run.calibration:
        drawn[CALIBRATION] = plot_calibration(run.calibration)
    if run.attention_distances:
        drawn[ATTENTION_DISTANCE] = plot_attention_distance(run.attention_distances, run.even_attention_distances)
    drawn |= pictures or {}
    stale = [name for name in (DRAWN if pictures is None else FIGURES) if name not in drawn]
    examples = {file: label for file, label in (run.examples or {}).items() if (output_dir / file).is_file()}
    run = replace(run, examples=examples)
    # Nothing of what is there goes before all that takes its place is made.
    there = {file.name for file in output_dir.iterdir()}
    path = output_dir / CARD
    card = str(render_card(run, (there | drawn.keys()) - {*stale}))
    if keep_edits and path.exists():
        card = merge_cards(path.read_text(encoding="utf-8"), card, generated=card)
    for name in stale:
        (output_dir / name).unlink(missing_ok=True)
    for name, figure in drawn.items():
        figure.savefig(output_dir / name, dpi=FIGURE_DPI)
    path.write_text(f"{card.strip()}\n", encoding="utf-8")
    write_run(output_dir, run)  # last: a folder that holds it is finished
    return path


def render_card(
    run: TrainingRun, files: Collection[str] = (), hub_id: str | None = None, revision: str | None = None
) -> ModelCard:
    """The card of a run.

    Args:
        run: What is known.
        files: Names of what lies beside the card.
        hub_id: Where the model is to be found; without it the snippets run in its folder.
        revision: The branch there, if it is not main.
    """
    limits, worst_classes = _describe_limits(run)
    papers = [PAPERS[key] for key in (run.architecture, run.objective) if key is not None]
    return ModelCard.from_template(
        build_metadata(run),
        template_path=str(TEMPLATE_PATH),
        title=escape_markdown(run.name),
        summary=_describe_model(run),
        progress=_describe_progress(run),
        measured_on=_describe_evaluation(run),
        results=[_format_metric(run, name, value) for name, value in (run.results or {}).items()],
        class_columns=["Class", *(["Training images"] if run.train_counts else []), "Images", *SCORES_OF_CLASSES],
        classes=_list_classes(run),
        files=files,
        location=hub_id or ".",
        in_folder=hub_id is None,
        where=f', revision="{revision}"' if revision else "",
        trust=", trust_remote_code=True" if run.model_type == "vit_custom" else "",
        has_decoder=run.objective is not None,
        classifies=run.task == CLASSIFICATION,
        columns=[escape_markdown(column) for column in next(iter(run.stages), ())],
        stages=[[escape_markdown(str(value)) for value in stage.values()] for stage in run.stages],
        preprocessing=None if run.preprocessing is None else escape_markdown(run.preprocessing),
        reach=_describe_reach(run),
        map_scores=[
            (escape_markdown(name), *(f"{score:.3f}" for score in scores))
            for name, scores in (run.map_scores or {}).items()
        ],
        data_source=_describe_dataset(run),
        split_sizes=[(escape_markdown(name), f"{size:,}") for name, size in (run.split_sizes or {}).items()],
        selection=_describe_selection(run),
        command=None if run.command is None else fence(break_lines(run.command), "bash"),
        training_facts=_list_training_facts(run),
        limits=limits,
        worst_classes=worst_classes,
        citations=[paper.bibtex() for paper in papers],
    )


def merge_cards(old: str, new: str, generated: str | None = None) -> str:
    """A new card in the place of an old one, with what people wrote into that.

    Generated parts of the old card are replaced, those it lacks come behind the one before them, and what stands
    outside of them stays. All of an old card without generated parts stays above the new ones. Of the metadata, what
    people changed stays but for `FACTS`.

    Args:
        generated: The old card before people changed it; without it all of its metadata are taken for theirs.

    Raises:
        ValueError: if a part of the old card has no end, or its metadata cannot be read.
    """
    (old_metadata, old_body), (metadata, body) = split_card(old), split_card(new)
    merged = merge_metadata(old_metadata, metadata, split_card(generated or "")[0])
    old_parts, parts = find_parts(old_body), find_parts(body)
    for name, part in old_parts.items():
        old_body = old_body.replace(part, parts.get(name, ""))
    before = None
    for name, part in parts.items():
        if name not in old_parts:
            if before is None:
                old_body = f"{old_body.rstrip()}\n\n{part}\n" if not old_parts else f"{part}\n\n{old_body.lstrip()}"
            else:
                old_body = old_body.replace(parts[before], f"{parts[before]}\n\n{part}")
        before = name
    return join_card(merged, old_body)


def join_card(metadata: Mapping, body: str) -> str:
    """The inverse of `split_card`."""
    text = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=math.inf)
    return f"---\n{text}---\n\n{body.strip()}\n"


def merge_metadata(old: Mapping, new: Mapping, generated: Mapping) -> dict:
    """New metadata with what people changed of old ones, which had once been generated."""
    merged = {}
    for name in dict.fromkeys([*new, *old]):
        if name == "tags":
            tags, theirs, ours = ((each.get(name) or []) for each in (new, old, generated))
            kept = [tag for tag in tags if tag in theirs or tag not in ours]
            merged[name] = list(dict.fromkeys([*kept, *(tag for tag in theirs if tag not in ours)])) or tags
        elif name in FACTS or old.get(name) == generated.get(name):
            merged[name] = new.get(name)
        else:
            merged[name] = old.get(name, new.get(name))
    return {name: value for name, value in merged.items() if value is not None}


def find_parts(body: str) -> dict[str, str]:
    """The generated parts of a card by their names, markers included.

    Raises:
        ValueError: if one has no end.
    """
    parts = {}
    for begin in BEGIN.finditer(body):
        end = f"<!-- end {begin[1]} -->"
        stop = body.find(end, begin.end())
        if stop < 0:
            raise ValueError(f"the card's part {begin[1]!r} has no {end!r}")
        parts[begin[1]] = body[begin.start() : stop + len(end)]
    return parts


def escape_markdown(text: str) -> str:
    """Puts any text on one line on which markdown, HTML and table syntax mean nothing."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def link(name: str, url: str | None) -> str:
    """A name that leads to its page, if it has one."""
    return escape_markdown(name) if url is None else f"[{escape_markdown(name)}]({url})"


def find_worst_classes(matrix: np.ndarray, label_names: Sequence[str], count: int) -> list[tuple[str, float, int, str]]:
    """Up to `count` classes with errors, lowest recall first: (name, recall, images, most often taken for)."""
    images = matrix.sum(axis=1)
    correct = matrix.diagonal()
    recall = correct / np.maximum(images, 1)
    errors = matrix - np.diag(correct)
    # At equal recall the class with more images comes first: its recall is the better known of the two.
    worst = [index for index in np.lexsort((-images, recall)) if correct[index] < images[index]][:count]
    return [
        (label_names[index], float(recall[index]), int(images[index]), label_names[errors[index].argmax()])
        for index in worst
    ]


def confidence_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was found among `count` images.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    z = 1.959964
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    radius = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - radius), min(1.0, centre + radius)


def _describe_model(run: TrainingRun) -> str:
    """Says in one sentence what the model is."""
    facts = []
    if run.preset is not None:
        changes = f" with {escape_markdown(', '.join(run.preset_changes))}" if run.preset_changes else ""
        facts.append(f"preset {escape_markdown(run.preset)}{changes}")
    if run.num_parameters is not None:
        facts.append(f"{_format_count(run.num_parameters)} parameters")
    if run.flops is not None:
        facts.append(f"{run.flops / 1e9:.3g} GFLOPs an image")
    if run.image_size is not None:
        height, width = (run.image_size, run.image_size) if isinstance(run.image_size, int) else run.image_size
        facts.append(f"images of {height} x {width} pixels")
    if run.label_names:
        facts.append("1 class" if len(run.label_names) == 1 else f"{len(run.label_names):,} classes")
    if run.from_scratch:
        facts.append("trained from scratch")
    elif base := _name_model(run.base_model, run.base_folder):
        facts.append(f"fine-tuned from {base}")
    if teacher := _name_model(run.teacher, run.teacher_folder):
        facts.append(f"taught by {teacher}")
    if run.ema_decay is not None:
        facts.append(f"with weights averaged over training (decay {run.ema_decay:g})")
    kind = "Vision Transformer" if run.model_type == "vit_custom" else "model"
    purpose = "that classifies images" if run.task == CLASSIFICATION else "pretrained by reconstructing masked images"
    return f"A {kind} (`{run.model_type}`) {purpose}" + "".join(f", {fact}" for fact in facts) + "."


def _name_model(on_hub: str | None, folder: str | None) -> str | None:
    if on_hub is not None:
        return link(on_hub, f"https://huggingface.co/{on_hub}")
    return None if folder is None else f"the local checkpoint {escape_markdown(folder)}"


def _describe_progress(run: TrainingRun) -> str | None:
    if run.step is None or run.max_steps is None:
        return None
    return f"These are the weights of step {run.step:,} of {run.max_steps:,}: training had not ended."


def _describe_evaluation(run: TrainingRun) -> str:
    """Says what the results were measured on: "Measured on the test split (1,000 images) of ..."."""
    words, data_source = "Measured on", _describe_dataset(run)
    if run.evaluation_split is not None:
        held_out = run.evaluation_origin == "train"
        name = run.evaluation_split if held_out or run.evaluation_origin is None else run.evaluation_origin
        words += f" the {escape_markdown(name)} split"
        if _count_evaluated(run) is not None:
            words += f" ({_count_evaluated(run):,} images)"
        if held_out:
            words += ", held out of the train split"
        if data_source is not None:
            words += " of"
    if data_source is not None:
        words += f" {data_source}"
    return "The split is not recorded." if words == "Measured on" else f"{words}."


def _count_evaluated(run: TrainingRun) -> int | None:
    return (run.split_sizes or {}).get(run.evaluation_split)


def _describe_dataset(run: TrainingRun) -> str | None:
    if run.dataset is not None:
        return link(run.dataset_title or run.dataset, f"https://huggingface.co/datasets/{run.dataset}")
    if run.dataset_title is not None:
        return escape_markdown(run.dataset_title)
    return None if run.dataset_folder is None else f"the local folder {escape_markdown(run.dataset_folder)}"


def _describe_selection(run: TrainingRun) -> str | None:
    """What of the images was there to train on, and how unevenly they are spread over the classes."""
    sentences = []
    if run.train_fraction is not None or run.train_imbalance is not None:
        images = "all" if run.train_fraction is None else f"a share of {run.train_fraction:g} of the"
        images += " training images"
        if run.train_imbalance is not None:
            images += (
                " of the first class, on a smaller share of each later one, "
                f"{run.train_imbalance:g} times smaller of the last, and on one of each at least"
            )
        sentences.append(f"It was trained on {images}.")
    if len(set(run.train_counts)) > 1:
        pairs = list(zip(run.train_counts, map(escape_markdown, run.label_names)))
        few, many = (f"{count:,} ({name})" for count, name in (min(pairs), max(pairs)))
        sentences.append(f"Classes have {few} to {many} training images.")
    if run.rebalancing:
        ways = " and ".join(REBALANCING[name].format(value) for name, value in run.rebalancing.items())
        sentences.append(f"Classes were balanced by {ways}.")
    return " ".join(sentences) or None


def _format_metric(run: TrainingRun, name: str, value: float) -> tuple[str, str]:
    title = METRIC_TITLES[name] if name in METRIC_TITLES else escape_markdown(name)
    if not is_fraction(name):
        return title, f"{value:.4f}"
    text, count = f"{value:.2%}", _count_evaluated(run)
    # Of figures that are shares of the images, and of no others.
    if name in ("accuracy", "top5_accuracy") and count:
        low, high = confidence_interval(value, count)
        text += f" (95 % interval {low:.1%} to {high:.1%})"
    return title, text


def _list_classes(run: TrainingRun) -> list[tuple[str, ...]]:
    """Rows of class, training images where they are known, images, recall, precision and F1, if not too many."""
    matrix = run.confusion_matrix
    if matrix is None or len(run.label_names) > MAX_LISTED_CLASSES:
        return []
    rows = []
    for index, name in enumerate(run.label_names):
        images, taken, right = matrix[index].sum(), matrix[:, index].sum(), matrix[index, index]
        shares = (right / images if images else None, right / taken if taken else None)
        f1 = 2 * right / (images + taken) if images + taken else None
        rows.append(
            (
                escape_markdown(name),
                *([f"{run.train_counts[index]:,}"] if run.train_counts else []),
                f"{images:,}",
                *("-" if share is None else f"{share:.1%}" for share in (*shares, f1)),
            )
        )
    return rows


def _list_training_facts(run: TrainingRun) -> list[tuple[str, str]]:
    facts = {
        "Seed": None if run.seed is None else str(run.seed),
        "Hardware": run.hardware,
        "Wall time": None if run.wall_time is None else format_duration(run.wall_time),
        "Speed": None if run.images_per_second is None else f"{run.images_per_second:,.0f} images a second",
        "Peak memory": None if run.peak_memory is None else f"{run.peak_memory / 2**30:.2f} GiB",
        "Energy": None if run.energy is None else f"{run.energy:.3g} kWh, by the counters of the processors and GPUs",
        "Carbon": None if run.carbon is None else f"{run.carbon:.3g} g of CO2 equivalent",
        "Code": None if run.commit is None else f"vit-custom, commit {run.commit}",
        **(run.versions or {}),
    }
    return [(escape_markdown(name), escape_markdown(fact)) for name, fact in facts.items() if fact is not None]


def _describe_limits(run: TrainingRun) -> tuple[list[str], list[tuple[str, str, str, str]]]:
    """Reads the model's weak sides from the numbers: (sentences, rows of the table of classes)."""
    source = _describe_dataset(run)
    alike = "" if source is None else f" like those of {source}"
    if run.task == CLASSIFICATION:
        limits = [
            f"Use it to tell its classes apart in images{alike}, and measure it on your own before you rely on it."
            " Do not use it where a wrong class does harm, or for other kinds of images, on which it was not measured."
        ]
    else:
        limits = [
            f"Use it as the start of a model of your own for images{alike}, trained and measured on labelled ones."
            " It recognises nothing by itself."
        ]
    if run.task == CLASSIFICATION and run.label_names:
        limits.append(
            f"It gives one of its {len(run.label_names):,} classes to any image, also to one that shows none of them."
        )
    if run.calibration:
        limits.append(_describe_calibration(run.calibration))
    if run.confusion_matrix is None:
        return limits, []
    split = "evaluation" if run.evaluation_split is None else escape_markdown(run.evaluation_split)
    num_unseen = int((run.confusion_matrix.sum(axis=1) == 0).sum())
    if num_unseen > 0:
        limits.append(
            f"{num_unseen:,} of {len(run.label_names):,} classes have no image in the {split} split:"
            " how well they are recognised is not known."
        )
    worst = find_worst_classes(run.confusion_matrix, run.label_names, MAX_WORST_CLASSES)
    if worst:
        limits.append(f"Of the classes in the {split} split, these are recognised worst:")
    elif num_unseen < len(run.label_names):
        limits.append(f"No image of the {split} split was misclassified, so it does not show where the model fails.")
    rows = [
        (escape_markdown(name), f"{recall:.1%}", f"{images:,}", escape_markdown(taken_for))
        for name, recall, images, taken_for in worst
    ]
    return limits, rows


def _describe_calibration(bins: Sequence[Sequence[float]]) -> str:
    images, confidence, accuracy = np.array(bins, dtype=float).T
    gap = float((images * (confidence - accuracy)).sum() / images.sum())
    mean = float((images * confidence).sum() / images.sum())
    if abs(gap) < 0.005:
        return f"Its mean confidence, {mean:.1%}, is that of its accuracy to half a percent."
    than = "more" if gap > 0 else "less"
    return (
        f"It is {than} confident than right: mean confidence is {mean:.1%}, {abs(gap) * 100:.1f} points"
        f" {'above' if gap > 0 else 'below'} accuracy."
    )


def _describe_reach(run: TrainingRun) -> str | None:
    """Says how far the heads look, block by block, and which is the most local one."""
    if not run.attention_distances:
        return None
    means = [sum(heads) / len(heads) for heads in run.attention_distances]
    nearest, block = min((min(heads), number) for number, heads in enumerate(run.attention_distances, start=1))
    listed = ", ".join(f"{mean:.1f}" for mean in means)
    return (
        f"Mean attention distance from the first block to the last: {listed} pixels; even attention would have"
        f" {run.even_attention_distances[-1]:.1f} in the last. The most local head, of block {block}, looks"
        f" {nearest:.1f} pixels far."
    )


def break_lines(command: str) -> str:
    """A long command with each of its options on a line of its own, as a shell reads it."""
    if len(command) <= MAX_COMMAND_WIDTH or "\n" in command:
        return command
    words = re.findall(r"(?:[^\s'\"]|'[^']*'|\"[^\"]*\")+", command)
    return "".join(f" \\\n  {word}" if word.startswith("--") else f" {word}" for word in words).lstrip()


def fence(code: str, language: str) -> str:
    """Puts code into a block whose fence is longer than any run of backticks inside."""
    fence = "`" * max([3] + [len(run) + 1 for run in re.findall("`+", code)])
    return f"{fence}{language}\n{code}\n{fence}"


def _format_count(number: int) -> str:
    millions = number / 1e6
    return f"{millions:.1f} M" if millions >= 1 else f"{millions:.3f} M"


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours > 0:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes > 0 else f"{seconds} s"
