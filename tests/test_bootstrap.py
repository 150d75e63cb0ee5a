"""Bootstrap intervals against scipy's, against a closed form, and by how often they hold the truth."""

import numpy as np
import pytest
import scipy.stats

from trainers.bootstrap import Outcomes, draw_images, mean_intervals, metric_intervals, weighted_metrics
from trainers.metrics import METRICS


def make_predictions(count: int = 400, classes: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right more often than not; the last class has no images."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes - 1, count)
    logits = generator.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 1.5
    return logits, labels


@pytest.mark.parametrize("classes", [3, 8, 30])
def test_weights_stand_for_images_that_are_there_as_often(classes):
    logits, labels = make_predictions(classes=classes)
    outcomes, generator = Outcomes.of(logits, labels), np.random.default_rng(1)
    for _ in range(20):
        weights = generator.poisson(0.3, len(labels))  # some classes are gone
        again = np.repeat(np.arange(len(labels)), weights)
        figures, recall = weighted_metrics(outcomes, weights)
        assert ("top5_accuracy" in figures) == (classes > 5)
        for name, value in figures.items():
            assert value == pytest.approx(METRICS[name](logits[again], labels[again]), rel=1e-12), name
        np.testing.assert_array_equal(recall, METRICS["per_class_recall"](logits[again], labels[again]))


def test_figures_are_those_of_the_metrics_themselves():
    logits, labels = make_predictions()
    figures, recalls = metric_intervals(logits, labels, resamples=50, seed=0)
    assert set(figures) == METRICS.keys() - {"per_class_recall", "confusion_matrix"}
    for name, interval in figures.items():
        assert interval.value == METRICS[name](logits, labels)
        assert interval.low < interval.high
    np.testing.assert_array_equal([each.value for each in recalls], METRICS["per_class_recall"](logits, labels))
    assert np.isnan(recalls[-1]).all()  # nobody knows how well a class without images is recognised


def test_draws_are_the_same_for_a_seed_however_they_are_split(monkeypatch):
    whole = np.concatenate(list(draw_images(50, 20, seed=3)))
    monkeypatch.setattr("trainers.bootstrap.IMAGES_AT_ONCE", 170)
    parts = list(draw_images(50, 20, seed=3))
    assert len(parts) == 7
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (whole.sum(axis=1) == 50).all()
    assert (np.concatenate(list(draw_images(50, 20, seed=4))) != whole).any()


def test_an_interval_of_accuracy_has_a_closed_form():
    """A draw's number of hits is binomial."""
    logits, labels = make_predictions(500)
    figures, _ = metric_intervals(logits, labels, resamples=4000, seed=0)
    value, low, high = figures["accuracy"]
    expected = scipy.stats.binom.ppf([0.025, 0.975], 500, value) / 500
    np.testing.assert_allclose([low, high], expected, atol=0.005)


@pytest.mark.parametrize("name", ["loss", "balanced_accuracy", "macro_f1", "expected_calibration_error"])
def test_intervals_are_those_of_scipy(name):
    logits, labels = make_predictions(300)
    ours = metric_intervals(logits, labels, resamples=3000, seed=0)[0][name]
    theirs = scipy.stats.bootstrap(
        (np.arange(300),),
        lambda rows: METRICS[name](logits[rows], labels[rows]),
        n_resamples=600,
        vectorized=False,
        method="percentile",
        random_state=np.random.default_rng(0),  # `rng` since scipy 1.15, which takes both
    ).confidence_interval
    width = ours.high - ours.low
    np.testing.assert_allclose([ours.low, ours.high], theirs, atol=0.12 * width)


def test_the_truth_lies_in_95_of_100_intervals():
    generator, hits = np.random.default_rng(0), 0
    for seed in range(400):
        values = generator.random((200, 1)) < 0.8
        (interval,) = mean_intervals(values, resamples=400, seed=seed)
        hits += interval.low <= 0.8 <= interval.high
    assert 0.91 <= hits / 400 <= 0.98


def test_columns_see_the_same_draws():
    generator = np.random.default_rng(0)
    values = generator.random(300)
    one, other, difference = mean_intervals(np.stack([values, values + 1, np.ones(300)], axis=1), 200, seed=0)
    assert other.low == pytest.approx(one.low + 1)
    assert difference == (1, 1, 1)
