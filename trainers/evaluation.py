"""What a classifier is worth on labelled images: figures with intervals, by size, mirrored and under corruption."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BaseImageProcessor, default_data_collator

from model_cards.figures import plot_corruptions, plot_predictions
from trainers.bootstrap import Interval, mean_intervals, metric_intervals
from trainers.corruptions import CORRUPTIONS, corrupt, name_parameters
from trainers.data import IMAGE, LABEL, decode, processor_transform, with_transform
from trainers.image_ops import to_arrays
from trainers.inference import Classifier
from trainers.metrics import calibration_bins, confidences
from trainers.models import read_processor


NUM_MISTAKES = 24


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        flips: Whether also with the mirror image of each image.
        corruptions: Names of `trainers.corruptions.CORRUPTIONS`, none without robustness.
        severities: Of these.
        resamples: Bootstrap draws.
        seed: Of the draws and the corruptions.
        batch_size: Images at once.
        num_workers: Processes that read images.
    """

    flips: bool
    corruptions: Sequence[str]
    severities: Sequence[int]
    resamples: int
    seed: int
    batch_size: int
    num_workers: int


def evaluate_variants(
    classifiers: Sequence[Classifier], images: Dataset, labels: np.ndarray, settings: Settings
) -> tuple[dict, np.ndarray]:
    """Figures by image size and with mirror images, those of the first classifier also by class, and its logits (N, L).

    Args:
        classifiers: The same model at sizes of their own.
        images: N images of a split, whatever their labels.
        labels: Their classes as the model counts them (N,).
        settings: What is wanted.
    """
    variants, headline, first = [], None, None
    for classifier in classifiers:
        height, width = read_processor(classifier.processor)[0]
        views = predict(classifier, images, settings, f"{height} x {width}")
        for flips, logits in zip((False, True), views):
            intervals, recalls = metric_intervals(logits, labels, settings.resamples, settings.seed)
            results = {name: each._asdict() for name, each in intervals.items()}
            variants.append({"image_size": [height, width], "flips": flips, "results": results})
            if headline is None:
                headline, first = {"results": results, **describe_classes(logits, labels, recalls, classifier)}, logits
    variants.sort(key=lambda row: (row["image_size"], row["flips"]))
    return {**headline, "variants": variants}, first


def describe_classes(
    logits: np.ndarray, labels: np.ndarray, recalls: Sequence[Interval], classifier: Classifier
) -> dict:
    """Recall, confusions and calibration, as facts of the page."""
    names, predicted = classifier.label_names, logits.argmax(axis=-1)
    # As (true, predicted, images): of thousands of classes, almost all of the matrix is empty.
    pairs, counts = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
    confusions = [(int(true), int(taken), int(count)) for (true, taken), count in zip(pairs, counts)]
    taken_for = {}  # by true class, the first of the likeliest
    for true, taken, count in confusions:
        if taken != true and count > taken_for.get(true, (0, 0))[0]:
            taken_for[true] = count, taken
    images = np.bincount(labels, minlength=len(names)).tolist()
    return {
        "classes": [
            {
                "name": name,
                "images": images[index],
                "recall": recalls[index]._asdict(),
                "taken_for": names[taken_for[index][1]] if index in taken_for else None,
            }
            for index, name in enumerate(names)
        ],
        "calibration": calibration_bins(logits, labels),
        "confusions": confusions,
    }


def predict(classifier: Classifier, images: Dataset, settings: Settings, title: str) -> list[np.ndarray]:
    """Logits (N, L) of all images; where flips are wanted, also the logarithms of the mean probabilities of both views.

    Probabilities are averaged, not logits: https://arxiv.org/abs/1409.1556, section 3.2.

    Raises:
        ValueError: if the model gives what is no number.
    """
    views = [[], []]
    for pixels in _load(images, processor_transform(classifier.processor), settings.batch_size, settings, title):
        logits = classifier(pixels)
        views[0].append(logits.cpu())
        if settings.flips:
            # Not every device has double precision.
            both = torch.stack([logits, classifier(pixels.flip(-1))]).cpu().double().log_softmax(dim=-1)
            views[1].append((both.logsumexp(dim=0) - np.log(2)).float())
    logits = [torch.cat(parts).numpy() for parts in views if parts]
    if not all(np.isfinite(each).all() for each in logits):
        raise ValueError(f"{classifier.name!r} gives logits that are no numbers: its training diverged")
    return logits


def measure_robustness(
    classifier: Classifier, images: Dataset, labels: np.ndarray, is_right: np.ndarray, settings: Settings
) -> dict:
    """Accuracy by corruption and severity and what it comes to, with intervals.

    Args:
        classifier: At the size that images are corrupted at.
        images: N images.
        labels: Their classes as the model counts them (N,).
        is_right: Whether each is recognised without corruption (N,).
        settings: What is wanted.
    """
    names, severities = settings.corruptions, settings.severities
    views = [(name, severity) for name in names for severity in severities]
    size, mean, std = read_processor(classifier.processor)
    mean, std = (torch.tensor(values, device=classifier.device).view(1, -1, 1, 1) for values in (mean, std))
    transform = partial(make_views, processor=classifier.processor, views=views, seed=settings.seed)
    # A model sees about as many images at once as without corruptions.
    at_once, right = max(1, settings.batch_size // len(views)), []
    title = f"{len(names)} corruptions"
    for start, pixels in zip(range(0, len(labels), at_once), _load(images, transform, at_once, settings, title)):
        true = torch.from_numpy(labels[start : start + at_once]).repeat_interleave(len(views))
        batches = zip(pixels.flatten(0, 1).split(settings.batch_size), true.split(settings.batch_size))
        for some, classes in batches:
            normalised = (some.to(classifier.device).float() / 255 - mean) / std
            right.append(classifier(normalised).argmax(dim=-1).cpu() == classes)
    right = torch.cat(right).view(len(labels), len(names), len(severities)).double().numpy()
    wrong, clean = 1 - right, 1.0 - is_right
    total = wrong.mean(axis=(1, 2))
    columns = [right.reshape(len(labels), -1), wrong.mean(axis=2), 1 - wrong.mean(axis=1)]
    columns.append(np.stack([total, clean, total - clean], axis=1))
    intervals = iter(mean_intervals(np.concatenate(columns, axis=1), settings.resamples, settings.seed))

    def take(count: int) -> list[dict]:
        return [next(intervals)._asdict() for _ in range(count)]

    accuracies, errors = [take(len(severities)) for _ in names], take(len(names))
    by_severity, (corrupted, without, added) = take(len(severities)), take(3)
    return {
        "severities": list(severities),
        "parameters": name_parameters(min(size)),
        "mean_corruption_error": corrupted,
        "clean_error": without,
        "added_error": added,
        "accuracy_by_severity": by_severity,
        "corruptions": [
            {"name": name, "group": CORRUPTIONS[name].group, "error": error, "accuracy": accuracy}
            for name, error, accuracy in zip(names, errors, accuracies)
        ],
    }


def make_views(
    images: list[PIL.Image.Image], processor: BaseImageProcessor, views: Sequence[tuple[str, int]], seed: int
) -> Tensor:
    """RGB images of any size -> 8-bit pixels (B, V, C, H, W) of each under each corruption, at the model's size.

    An image is resized and cropped by the processor, and what that makes of its colours is taken back.
    """
    arrays = show(processor, images)
    corrupted = [[corrupt(pixels, name, severity, seed) for name, severity in views] for pixels in arrays]
    return torch.from_numpy(np.array(corrupted)).permute(0, 1, 4, 2, 3)


def show(processor: BaseImageProcessor, images: list[PIL.Image.Image]) -> list[np.ndarray]:
    """RGB images as the model sees them, 8-bit (H, W, C), before they are normalised."""
    _, mean, std = read_processor(processor)
    return to_arrays(processor_transform(processor)(images), mean, std)


def draw_mistakes(classifier: Classifier, images: Dataset, labels: np.ndarray, logits: np.ndarray) -> Figure | None:
    """The images that the model is most sure of and wrong about; None if it is wrong about none."""
    predicted, sureness = logits.argmax(axis=-1), confidences(logits)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-sureness[wrong], kind="stable")][:NUM_MISTAKES]
    if not len(worst):
        return None
    names = classifier.label_names
    rows = [
        (show(classifier.processor, [image])[0], names[labels[row]], names[predicted[row]], sureness[row])
        for row, image in zip(worst, read_images(images, worst))
    ]
    return plot_predictions({"most sure and wrong: what it says, how surely, and what it is": rows})


def draw_corruptions(classifier: Classifier, images: Dataset, settings: Settings) -> Figure:
    """The first image under each corruption and severity."""
    (pixels,) = show(classifier.processor, list(read_images(images, [0])))
    corrupted = {
        name: [corrupt(pixels, name, severity, settings.seed) for severity in settings.severities]
        for name in settings.corruptions
    }
    return plot_corruptions(pixels, corrupted, settings.severities)


def read_images(images: Dataset, rows: Sequence[int]) -> Iterator[PIL.Image.Image]:
    encoded = images.cast_column(IMAGE, Image(decode=False))
    return (decode(encoded[int(row)][IMAGE]) for row in rows)


def _load(images: Dataset, transform: Callable, batch_size: int, settings: Settings, title: str) -> Iterator[Tensor]:
    """Batches of what a transform makes of the images, in their order, with a progress bar."""
    rows = with_transform(images.select_columns([IMAGE, LABEL]), transform)
    loader = DataLoader(rows, batch_size, num_workers=settings.num_workers, collate_fn=default_data_collator)
    with tqdm(total=len(images), desc=title, unit="image", leave=False) as progress:
        for batch in loader:
            yield batch["pixel_values"]
            progress.update(len(batch["pixel_values"]))
