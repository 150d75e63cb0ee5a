"""Figures of what a model has learnt: tensors in, a `matplotlib.figure.Figure` out."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor


# Of the Okabe-Ito palette: told apart by readers with any kind of colour vision.
HEAD_COLOR, UNIFORM_COLOR = "#0072B2", "#D55E00"
FONT_SIZE = 8
MAX_TILES = 16  # along a side


def plot_filters(components: Tensor, shares: Tensor, columns: int = 7) -> Figure:
    """Draws principal components of patch filters (K, C, patch, patch), each at a contrast of its own.

    Filters of three channels are coloured, of any other number the mean over the channels is grey.
    """
    rows, cell = math.ceil(len(components) / columns), 0.75
    figure = Figure(figsize=(cell * columns, cell * rows + 0.35), layout="compressed")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axes in (panels := figure.subplots(rows, columns, squeeze=False).ravel()):
        axes.set_axis_off()
    for axes, component in zip(panels, components.cpu()):
        image = component if len(component) == 3 else component.mean(dim=0, keepdim=True)
        image = 0.5 + 0.5 * image / image.abs().amax().clamp(min=1e-12)
        axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    share = f"{len(components)} principal components: {shares.sum():.0%} of the filters' variance"
    figure.suptitle(share, fontsize=FONT_SIZE)
    return figure


def plot_position_similarity(similarity: Tensor) -> Figure:
    """Draws (h, w, h, w) as tiles: how alike a position is to all others, at the place of that position.

    Of a grid of more than `MAX_TILES` along a side every k-th position has a tile.
    """
    similarity = similarity.cpu()
    height, width = similarity.shape[:2]
    step = math.ceil(max(height, width) / MAX_TILES)
    rows, columns = range(0, height, step), range(0, width, step)
    gap = 1
    canvas = np.full((len(rows) * (height + gap) - gap, len(columns) * (width + gap) - gap), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            top, left = i * (height + gap), j * (width + gap)
            canvas[top : top + height, left : left + width] = similarity[row, column].numpy()
    figure = Figure(figsize=(5.6, 4.6 * len(rows) / len(columns) + 0.3), layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(canvas, cmap=colormaps["viridis"].with_extremes(bad="white"), vmin=-1, vmax=1)
    every = math.ceil(max(len(rows), len(columns)) / 8)
    ticks = [
        ([(k * (side + gap) + side / 2 - 0.5) for k in range(0, len(shown), every)], list(shown)[::every])
        for side, shown in ((width, columns), (height, rows))
    ]
    axes.set_xticks(*ticks[0], fontsize=FONT_SIZE)
    axes.set_yticks(*ticks[1], fontsize=FONT_SIZE)
    axes.set_xlabel("column of the patch")
    axes.set_ylabel("row of the patch")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    color_bar = figure.colorbar(image, shrink=0.8)
    color_bar.set_label("cosine similarity of positions")
    color_bar.outline.set_visible(False)
    return figure


def plot_attention_distance(heads_of_blocks: Sequence[Sequence[float]], even: Sequence[float]) -> Figure:
    """Draws the mean attention distance of every head in pixels against its block, and that of even attention."""
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes, blocks = figure.subplots(), range(1, len(even) + 1)
    for block, heads in zip(blocks, heads_of_blocks):
        label = "a head" if block == 1 else None
        axes.scatter([block] * len(heads), heads, color=HEAD_COLOR, s=22, alpha=0.75, linewidth=0, label=label)
    means = [sum(heads) / len(heads) for heads in heads_of_blocks]
    axes.plot(blocks, means, color=HEAD_COLOR, linewidth=1.4, label="mean of the heads")
    axes.plot(blocks, even, color=UNIFORM_COLOR, linewidth=1.2, linestyle="--", label="even attention")
    axes.set_xlabel("block")
    axes.set_ylabel("mean attention distance (pixels)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=FONT_SIZE)
    return figure


def plot_maps(
    images: Sequence[np.ndarray], titles: Sequence[str], maps: Mapping[str, Sequence[Tensor]], width: int = 10
) -> Figure:
    """Draws images, each beside its maps: from black to yellow, (h, w), or colours, (h, w, 3).

    Args:
        images: (H, W, 3) of 8 bits.
        titles: One for each image.
        maps: By what made them, one for each image, of any scale.
        width: Pictures beside each other.
    """
    group = 1 + len(maps)
    columns = max(1, min(width // group, len(images)))
    rows, cell = math.ceil(len(images) / columns), 1.1
    figure = Figure(figsize=(cell * columns * group, (cell + 0.3) * rows), layout="constrained")
    panels = figure.subplots(rows, columns * group, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for index, (image, title) in enumerate(zip(images, titles)):
        own = panels[index * group : (index + 1) * group]
        own[0].imshow(image, interpolation="nearest")
        own[0].set_title(title, fontsize=FONT_SIZE, loc="left", parse_math=False)
        for axes, (name, of_images) in zip(own[1:], maps.items()):
            axes.imshow(overlay(image, of_images[index]), interpolation="nearest")
            if index < columns:
                # A line for each word: on one they run into the next image's title.
                axes.set_title(name.replace(" ", "\n"), fontsize=FONT_SIZE, loc="left", color="0.35")
    return figure


def overlay(image: np.ndarray, weights: Tensor) -> np.ndarray:
    """An image (H, W, 3) of 8 bits in grey under a map (h, w) of all of it in colours, or colours (h, w, 3) alone."""
    size = image.shape[:2]
    if weights.ndim == 3:
        colors = F.interpolate(weights.permute(2, 0, 1)[None].float().cpu(), size, mode="nearest")[0]
        return (255 * colors.permute(1, 2, 0)).round().byte().numpy()
    heat = F.interpolate(weights[None, None].float().cpu(), size, mode="bilinear")[0, 0]
    heat = heat - heat.amin()
    heat = (heat / heat.amax().clamp(min=1e-12)).numpy()
    grey = image.mean(axis=2, keepdims=True)
    return ((grey + 255 * colormaps["inferno"](heat)[..., :3]) / 2).astype(np.uint8)


def plot_sizes(probabilities: Mapping[int, Tensor], native: int, titles: Sequence[str]) -> Figure:
    """Draws how likely the class that an image is taken for at its native size is at other sizes.

    Args:
        probabilities: (B, L) by the shorter side in pixels, see `predict_at_sizes`.
        native: The size that a model was made for.
        titles: One for each image.
    """
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes, sizes = figure.subplots(), sorted(probabilities)
    classes = probabilities[native].argmax(dim=-1, keepdim=True)
    lines = np.stack([probabilities[size].gather(1, classes)[:, 0].cpu().numpy() for size in sizes], axis=1)
    for line, title in zip(lines, titles):
        axes.plot(sizes, line, marker="o", markersize=3, linewidth=1, label=title)
    axes.axvline(native, color="0.6", linewidth=1, linestyle="--")
    axes.set_xlabel("shorter side (pixels)")
    axes.set_ylabel(f"probability of the class at {native} pixels")
    axes.set_ylim(0, 1.02)
    axes.set_xticks(sizes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    legend = axes.legend(frameon=False, fontsize=FONT_SIZE, loc="center left", bbox_to_anchor=(1, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def plot_neighbours(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    neighbours: Sequence[Sequence[np.ndarray]],
    similarities: Tensor,
) -> Figure:
    """Draws images, each before those that are most like it by their features, with the cosine similarities (B, K)."""
    cell, columns = 1.3, 1 + max(map(len, neighbours))
    figure = Figure(figsize=(cell * columns, (cell + 0.25) * len(images)), layout="constrained")
    for row, panels in enumerate(figure.subplots(len(images), columns, squeeze=False)):
        for axes in panels:
            axes.set_axis_off()
        panels[0].imshow(images[row], interpolation="nearest")
        panels[0].set_title(titles[row], fontsize=FONT_SIZE, loc="left", fontweight="bold", parse_math=False)
        for axes, image, similarity in zip(panels[1:], neighbours[row], similarities[row]):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(f"{similarity:.2f}", fontsize=FONT_SIZE)
    return figure
