"""Figures of merit against counts by hand and scikit-learn's; as metrics of `evaluate`, also in a fresh process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score, top_k_accuracy_score
from transformers import EvalPrediction

from model_cards.rendering import METRIC_TITLES
from trainers import metrics
from trainers.metrics import (
    METRICS,
    accuracy,
    balanced_accuracy,
    compute_metrics,
    count_confusions,
    expected_calibration_error,
    load_metric,
    macro_f1,
    per_class_recall,
    top5_accuracy,
)


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


@pytest.fixture
def predictions() -> tuple[np.ndarray, np.ndarray]:
    """Logits of 300 images that are right more often than not, of 9 classes; the last has no images."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 8, 300)
    logits = generator.normal(size=(300, 9)).astype(np.float32)
    logits[np.arange(300), labels] += 1.5
    return logits, labels


# --------------------------------------------------------------------------------------------------------- functions


def test_accuracies_and_macro_f1():
    assert accuracy(LOGITS, LABELS) == pytest.approx(2 / 5)
    assert top5_accuracy(LOGITS, LABELS) == pytest.approx(3 / 5)
    # Classes 0, 1, 2, 3, 6 occur: F1 of 0 is 2 * 1 / (2 + 2), of 1 is 2 * 1 / (1 + 2), of the others 0.
    assert macro_f1(LOGITS, LABELS) == pytest.approx((1 / 2 + 2 / 3) / 5)


def test_recall_is_of_the_classes_that_have_images():
    nan = np.nan
    np.testing.assert_array_equal(per_class_recall(LOGITS, LABELS), [1 / 2, 1 / 2, nan, 0, nan, nan, nan])
    assert balanced_accuracy(LOGITS, LABELS) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_they_agree_with_scikit_learn(predictions):
    logits, labels = predictions
    predicted = logits.argmax(axis=-1)
    expected = recall_score(labels, predicted, labels=range(9), average=None, zero_division=np.nan)
    np.testing.assert_allclose(per_class_recall(logits, labels), expected)
    assert balanced_accuracy(logits, labels) == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert top5_accuracy(logits, labels) == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(9)))


def two_class_logits(confidences: list[float]) -> np.ndarray:
    """Logits of images that are taken for class 0 with these probabilities."""
    confidences = np.array(confidences)
    return np.log(np.stack([confidences, 1 - confidences], axis=-1))


def test_calibration_error_of_confidences_by_hand():
    # Ten images in one bin of which six are right, five in another that are all right.
    logits, labels = two_class_logits([0.82] * 10 + [0.62] * 5), np.array([0] * 6 + [1] * 4 + [0] * 5)
    assert expected_calibration_error(logits, labels) == pytest.approx((10 * (0.82 - 0.6) + 5 * (1 - 0.62)) / 15)
    # Inside a bin, 9/15 to 10/15, what is too sure and what is too unsure cancel out.
    assert expected_calibration_error(two_class_logits([0.61, 0.64]), np.array([0, 1])) == pytest.approx(0.125)
    # In two bins they do not.
    error = expected_calibration_error(two_class_logits([0.61, 0.68]), np.array([0, 1]))
    assert error == pytest.approx((0.39 + 0.68) / 2)
    # A bin has its upper edge: 1/3 lies in another than 0.35.
    logits = np.log([[1 / 3, 1 / 3, 1 / 3], [0.35, 0.34, 0.31]])
    assert expected_calibration_error(logits, np.array([0, 1])) == pytest.approx((2 / 3 + 0.35) / 2)
    # However far logits lie apart, and where a class is ruled out.
    logits = np.array([[1e4, -1e4], [0, -np.inf], [-1e4, 1e4]], dtype=np.float32)
    assert expected_calibration_error(logits, np.array([0, 0, 0])) == pytest.approx(1 / 3)


def test_calibration_error_is_that_of_the_definition(predictions):
    logits, labels = predictions
    probabilities = torch.from_numpy(logits).double().softmax(dim=-1).numpy()
    confidence, right = probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels
    expected = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    # Nearer than single precision would come.
    assert expected_calibration_error(logits, labels) == pytest.approx(expected, rel=1e-12)


def test_a_diverged_model_has_no_calibration_error():
    # Evaluation has to get past it: that training diverged is the Trainer's to say.
    computed = compute_metrics(EvalPrediction(np.where(LOGITS == 9, np.nan, LOGITS), LABELS))
    assert np.isnan(computed["expected_calibration_error"])


def test_confusions_have_true_classes_down():
    matrix = count_confusions(LOGITS, LABELS)
    assert matrix.shape == (7, 7)
    assert matrix[1, 0] == matrix[1, 1] == matrix[3, 2] == matrix[0, 6] == matrix[0, 0] == 1
    assert matrix.sum() == 5


def test_the_trainer_gets_single_numbers():
    computed = compute_metrics(EvalPrediction(LOGITS, LABELS))
    assert set(computed) == {
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "expected_calibration_error",
        "top5_accuracy",
    }
    # Each has a row in the model card.
    assert {*computed, "loss"} <= METRIC_TITLES.keys()
    for name, value in computed.items():
        assert type(value) is float
        assert value == METRICS[name](LOGITS, LABELS)


def test_five_classes_have_no_top5():
    assert "top5_accuracy" not in compute_metrics(EvalPrediction(LOGITS[:, :5], LABELS))
    with pytest.raises(ValueError, match="top-5 accuracy needs more than five classes, not 5"):
        top5_accuracy(LOGITS[:, :5], LABELS)


MISFITS = [
    (LABELS, LABELS, r"logits of shape \(5,\) must be \(images, classes\)"),
    (LOGITS[:0], LABELS[:0], r"logits of shape \(0, 7\) must be \(images, classes\), with one of each at least"),
    (LOGITS, LABELS[:4], r"labels of shape \(4,\) must be \(5,\): one for each row of the logits"),
    (LOGITS, LABELS[:, None], r"labels of shape \(5, 1\) must be \(5,\)"),
    (LOGITS, LABELS / 2, "labels of dtype float64 must be integers"),
    (LOGITS, LABELS + 5, r"label 8 is outside 0\.\.6 \(1 of 5 labels\)"),
    (LOGITS, LABELS - 1, r"label -1 is outside 0\.\.6 \(2 of 5 labels\)"),
]


@pytest.mark.parametrize("name", METRICS)
def test_what_does_not_fit_is_refused(name):
    for logits, labels, message in MISFITS:
        with pytest.raises(ValueError, match=message):
            METRICS[name](logits, labels)


# -------------------------------------------------------------------------------------------------- evaluate modules


@pytest.mark.parametrize("name", METRICS)
def test_evaluate_loads_each_by_its_name(name, predictions):
    logits, labels = predictions
    metric = evaluate.load(metrics.__file__, name)
    computed = metric.compute(predictions=logits, references=labels)
    assert list(computed) == [name]
    np.testing.assert_array_equal(computed[name], METRICS[name](logits, labels))
    # In batches, as lists, tensors and one by one.
    metric = load_metric(name)
    metric.add_batch(predictions=logits[:100], references=labels[:100])
    metric.add_batch(predictions=logits[100:200].tolist(), references=labels[100:200].tolist())
    metric.add_batch(predictions=torch.from_numpy(logits[200:299]), references=torch.from_numpy(labels[200:299]))
    metric.add(prediction=logits[299], reference=labels[299])
    np.testing.assert_array_equal(metric.compute()[name], METRICS[name](logits, labels))


def test_a_metric_of_evaluate_refuses_what_does_not_fit_and_goes_on():
    metric = load_metric("accuracy")
    metric.add_batch(predictions=LOGITS, references=LABELS)
    for logits, labels, message in MISFITS:
        with pytest.raises(ValueError, match=message):
            metric.add_batch(predictions=logits, references=labels)
    assert metric.compute() == {"accuracy": pytest.approx(2 / 5)}
    metric.add(prediction=[0.0, 1.0], reference=2)
    with pytest.raises(ValueError, match=r"label 2 is outside 0\.\.1"):
        metric.compute()
    assert metric.compute(predictions=LOGITS, references=LABELS) == {"accuracy": pytest.approx(2 / 5)}


@pytest.mark.parametrize("name", [None, "acuracy"])
def test_a_name_that_is_no_metric_is_refused(name):
    with pytest.raises(ValueError, match=f"there is no metric '{name or 'default'}': give one of accuracy, top5_acc"):
        load_metric(name)


LOAD_ALL = """
import json, socket, sys

def refuse(*arguments):
    raise AssertionError(f"the network was asked for: {arguments}")

socket.socket.connect = socket.getaddrinfo = refuse
sys.modules["trainers"] = None  # cannot be imported

import evaluate
import numpy as np

path, logits, labels, names = json.load(sys.stdin)
computed = {}
for name in names:
    value = evaluate.load(path, name).compute(predictions=logits, references=labels)[name]
    computed[name] = np.nan_to_num(value, nan=-1).tolist()
print(json.dumps(computed))
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["checkout", "copy"])
def test_they_load_in_a_fresh_process_without_network_or_package(place, tmp_path):
    path = Path(metrics.__file__)
    if place == "copy":
        path = Path(shutil.copytree(path.parent, tmp_path / "site" / "trainers")) / path.name
    home, folder = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir(), folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "PYTHON"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", LOAD_ALL],
        input=json.dumps([str(path), LOGITS.tolist(), LABELS.tolist(), list(METRICS)]),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    expected = {name: np.nan_to_num(metric(LOGITS, LABELS), nan=-1).tolist() for name, metric in METRICS.items()}
    assert json.loads(ended.stdout.splitlines()[-1]) == expected
