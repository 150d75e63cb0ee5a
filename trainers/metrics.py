"""Figures of merit of a classifier, from logits (B, L) and the true classes (B,).

As functions, as what the Trainer asks for, and as metrics of the `evaluate` library. All raise ValueError if the shapes
do not fit or a label is no class of the logits.

`evaluate` copies this file, runs the copy and takes the first metric class that it finds there: so nothing else of the
package is imported here, and no class of that library by its name.
"""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import confusion_matrix, f1_score
from transformers import EvalPrediction


CALIBRATION_BINS = 15


def _check_predictions(logits: np.ndarray, labels: np.ndarray) -> None:
    """Refuse what would give a figure without a meaning, as numpy's broadcasting does of labels (B, 1)."""
    if logits.ndim != 2 or logits.size == 0:
        raise ValueError(f"logits of shape {logits.shape} must be (images, classes), with one of each at least")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels of shape {labels.shape} must be {logits.shape[:1]}: one for each row of the logits")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels of dtype {labels.dtype} must be integers, the indices of classes")
    outside = labels[(labels < 0) | (labels >= logits.shape[1])]
    if outside.size:
        raise ValueError(
            f"label {outside[0]} is outside 0..{logits.shape[1] - 1} ({outside.size} of {labels.size} labels)"
        )


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose likeliest class is the true one."""
    _check_predictions(logits, labels)
    return float((logits.argmax(axis=-1) == labels).mean())


def top5_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose true class is among the five likeliest.

    Raises:
        ValueError: also if there are no more than five classes, where it would always be.
    """
    _check_predictions(logits, labels)
    if logits.shape[-1] <= 5:
        raise ValueError(f"top-5 accuracy needs more than five classes, not {logits.shape[-1]}")
    top5 = np.argpartition(logits, -5, axis=-1)[:, -5:]
    return float((top5 == labels[:, None]).any(axis=-1).mean())


def macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 of the classes that occur, in labels or in predictions."""
    _check_predictions(logits, labels)
    return float(f1_score(labels, logits.argmax(axis=-1), average="macro", zero_division=0))


def per_class_recall(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of each class's images that are recognised, (L,); nan for a class without images."""
    _check_predictions(logits, labels)
    num_classes = logits.shape[-1]
    images = np.bincount(labels, minlength=num_classes)
    recognised = np.bincount(labels[logits.argmax(axis=-1) == labels], minlength=num_classes)
    return np.divide(recognised, images, out=np.full(num_classes, np.nan), where=images > 0)


def balanced_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean recall of the classes that have images."""
    return float(np.nanmean(per_class_recall(logits, labels)))


def negative_log_likelihoods(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each image's true class, (N,), in float64."""
    _check_predictions(logits, labels)
    logits = logits.astype(np.float64)
    largest = logits.max(axis=-1)
    chosen = np.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return np.log(np.exp(logits - largest[:, None]).sum(axis=-1)) + largest - chosen


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over images of what cross-entropy is trained to lower, in nats."""
    return float(negative_log_likelihoods(logits, labels).mean())


def confidences(logits: np.ndarray) -> np.ndarray:
    """Probability of each image's likeliest class, (N,), in float64."""
    logits = logits.astype(np.float64)
    return 1 / np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1)


def calibration_bin(confidence: np.ndarray) -> np.ndarray:
    """Number of the bin, from 0, that a confidence lies in; each has its upper edge."""
    inner_edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    return np.digitize(confidence, inner_edges, right=True)


def calibration_bins(logits: np.ndarray, labels: np.ndarray) -> list[tuple[int, float, float]]:
    """Images, mean confidence and accuracy in each bin of confidence of equal width that is not empty.

    https://arxiv.org/abs/1706.04599, section 2. Confidence is the probability of the likeliest class.
    """
    _check_predictions(logits, labels)
    confidence = confidences(logits)
    bins = calibration_bin(confidence)
    images, is_right = np.bincount(bins), logits.argmax(axis=-1) == labels
    sums = (np.bincount(bins, weights=confidence), np.bincount(bins, weights=is_right))
    filled = np.flatnonzero(images)
    return [(int(images[bin]), *(float(each[bin] / images[bin]) for each in sums)) for bin in filled]


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """How far confidence lies from accuracy: their mean absolute difference over the bins of `calibration_bins`."""
    bins = calibration_bins(logits, labels)
    return sum(images * abs(confidence - right) for images, confidence, right in bins) / len(labels)


def count_confusions(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images by true and predicted class: (B, L), (B,) -> (L, L)."""
    _check_predictions(logits, labels)
    return confusion_matrix(labels, logits.argmax(axis=-1), labels=np.arange(logits.shape[-1]))


SINGLE_METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "expected_calibration_error", "top5_accuracy")


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The figures that are single numbers, for the Trainer; top-5 accuracy where there are more than five classes."""
    logits, labels = prediction.predictions, prediction.label_ids
    names = [name for name in SINGLE_METRICS if name != "top5_accuracy" or logits.shape[-1] > 5]
    return {name: METRICS[name](logits, labels) for name in names}


METRICS = {
    "accuracy": accuracy,
    "top5_accuracy": top5_accuracy,
    "macro_f1": macro_f1,
    "per_class_recall": per_class_recall,
    "balanced_accuracy": balanced_accuracy,
    "expected_calibration_error": expected_calibration_error,
    "confusion_matrix": count_confusions,
    "loss": negative_log_likelihood,
}


class ClassifierMetric(evaluate.Metric):
    """One of `METRICS` by its name: `compute(predictions=logits, references=labels)` returns {name: value}."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRICS:
            raise ValueError(f"there is no metric {self.config_name!r}: give one of {', '.join(METRICS)}")
        return evaluate.MetricInfo(
            description=METRICS[self.config_name].__doc__,
            citation="",
            inputs_description="Predictions are logits (B, L), references the indices of the true classes (B,).",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def add_batch(self, *, predictions=None, references=None):
        """As in the base class; what does not fit is refused before any of it is stored."""
        predictions, references = np.asarray(predictions, dtype=np.float32), np.asarray(references)
        _check_predictions(predictions, references)
        super().add_batch(predictions=predictions, references=references)

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float | np.ndarray]:
        logits, labels = np.asarray(predictions, dtype=np.float32), np.asarray(references)
        return {self.config_name: METRICS[self.config_name](logits, labels)}


def load_metric(name: str) -> evaluate.Metric:
    """One of `METRICS`, as `evaluate.load(trainers.metrics.__file__, name)` gives it without a network.

    Raises:
        ValueError: if there is none of that name.
    """
    return evaluate.load(__file__, name)
