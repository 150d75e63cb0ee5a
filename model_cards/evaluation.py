"""The page of an evaluation: report.md with its figures, rendered from what was measured, and evaluation.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from model_cards.facts import is_fraction
from model_cards.figures import (
    plot_accuracy_by_size,
    plot_calibration,
    plot_confusion_matrix,
    plot_robustness,
)
from model_cards.pages import describe_settings, show, tabulate, to_json, write_page
from model_cards.rendering import METRIC_TITLES, escape_markdown, format_duration, link


FACTS, REPORT = "evaluation.json", "report.md"
CONFUSION_MATRIX = "confusion_matrix.png"
RELIABILITY = "reliability.png"
MISTAKES = "mistakes.png"
SIZES = "sizes.png"
ROBUSTNESS = "robustness.png"
CORRUPTIONS = "corruptions.png"
FILES = (FACTS, REPORT, CONFUSION_MATRIX, RELIABILITY, MISTAKES, SIZES, ROBUSTNESS, CORRUPTIONS)
MAX_CLASSES = 20  # in the table; of more, the best and the worst
NUM_EXTREME = 10


def write_evaluation(folder: Path, facts: Mapping, pictures: Mapping[str, Figure]) -> None:
    """Writes the facts, the figures and the page into a folder, in place of those of an older evaluation.

    Args:
        folder: Made if there is none; other files in it stay.
        facts: As `trainers.evaluation` gathers them: what JSON knows, figures as {"value", "low", "high"}.
        pictures: Figures that show images, by their names in `FILES`.
    """
    drawn = draw_figures(facts) | dict(pictures)
    texts = {REPORT: render_evaluation(facts, drawn.keys()), FACTS: to_json(facts)}
    write_page(folder, texts, drawn, FILES)


def draw_figures(facts: Mapping) -> dict[str, Figure]:
    """The figures that the facts alone decide, by their names."""
    true, predicted, counts = np.array(facts["confusions"]).T
    # Of a thousand classes that a model knows, a data set may have ten.
    seen, places = np.unique([true, predicted], return_inverse=True)
    matrix = np.zeros((len(seen), len(seen)), dtype=int)
    matrix[tuple(places.reshape(2, -1))] = counts
    drawn = {
        CONFUSION_MATRIX: plot_confusion_matrix(matrix, [facts["label_names"][index] for index in seen]),
        RELIABILITY: plot_calibration(facts["calibration"]),
    }
    if len(_list_sizes(facts)) > 1:
        lines = {}
        for flips in (False, True):
            rows = [row for row in facts["variants"] if row["flips"] is flips]
            accuracies = [_ends(row["results"]["accuracy"]) for row in rows]
            if rows:
                title = "with the mirror image" if flips else "one view"
                lines[title] = [(_name_size(row["image_size"]), *ends) for row, ends in zip(rows, accuracies)]
        drawn[SIZES] = plot_accuracy_by_size(lines)
    if "robustness" in facts:
        rows = facts["robustness"]["corruptions"]
        accuracies = {row["name"]: [each["value"] for each in row["accuracy"]] for row in rows}
        groups = [row["group"] for row in rows]
        clean = facts["results"]["accuracy"]["value"]
        drawn[ROBUSTNESS] = plot_robustness(accuracies, groups, facts["robustness"]["severities"], clean)
    return drawn


def render_evaluation(facts: Mapping, figures: Sequence[str] = ()) -> str:
    """The page, in Markdown; `figures` lie beside it."""
    model, data = escape_markdown(facts["model"]), escape_markdown(facts["dataset"])
    parts = [f"# {model} on {data}", _describe(facts), _tabulate_results(facts)]
    if SIZES in figures or len(facts["variants"]) > 1:
        parts += ["## Image sizes and mirror images", _tabulate_variants(facts)]
        parts += [show(SIZES, "Accuracy by image size")] if SIZES in figures else []
    if "robustness" in facts:
        parts += ["## Robustness", *_describe_robustness(facts, figures)]
    parts += ["## Mistakes"]
    if MISTAKES in figures:
        parts += ["The images that it is most sure of and wrong about.", show(MISTAKES, "Its surest mistakes")]
    else:
        parts += ["No image was misclassified."]
    parts += [show(CONFUSION_MATRIX, "Confusion matrix"), "## Confidence", show(RELIABILITY, "Reliability diagram")]
    parts += ["## Classes", *_tabulate_classes(facts), "## How it was measured", *_describe_settings(facts)]
    return "\n\n".join(parts) + "\n"


def show_figure(name: str, figure: Mapping) -> str:
    """`90.31% (89.72% to 90.86%)`, or `0.3312 (0.3140 to 0.3490)` of what is no share."""
    value, low, high = (_format(name, end) for end in _ends(figure))
    return f"{value} ({low} to {high})"


def _describe(facts: Mapping) -> str:
    count = f"{facts['num_images']:,} images"
    if facts["drawn_from"] is None:
        count += ", the first ones of a stream"
    elif facts["drawn_from"] > facts["num_images"]:
        count += f", drawn from {facts['drawn_from']:,}"
    # Whether the model was trained on the same share is not known here.
    held_out = ", a share of train" if facts["is_held_out"] else ""
    text = (
        f"Measured on the {escape_markdown(facts['split'])} split ({count}{held_out}) of "
        f"{link(facts['dataset'], facts['dataset_url'])}; the model, {link(facts['model'], facts['model_url'])}, is "
        f"a `{facts['model_type']}` of {facts['num_parameters'] / 1e6:.3g} M parameters for images of "
        f"{_name_size(facts['image_size'])} pixels."
    )
    absent = len(facts["absent_classes"])
    if absent:
        text += (
            f" It knows {len(facts['label_names']):,} classes, {absent:,} of which the data set does not have:"
            " an image that it takes for one of these is wrong."
        )
    return text


def _tabulate_results(facts: Mapping) -> str:
    rows = [(METRIC_TITLES[name], *_split_figure(name, facts["results"][name])) for name in _order(facts["results"])]
    table = tabulate(("Figure", "Value", f"{facts['bootstrap']['coverage']:.0%} interval"), rows)
    return (
        f"{table}\n\nIntervals are percentiles of {facts['bootstrap']['resamples']:,} bootstrap draws of the images: "
        "they say how far figures would move with other images of the same kind. That of the calibration error lies "
        "somewhat high, as draws add noise to its bins; one without any width only says that images were few, or all "
        "of them right."
    )


def _tabulate_variants(facts: Mapping) -> str:
    has_flips = any(row["flips"] for row in facts["variants"])
    names = [name for name in _order(facts["results"]) if name not in ("balanced_accuracy", "macro_f1")]
    rows = [
        (
            _name_size(row["image_size"]),
            *(["yes" if row["flips"] else "no"] if has_flips else []),
            *(show_figure(name, row["results"][name]) for name in names),
        )
        for row in facts["variants"]
    ]
    titles = ("Pixels", *(["Mirror image"] if has_flips else []), *(METRIC_TITLES[name] for name in names))
    table = tabulate(titles, rows)
    if has_flips:
        table += (
            "\n\nWith its mirror image, the probabilities of an image are the mean of those of both "
            "(as in [VGG](https://arxiv.org/abs/1409.1556), section 3.2)."
        )
    return table


def _describe_robustness(facts: Mapping, figures: Sequence[str]) -> list[str]:
    robustness = facts["robustness"]
    clean, corrupted = robustness["clean_error"], robustness["mean_corruption_error"]
    number, severities = len(robustness["corruptions"]), robustness["severities"]
    which = "The 15" if number == 15 else f"{number} of the 15"
    text = (
        f"{which} corruptions of [ImageNet-C](https://arxiv.org/abs/1903.12261) at severity "
        f"{', '.join(map(str, severities))}, made on the fly of the same images at the model's size with the "
        f"parameters of {robustness['parameters']}. These are not the published images (the frost is drawn, for one): "
        "compare models by this command, not with published figures. Errors are not divided by AlexNet's."
    )
    rows = [
        ("Error without corruption", *_split_figure("accuracy", clean)),
        ("Mean corruption error", *_split_figure("accuracy", corrupted)),
        ("The same, less the error without corruption", *_split_figure("accuracy", robustness["added_error"])),
    ]
    parts = [text, tabulate(("Figure", "Value", f"{facts['bootstrap']['coverage']:.0%} interval"), rows)]
    parts += [show(ROBUSTNESS, "Accuracy by corruption and severity")] if ROBUSTNESS in figures else []
    parts.append(
        tabulate(
            ("Corruption", "Kind", "Mean error", *(f"Accuracy at {severity}" for severity in severities)),
            [
                (
                    row["name"].replace("_", " "),
                    row["group"],
                    show_figure("accuracy", row["error"]),
                    *(_format("accuracy", each["value"]) for each in row["accuracy"]),
                )
                for row in robustness["corruptions"]
            ],
        )
    )
    parts += [show(CORRUPTIONS, "An image under each corruption")] if CORRUPTIONS in figures else []
    return parts


def _tabulate_classes(facts: Mapping) -> list[str]:
    titles = ("Class", "Images", "Recall", f"{facts['bootstrap']['coverage']:.0%} interval", "Most often taken for")
    rows = [row for row in facts["classes"] if row["images"]]
    if len(rows) <= MAX_CLASSES:
        return [tabulate(titles, [_list_class(row) for row in rows])]
    # At equal recall the class with more images comes first: its recall is the better known of the two.
    worst = sorted(rows, key=lambda row: (row["recall"]["value"], -row["images"]))[:NUM_EXTREME]
    best = sorted(rows, key=lambda row: (-row["recall"]["value"], -row["images"]))[:NUM_EXTREME]
    return [
        f"The {NUM_EXTREME} that are recognised worst of {len(rows):,}; all of them are in `{FACTS}`.",
        tabulate(titles, [_list_class(row) for row in worst]),
        "And best:",
        tabulate(titles, [_list_class(row) for row in best]),
    ]


def _list_class(row: Mapping) -> tuple[str, ...]:
    taken_for = "-" if row["taken_for"] is None else escape_markdown(row["taken_for"])
    return escape_markdown(row["name"]), f"{row['images']:,}", *_split_figure("accuracy", row["recall"]), taken_for


def _describe_settings(facts: Mapping) -> list[str]:
    settings = {
        "Hardware": facts["hardware"],
        "Precision": facts["precision"],
        "Time": format_duration(facts["seconds"]),
        "Seed": str(facts["bootstrap"]["seed"]),
        "Code": None if facts["commit"] is None else f"vit-custom, commit {facts['commit']}",
        **facts["versions"],
    }
    return describe_settings(facts["command"], settings)


def _order(results: Mapping) -> list[str]:
    return [name for name in METRIC_TITLES if name in results]


def _list_sizes(facts: Mapping) -> set[tuple[int, ...]]:
    return {tuple(row["image_size"]) for row in facts["variants"]}


def _name_size(size: Sequence[int]) -> str:
    return "{} x {}".format(*size)


def _ends(figure: Mapping) -> tuple[float, float, float]:
    return figure["value"], figure["low"], figure["high"]


def _format(name: str, value: float) -> str:
    return f"{value:.2%}" if is_fraction(name) else f"{value:.4f}"


def _split_figure(name: str, figure: Mapping) -> tuple[str, str]:
    value, low, high = (_format(name, end) for end in _ends(figure))
    return value, f"{low} to {high}"
