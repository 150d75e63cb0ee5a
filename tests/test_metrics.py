"""Figures of merit against counts by hand."""

import numpy as np
import pytest
from transformers import EvalPrediction

from trainers.metrics import compute_metrics, count_confusions


# Predicted 0, 0, 1, 2, 6 with the true class at rank 1, 2, 1, 6, 7 of seven.
LABELS = np.array([0, 1, 1, 3, 0])
LOGITS = np.array(
    [
        [9, 1, 2, 3, 4, 5, 6],
        [9, 8, 2, 3, 4, 5, 6],
        [1, 9, 2, 3, 4, 5, 6],
        [4, 5, 9, 3, 6, 7, 1],
        [0, 1, 2, 3, 4, 5, 6],
    ],
    dtype=np.float32,
)


def test_accuracies_and_macro_f1():
    metrics = compute_metrics(EvalPrediction(LOGITS, LABELS))
    assert metrics["accuracy"] == pytest.approx(2 / 5)
    assert metrics["top5_accuracy"] == pytest.approx(3 / 5)
    # Classes 0, 1, 2, 3, 6 occur: F1 of 0 is 2 * 1 / (2 + 2), of 1 is 2 * 1 / (1 + 2), of the others 0.
    assert metrics["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 5)


def test_five_classes_have_no_top5():
    assert set(compute_metrics(EvalPrediction(LOGITS[:, :5], LABELS))) == {"accuracy", "macro_f1"}


def test_confusions_have_true_classes_down():
    matrix = count_confusions(LOGITS, LABELS)
    assert matrix.shape == (7, 7)
    assert matrix[1, 0] == matrix[1, 1] == matrix[3, 2] == matrix[0, 6] == matrix[0, 0] == 1
    assert matrix.sum() == 5
