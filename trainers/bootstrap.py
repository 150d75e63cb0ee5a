"""Confidence intervals of a classifier's figures: 95 % percentile bootstrap over the images.

Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter 13: images are drawn again with replacement, the
figures are computed of each draw, and the interval holds the middle 95 % of them. It says how far figures would move
with other images of the same kind, not with another training seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainers.metrics import METRICS, calibration_bin, confidences, negative_log_likelihoods


COVERAGE = 0.95
IMAGES_AT_ONCE = 2**24  # draws of them, which are counted together


class Interval(NamedTuple):
    """A figure of all images, and the middle 95 % of what draws of them give."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcomes:
    """All that the metrics want to know of N images of L classes; a few numbers an image instead of its L logits.

    Attributes:
        num_classes: L.
        labels: True classes (N,).
        predicted: Likeliest classes (N,).
        is_right: Whether these are the true ones (N,).
        confidence: Their probabilities (N,).
        bins: Of the calibration error, where these lie (N,).
        losses: Negative log likelihoods of the true classes (N,).
        in_top5: Whether the true class is among the five likeliest (N,); None up to five classes.
    """

    num_classes: int
    labels: np.ndarray
    predicted: np.ndarray
    is_right: np.ndarray
    confidence: np.ndarray
    bins: np.ndarray
    losses: np.ndarray
    in_top5: np.ndarray | None

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray) -> "Outcomes":
        """Logits (N, L) and true classes (N,)."""
        parts = [cls._of(*part) for part in zip(_split(logits), _split(labels))]
        columns = (np.concatenate(column) if column[0] is not None else None for column in zip(*parts))
        return cls(logits.shape[1], labels, *columns)

    @staticmethod
    def _of(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray | None, ...]:
        predicted = logits.argmax(axis=-1)
        in_top5 = None
        if logits.shape[1] > 5:
            in_top5 = (np.argpartition(logits, -5, axis=-1)[:, -5:] == labels[:, None]).any(axis=-1)
        confidence = confidences(logits)
        bins, losses = calibration_bin(confidence), negative_log_likelihoods(logits, labels)
        return predicted, predicted == labels, confidence, bins, losses, in_top5


def _split(values: np.ndarray, rows: int = 4096) -> Iterator[np.ndarray]:
    """Parts of a large array, so that double precision of it is never there at once."""
    return (values[start : start + rows] for start in range(0, len(values), rows))


def draw_images(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `count` images is drawn, in parts (R, N) of all resamples; the same for the same seed."""
    generator = np.random.default_rng(seed)
    rows = max(1, IMAGES_AT_ONCE // count)
    for start in range(0, resamples, rows):
        draws = (generator.integers(count, size=count) for _ in range(min(rows, resamples - start)))
        yield np.stack([np.bincount(draw, minlength=count) for draw in draws])


def middle(samples: np.ndarray) -> np.ndarray:
    """The ends of the middle 95 % of resampled figures, (R, ...) -> (2, ...), those that are nan left out."""
    outside = (1 - COVERAGE) / 2
    return np.nanquantile(samples, [outside, 1 - outside], axis=0)


def mean_intervals(values: np.ndarray, resamples: int, seed: int) -> list[Interval]:
    """Of the mean over images, of each column: (N, K) -> K intervals. All columns see the same draws."""
    values = np.asarray(values, dtype=np.float64)
    draws = draw_images(len(values), resamples, seed)
    samples = np.concatenate([counts.astype(np.float64) @ values / len(values) for counts in draws])
    return [Interval(*map(float, each)) for each in zip(values.mean(axis=0), *middle(samples))]


def metric_intervals(
    logits: np.ndarray, labels: np.ndarray, resamples: int, seed: int
) -> tuple[dict[str, Interval], list[Interval]]:
    """The single figures by their names, as `trainers.metrics` computes them, and the recall of each class.

    Of a calibration error the interval lies somewhat high, and with few images may lie above the figure: draws have
    noise of their own in their bins, which counts as error.
    """
    outcomes = Outcomes.of(logits, labels)
    figures, recalls = [], []
    for counts in draw_images(len(labels), resamples, seed):
        for weights in counts:
            of_draw, recall = weighted_metrics(outcomes, weights)
            figures.append(of_draw)
            recalls.append(recall)
    intervals = {}
    for name in figures[0]:
        low, high = middle(np.array([each[name] for each in figures]))
        intervals[name] = Interval(METRICS[name](logits, labels), float(low), float(high))
    recall = METRICS["per_class_recall"](logits, labels)
    known = np.flatnonzero(~np.isnan(recall))
    ends = np.full((2, len(recall)), np.nan)
    ends[:, known] = middle(np.stack(recalls)[:, known])
    return intervals, [Interval(*map(float, each)) for each in zip(recall, *ends)]


def weighted_metrics(outcomes: Outcomes, weights: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """What the metrics would be if each image were there as often as its weight (N,) says, and recall by class (L,).

    The same figures as those of `trainers.metrics`, from what is known of each image instead of from its logits: a
    thousand times over, these would take hours.
    """
    weights, total, size = weights.astype(np.float64), weights.sum(), outcomes.num_classes
    images = np.bincount(outcomes.labels, weights, minlength=size)
    taken = np.bincount(outcomes.predicted, weights, minlength=size)
    hits = np.bincount(outcomes.labels, weights * outcomes.is_right, minlength=size)
    recall = np.divide(hits, images, out=np.full(size, np.nan), where=images > 0)
    occurring = images + taken > 0
    gaps = np.bincount(outcomes.bins, weights * (outcomes.confidence - outcomes.is_right))
    figures = {
        "loss": float(weights @ outcomes.losses / total),
        "accuracy": float(hits.sum() / total),
        "balanced_accuracy": float(np.nanmean(recall)),
        "macro_f1": float((2 * hits[occurring] / (images + taken)[occurring]).mean()),
        "expected_calibration_error": float(np.abs(gaps).sum() / total),
    }
    if outcomes.in_top5 is not None:
        figures["top5_accuracy"] = float(weights @ outcomes.in_top5 / total)
    return figures, recall
