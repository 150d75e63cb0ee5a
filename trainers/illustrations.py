"""Pictures of a classifier at work on held-out images, for its card."""

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Image, IterableDataset
from matplotlib.figure import Figure
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from model_cards.figures import plot_attention, plot_predictions
from model_cards.rendering import ATTENTION, PREDICTIONS
from modeling_vit_custom import ViTCustomForImageClassification
from modeling_vit_custom.interpretability import grad_cam, leaves_map
from trainers.data import IMAGE, LABEL, decode, sample_images
from trainers.image_ops import to_arrays
from trainers.models import read_processor


NUM_EXAMPLES = 3
MAX_EXAMPLE_SIDE = 512


def illustrate(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    split: Dataset | IterableDataset,
    logits: np.ndarray,
    count: int,
) -> dict[str, Figure]:
    """Figures of `count` images drawn at random, of as many that are most surely wrong, and of what it looks at.

    Args:
        model: The classifier, in evaluation mode.
        processor: Its own.
        split: Held-out images.
        logits: Of these, (N, L), in their order.
        count: Of a stream the first ones are taken, and no wrong ones looked for.
    """
    names, probabilities = split.features[LABEL].names, torch.tensor(logits).double().softmax(dim=-1).numpy()
    taken, sureness = probabilities.argmax(axis=-1), probabilities.max(axis=-1)
    if isinstance(split, Dataset):
        labels = np.array(split[LABEL][:])
        drawn = np.random.default_rng(0).permutation(len(split))[:count]
        wrong = np.flatnonzero(taken != labels)
        groups = {"drawn at random": drawn, "most sure and wrong": wrong[np.argsort(-sureness[wrong])][:count]}
        encoded = split.cast_column(IMAGE, Image(decode=False))
        images = {row: decode(encoded[int(row)][IMAGE]) for rows in groups.values() for row in rows}
    else:
        readable = sample_images(split, count)
        groups = {"the first ones": np.arange(len(readable))}
        images = {row: image for row, (image, _) in enumerate(readable)}
        labels = np.array([label for _, label in readable])
    _, mean, std = read_processor(processor)
    pixels = {row: processor(image, return_tensors="pt")["pixel_values"][0] for row, image in images.items()}
    shown = {row: to_arrays(each[None], mean, std)[0] for row, each in pixels.items()}
    rows = {
        title: [(shown[row], names[labels[row]], names[taken[row]], sureness[row]) for row in group]
        for title, group in groups.items()
    }
    figures = {PREDICTIONS: plot_predictions(rows)}
    if isinstance(model, ViTCustomForImageClassification) and leaves_map(model):
        chosen = next(iter(groups.values()))
        maps = look(model, torch.stack([pixels[row] for row in chosen]))
        figures[ATTENTION] = plot_attention(
            [(shown[row], weights, names[taken[row]]) for row, weights in zip(chosen, maps)]
        )
    return figures


def look(model: ViTCustomForImageClassification, pixels: Tensor) -> np.ndarray:
    """Maps (B, H, W) from 0 to 1 of what the likeliest class of each image rests on."""
    maps, _ = grad_cam(model, pixels.to(model.device))
    return F.interpolate(maps[:, None], pixels.shape[2:], mode="bilinear")[:, 0].clamp(0, 1).cpu().numpy()


def write_examples(folder: Path, split: Dataset | IterableDataset, count: int) -> dict[str, str]:
    """Held-out images for the page on the Hub, in place of older ones: names in the folder, with their classes."""
    names, files = split.features[LABEL].names, {}
    shutil.rmtree(folder / "examples", ignore_errors=True)
    for number, (image, label) in enumerate(sample_images(split, count) if count else [], start=1):
        (folder / "examples").mkdir(exist_ok=True)
        image.thumbnail((MAX_EXAMPLE_SIDE, MAX_EXAMPLE_SIDE))
        file = f"examples/{number}.png"
        image.save(folder / file)
        files[file] = names[label]
    return files
