"""Figures of a training run: plain data in, a `matplotlib.figure.Figure` out.

Figures are built with matplotlib's object API. pyplot would keep every figure alive in a global list and ask for a
window system; here `figure.savefig(path)` draws with Agg and nothing is left behind.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)


# Two colours of the Okabe-Ito palette: told apart by readers with any kind of colour vision.
TRAIN_COLOR = "#0072B2"
EVAL_COLOR = "#D55E00"
# More of that palette.
GROUP_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MIN_IMAGES_OF_BIN = 10

# What the Trainer logs -> panel, line, colour.
LOGGED_CURVES = {
    "loss": ("Loss", "train", TRAIN_COLOR),
    "eval_loss": ("Loss", "evaluation", EVAL_COLOR),
    "eval_accuracy": ("Accuracy", "evaluation", EVAL_COLOR),
    "learning_rate": ("Learning rate", "train", TRAIN_COLOR),
}
PANEL_WIDTHS = {"Loss": 3, "Accuracy": 3, "Learning rate": 2}

MAX_CLASSES_WITH_COUNTS = 20
MAX_TICKS = 25
MAX_LABEL_LENGTH = 24
TICK_FONT_SIZE = 8
# Of the font's size, for the default font and the widest usual characters, its digits among them.
CHARACTER_WIDTH = 0.64


def collect_curves(log_history: Sequence[Mapping]) -> dict[str, tuple[list[float], list[float]]]:
    """Returns (epochs, values) for each quantity of `LOGGED_CURVES` that the log holds.

    The first value at an epoch counts: a later one comes from evaluating again after training, when the best weights
    may have been loaded back, and would draw a jump that training never made.
    """
    curves = {}
    for key in LOGGED_CURVES:
        values = {}
        for entry in log_history:
            if key in entry and "epoch" in entry:
                values.setdefault(entry["epoch"], entry[key])
        if values:
            curves[key] = (list(values.keys()), list(values.values()))
    return curves


def plot_training_curves(log_history: Sequence[Mapping]) -> Figure:
    """Draws loss, accuracy and learning rate against the epoch from the Trainer's `state.log_history`.

    A panel without a logged value is left out. A log that holds none of them raises `ValueError`.
    """
    curves = collect_curves(log_history)
    if not curves:
        raise ValueError(f"the log holds none of {', '.join(LOGGED_CURVES)} with an epoch ({len(log_history)} entries)")

    titles = list(dict.fromkeys(LOGGED_CURVES[key][0] for key in curves))
    widths = [PANEL_WIDTHS[title] for title in titles]
    figure = Figure(figsize=(1.5 * sum(widths) + 0.5, 3.7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    panels = figure.subplots(1, len(titles), sharex=True, width_ratios=widths, squeeze=False)[0]
    axes = dict(zip(titles, panels, strict=True))

    for key, (epochs, values) in curves.items():
        title, label, color = LOGGED_CURVES[key]
        # Dots keep a curve of one or a few points visible; on a long one they would only be ink.
        marker = "o" if len(epochs) <= 30 else None
        axes[title].plot(epochs, values, label=label, color=color, marker=marker, markersize=4, linewidth=1.4)
    for title, panel in axes.items():
        panel.set_title(title, loc="left", fontweight="bold", fontsize=11)
        panel.set_xlabel("epoch")
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)

    if "Loss" in axes:
        axes["Loss"].legend(frameon=False)
    if "Accuracy" in axes:
        axes["Accuracy"].yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{100 * value:g}%"))
    if "Learning rate" in axes:
        axes["Learning rate"].yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        # Plain numbers: the default's "1e-3" above the axis would sit on the title.
        axes["Learning rate"].yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    return figure


def plot_confusion_matrix(matrix: np.ndarray, label_names: Sequence[str]) -> Figure:
    """Draws counts (C, C), true classes down and predicted classes across, each row coloured by its shares.

    Up to 20 classes every count that is not zero is written in its cell; beyond 25 classes only every k-th class is
    named. The row of a class without images is grey.
    """
    matrix = np.asarray(matrix)
    num_classes = len(label_names)
    if num_classes == 0 or matrix.shape != (num_classes, num_classes):
        raise ValueError(f"a confusion matrix of shape {matrix.shape} does not fit {num_classes} label names")
    if not np.issubdtype(matrix.dtype, np.integer):
        raise ValueError(f"a confusion matrix holds counts, not {matrix.dtype}: its rows are normalised here")
    images_per_class = matrix.sum(axis=1, keepdims=True)
    shares = np.full(matrix.shape, np.nan)
    np.divide(matrix, images_per_class, out=shares, where=images_per_class > 0)

    ticks = np.arange(0, num_classes, math.ceil(num_classes / MAX_TICKS))
    names = [_shorten(label_names[tick]) for tick in ticks]

    # Inches: the square of cells, and the room that the longest name needs beside it and, turned by 45 degrees, below.
    side = min(max(0.45 * num_classes, 2.8), 9.0)
    name_width = max(len(name) for name in names) * CHARACTER_WIDTH * TICK_FONT_SIZE / 72
    figure = Figure(figsize=(side + name_width + 2.0, side + 0.7 * name_width + 0.8), layout="compressed")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = figure.subplots()
    color_map = colormaps["Blues"].with_extremes(bad="0.88")
    # The square root makes a confusion of a few percent visible, which on a linear scale looks like none.
    image = axes.imshow(shares, cmap=color_map, norm=PowerNorm(0.5, vmin=0, vmax=1))
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    # parse_math: a "$" in a class name is a "$", not the start of a formula.
    axes.set_yticks(ticks, names, fontsize=TICK_FONT_SIZE, parse_math=False)
    axes.set_xticks(ticks, names, fontsize=TICK_FONT_SIZE, parse_math=False)
    for text in axes.get_xticklabels():
        text.set(rotation=45, ha="right", va="top", rotation_mode="anchor")
    axes.spines[:].set_visible(False)

    if num_classes <= MAX_CLASSES_WITH_COUNTS:
        cell_width = 72 * side / num_classes
        font_size = min(9.0, 0.9 * cell_width / (CHARACTER_WIDTH * len(str(matrix.max()))))
        for row, column in np.argwhere(matrix > 0):
            color = "white" if image.norm(shares[row, column]) > 0.6 else "black"
            count = str(matrix[row, column])
            axes.text(column, row, count, ha="center", va="center", fontsize=font_size, color=color)

    color_bar = figure.colorbar(image, ticks=[0, 0.05, 0.2, 0.5, 1], format=PercentFormatter(xmax=1, decimals=0))
    color_bar.set_label("share of the true class (square-root scale)")
    color_bar.outline.set_visible(False)
    return figure


def plot_images(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Draws rows of images (H, W, 3), 8-bit, one column for each title; pixels stay sharp."""
    widths = {len(row) for row in rows}
    if widths != {len(titles)}:
        raise ValueError(f"rows of {sorted(widths)} images do not fit {len(titles)} titles")
    height, width = rows[0][0].shape[:2]
    cell = 1.4
    figure = Figure(figsize=(cell * len(titles), cell * height / width * len(rows) + 0.3), layout="compressed")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for row, panels in zip(rows, figure.subplots(len(rows), len(titles), squeeze=False)):
        for image, axes in zip(row, panels):
            axes.imshow(image, interpolation="nearest")
            axes.set_axis_off()
    for axes, title in zip(figure.axes, titles):
        axes.set_title(title, fontsize=TICK_FONT_SIZE, parse_math=False)
    return figure


def plot_calibration(bins: Sequence[Sequence[float]]) -> Figure:
    """Draws how often predictions are right against how sure they are, and how many are that sure.

    Args:
        bins: Of confidence: (images, mean confidence, accuracy), empty bins left out. The accuracy of those with less
            than `MIN_IMAGES_OF_BIN` images is not drawn, unless all are that small: it would say little.
    """
    images, confidence, accuracy = np.array(bins, dtype=float).T
    if images.max() >= MIN_IMAGES_OF_BIN:
        accuracy = np.where(images >= MIN_IMAGES_OF_BIN, accuracy, np.nan)
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="as often right as sure")
    line = {"color": EVAL_COLOR, "marker": "o", "markersize": 4, "linewidth": 1.4, "clip_on": False}
    above.plot(confidence, accuracy, label="this model", **line)
    above.set_ylabel("accuracy")
    above.set_ylim(0, 1)
    above.legend(frameon=False, loc="upper left")
    below.bar(confidence, images / images.sum(), width=0.04, color=TRAIN_COLOR)
    below.set_ylabel("share of images")
    below.set_xlabel("confidence")
    below.set_xlim(0, 1)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    below.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    return figure


def plot_predictions(groups: Mapping[str, Sequence[tuple[np.ndarray, str, str, float]]], columns: int = 8) -> Figure:
    """Draws images with what they are taken for, how surely, and what they are where that is something else.

    Args:
        groups: By a title, rows of (image (H, W, 3) of 8 bits, true class, predicted class, its probability).
        columns: Images beside each other.
    """
    groups = {title: rows for title, rows in groups.items() if rows}
    cell = 1.5
    heights = [math.ceil(len(rows) / columns) * (cell + 0.45) + 0.35 for rows in groups.values()]
    figure = Figure(figsize=(cell * columns, sum(heights)), layout="constrained")
    figures = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, rows) in zip(figures, groups.items()):
        part.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        panels = part.subplots(math.ceil(len(rows) / columns), columns, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, (image, true, predicted, probability) in zip(panels, rows):
            axes.imshow(image, interpolation="nearest")
            is_right = true == predicted
            text = f"{_shorten(predicted)} {probability:.0%}" + ("" if is_right else f"\nis: {_shorten(true)}")
            color = "black" if is_right else EVAL_COLOR
            axes.set_title(text, fontsize=TICK_FONT_SIZE, color=color, parse_math=False)
    return figure


def plot_accuracy_by_size(lines: Mapping[str, Sequence[tuple[str, float, float, float]]]) -> Figure:
    """Draws accuracy with its interval against the size of the images.

    Args:
        lines: By a title: (size, accuracy, ends of its interval), from small images to large ones, the same sizes each.
    """
    sizes = [size for size, *_ in next(iter(lines.values()))]
    figure = Figure(figsize=(max(4.2, 0.8 * len(sizes) + 1.8), 3.4), layout="constrained")
    axes = figure.subplots()
    for position, (title, rows) in enumerate(lines.items()):
        accuracy, low, high = np.array([row[1:] for row in rows]).T
        # Beside each other, so that intervals do not hide one another.
        places = np.arange(len(sizes)) + 0.08 * (position - (len(lines) - 1) / 2)
        errors = np.stack([accuracy - low, high - accuracy]).clip(min=0)
        color = (EVAL_COLOR, TRAIN_COLOR)[position]
        axes.errorbar(places, accuracy, errors, label=title, color=color, marker="o", markersize=4, capsize=3)
    axes.set_xticks(np.arange(len(sizes)), sizes)
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.set_xlabel("image size in pixels")
    axes.set_ylabel("accuracy")
    if len(lines) > 1:
        axes.legend(frameon=False)
    _tidy(axes)
    return figure


def plot_robustness(
    accuracies: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    severities: Sequence[int],
    clean: float,
) -> Figure:
    """Draws accuracy by corruption and severity as a table of colours, and by severity as a line for each group.

    Args:
        accuracies: By corruption, one for each severity.
        groups: What kind each corruption is of, corruptions of a kind beside each other.
        severities: From weak to strong.
        clean: Accuracy without corruption.
    """
    names, values = list(accuracies), np.array(list(accuracies.values()))
    height = max(3.4, 0.3 * len(names) + 1.1)
    figure = Figure(figsize=(10, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    shown = np.column_stack([np.full(len(names), clean), values])
    left.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(shown):
        color = "white" if value > 0.6 else "black"
        left.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=TICK_FONT_SIZE, color=color)
    left.set_xticks(np.arange(len(severities) + 1), ["clean", *map(str, severities)])
    left.set_yticks(np.arange(len(names)), [name.replace("_", " ") for name in names], fontsize=TICK_FONT_SIZE)
    for row in range(1, len(names)):
        if groups[row] != groups[row - 1]:
            left.axhline(row - 0.5, color="white", linewidth=3)
    left.axvline(0.5, color="white", linewidth=3)
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    left.set_xlabel("severity")
    left.set_title("accuracy in percent", loc="left", fontsize=11, fontweight="bold")

    places = np.arange(len(severities) + 1)
    for group, color in zip(dict.fromkeys(groups), GROUP_COLORS):
        rows = shown[[each == group for each in groups]]
        right.plot(places, rows.mean(axis=0), label=group, color=color, marker="o", markersize=4, linewidth=1.4)
    if len(set(groups)) > 1:
        right.plot(places, shown.mean(axis=0), label="mean of all", color="black", linestyle="--", linewidth=1.4)
    right.set_xticks(places, ["clean", *map(str, severities)])
    right.set_xlabel("severity")
    right.set_ylim(0, 1)
    right.set_title("accuracy by kind of corruption", loc="left", fontsize=11, fontweight="bold")
    # Lines may be anywhere: good models are high up, others near chance.
    figure.legend(frameon=False, loc="outside lower right", ncols=5, columnspacing=1.2)
    _tidy(right)
    return figure


def plot_corruptions(
    image: np.ndarray, corrupted: Mapping[str, Sequence[np.ndarray]], severities: Sequence[int]
) -> Figure:
    """Draws an image (H, W, 3), 8-bit, under each corruption, a row each, and each severity, a column each."""
    names = list(corrupted)
    blocks = 2 if len(names) > 4 else 1
    rows = math.ceil(len(names) / blocks)
    cell, name_width, (height, width) = 0.95, 1.25, image.shape[:2]
    wide = blocks * (name_width + cell * (len(severities) + 1))
    figure = Figure(figsize=(wide, rows * cell * height / width + 0.35), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    widths = ([name_width] + [cell] * (len(severities) + 1)) * blocks
    panels = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axes in panels.flat:
        axes.set_axis_off()
    for index, name in enumerate(names):
        block, row = divmod(index, rows)
        first = block * (len(severities) + 2)
        text = name.replace("_", "\n")
        panels[row, first].text(
            1, 0.5, text, ha="right", va="center", fontsize=9, transform=panels[row, first].transAxes
        )
        for column, shown in enumerate([image, *corrupted[name]], start=first + 1):
            panels[row, column].imshow(shown, interpolation="nearest")
            if row == 0:
                title = "clean" if column == first + 1 else str(severities[column - first - 2])
                panels[row, column].set_title(title, fontsize=9)
    return figure


def plot_scaling(panels: Sequence[Mapping]) -> Figure:
    """Draws errors against what was varied, a panel for each quantity, all axes logarithmic.

    Args:
        panels: Each with a `title` and `lines`: a `label`, a `group` whose lines share a colour, a `shade` of it from 0
            to 1, `points` (x, error, lowest, highest of the seeds), and a `curve` or none: `x`, `error`, `low`, `high`.
    """
    figure = Figure(figsize=(4.4 * len(panels) + 0.3, 4.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    groups = list(dict.fromkeys(line["group"] for panel in panels for line in panel["lines"]))
    colors = dict(zip(groups, itertools.cycle(GROUP_COLORS)))
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        for line in panel["lines"]:
            color = np.array(to_rgb(colors[line["group"]]))
            color = tuple(color + (1 - color) * 0.6 * line["shade"])
            x, error, low, high = np.array(line["points"]).T
            spread = np.stack([error - low, high - error]).clip(min=0)
            axes.errorbar(x, error, spread, label=line["label"], color=color, fmt="o", markersize=4, capsize=2)
            if line["curve"] is not None:
                curve = line["curve"]
                axes.plot(curve["x"], curve["error"], color=color, linewidth=1.4)
                axes.fill_between(curve["x"], curve["low"], curve["high"], color=color, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(panel["title"])
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1,) if high > 100 * low else (1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
        _tidy(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{100 * value:g}%"))
    axes = figure.axes[0]
    axes.set_ylabel("error")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=9)
    return figure


def _tidy(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _shorten(name: str) -> str:
    """Puts a class name on one line of at most `MAX_LABEL_LENGTH` characters."""
    name = " ".join(name.split())
    return name if len(name) <= MAX_LABEL_LENGTH else name[: MAX_LABEL_LENGTH - 1] + "…"
