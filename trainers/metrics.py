"""Figures of merit of a classifier."""

import numpy as np
from sklearn.metrics import confusion_matrix, f1_score
from transformers import EvalPrediction


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 accuracy, top-5 accuracy where there are more than five classes, and macro F1, from logits (B, L)."""
    logits, labels = prediction.predictions, prediction.label_ids
    predicted = logits.argmax(axis=-1)
    metrics = {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }
    if logits.shape[-1] > 5:
        top5 = np.argpartition(logits, -5, axis=-1)[:, -5:]
        metrics["top5_accuracy"] = float((top5 == labels[:, None]).any(axis=-1).mean())
    return metrics


def count_confusions(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images by true and predicted class: (B, L), (B,) -> (L, L)."""
    classes = np.arange(logits.shape[-1])
    return confusion_matrix(labels, logits.argmax(axis=-1), labels=classes)
