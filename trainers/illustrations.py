"""Pictures of a model at work on held-out images and of what it learnt, for its card."""

from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image, IterableDataset
from matplotlib.figure import Figure
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from model_cards.figures import plot_predictions
from model_cards.rendering import ATTENTION, FILTERS, POSITIONS, PREDICTIONS
from modeling_vit_custom import ViTCustomForImageClassification
from modeling_vit_custom.interpretability import (
    attention_distance,
    explain,
    has_positions,
    position_similarity,
    principal_filters,
    score_map,
    to_pixels,
)
from modeling_vit_custom.interpretability.figures import plot_filters, plot_maps, plot_position_similarity
from modeling_vit_custom.modeling_vit_custom import ViTCustomPreTrainedModel
from trainers.data import IMAGE, LABEL, decode, sample_images
from trainers.image_ops import to_arrays
from trainers.models import read_processor


NUM_EXAMPLES = 3
NUM_MEASURED = 64  # images for attention distances
MEASURED_AT_ONCE = 8
MAX_EXAMPLE_SIDE = 512


def illustrate(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    split: Dataset | IterableDataset,
    logits: np.ndarray,
    count: int,
) -> tuple[dict[str, Figure], dict]:
    """Figures of a classifier at work and of what it learnt, and what else they tell, as fields of `TrainingRun`.

    Shown are `count` images drawn at random, as many that are most surely wrong, and what the first of them rest on.

    Args:
        model: The classifier, in evaluation mode.
        processor: Its own.
        split: Held-out images.
        logits: Of these, (N, L), in their order.
        count: Of a stream the first ones are taken, and no wrong ones looked for. With 0 no image is shown.
    """
    names, probabilities = split.features[LABEL].names, torch.tensor(logits).double().softmax(dim=-1).numpy()
    taken, sureness = probabilities.argmax(axis=-1), probabilities.max(axis=-1)
    if isinstance(split, Dataset):
        labels = np.array(split[LABEL][:])
        drawn = np.random.default_rng(0).permutation(len(split))[: max(count, NUM_MEASURED)]
        wrong = np.flatnonzero(taken != labels)
        groups = {"drawn at random": drawn[:count], "most sure and wrong": wrong[np.argsort(-sureness[wrong])][:count]}
        encoded = split.cast_column(IMAGE, Image(decode=False))
        # One after the other: photographs are large.
        rows = dict.fromkeys([*drawn, *groups["most sure and wrong"]])
        pixels = {row: prepare(processor, decode(encoded[int(row)][IMAGE])) for row in rows}
    else:
        readable = sample_images(split, max(count, NUM_MEASURED))
        drawn = np.arange(len(readable))
        groups = {"the first ones": drawn[:count]}
        pixels = {row: prepare(processor, image) for row, (image, _) in enumerate(readable)}
        labels = np.array([label for _, label in readable])
    _, mean, std = read_processor(processor)
    figures, facts = {}, {}
    if count:
        shown = {row: to_arrays(pixels[row][None], mean, std)[0] for group in groups.values() for row in group}
        rows = {
            title: [(shown[row], names[labels[row]], names[taken[row]], sureness[row]) for row in group]
            for title, group in groups.items()
        }
        figures[PREDICTIONS] = plot_predictions(rows)
    if isinstance(model, ViTCustomForImageClassification):
        figures_of_weights, facts = show_learnt(model, torch.stack([pixels[row] for row in drawn]))
        figures |= figures_of_weights
        if count:
            chosen, device = drawn[:count], model.device
            seen = torch.stack([pixels[row] for row in chosen]).to(device)
            maps = explain(model, seen)
            size = tuple(seen.shape[2:])
            of_images = {name: list(to_pixels(model, each, size)) for name, each in maps.items()}
            titles = [names[taken[row]] for row in chosen]
            figures[ATTENTION] = plot_maps([shown[row] for row in chosen], titles, of_images)
            scores = {name: score_map(model, seen, each, steps=8) for name, each in maps.items()}
            facts["map_scores"] = {name: [each.mean().item() for each in score] for name, score in scores.items()}
    return figures, facts


def prepare(processor: BaseImageProcessor, image: PIL.Image.Image) -> Tensor:
    """An image as the model takes it, (C, H, W)."""
    return processor(image, return_tensors="pt")["pixel_values"][0]


def show_learnt(model: ViTCustomPreTrainedModel, pixels: Tensor) -> tuple[dict[str, Figure], dict]:
    """Figures of what an encoder learnt, and how far its heads look, as fields of `TrainingRun`.

    Args:
        model: Any model of the family, in evaluation mode.
        pixels: Normalised images (N, C, H, W) to measure attention distances by.
    """
    figures = {FILTERS: plot_filters(*principal_filters(model))}
    if has_positions(model):
        figures[POSITIONS] = plot_position_similarity(position_similarity(model))
    distance = attention_distance(model, pixels.to(model.device).split(MEASURED_AT_ONCE))
    return figures, {"attention_distances": distance.heads, "even_attention_distances": distance.uniform}


def write_examples(folder: Path, split: Dataset | IterableDataset, count: int) -> dict[str, str]:
    """Held-out images for the page on the Hub, in place of older ones: names in the folder, with their classes."""
    names, files = split.features[LABEL].names, {}
    for older in (folder / "examples").glob("*.png"):
        if older.stem.isdecimal():
            older.unlink()
    for number, (image, label) in enumerate(sample_images(split, count) if count else [], start=1):
        (folder / "examples").mkdir(exist_ok=True)
        image.thumbnail((MAX_EXAMPLE_SIDE, MAX_EXAMPLE_SIDE))
        file = f"examples/{number}.png"
        image.save(folder / file)
        files[file] = names[label]
    return files
