"""Samplers: how often each image comes, and in which order."""

from collections import Counter

import pytest

from trainers.sampling import ClassBalancedSampler, RepeatedAugmentationSampler


SAMPLERS = [lambda: RepeatedAugmentationSampler(100, 3, seed=1), lambda: ClassBalancedSampler([0] * 90 + [1] * 10, 1)]


@pytest.mark.parametrize("make", SAMPLERS)
def test_orders_depend_on_seed_and_epoch_alone(make):
    one, two = make(), make()
    assert list(one) == list(two) == list(one)
    assert len(list(one)) == len(one) == 100
    two.set_epoch(1)
    assert list(one) != list(two)
    one.set_epoch(1)
    assert list(one) == list(two)


def test_repeats_come_together():
    order = list(RepeatedAugmentationSampler(99, 3, seed=0))
    assert all(len(set(order[start : start + 3])) == 1 for start in range(0, 99, 3))
    assert len(set(order)) == 33


def test_classes_come_equally_often():
    labels = [0] * 900 + [1] * 90 + [2] * 10
    sampler = ClassBalancedSampler(labels, seed=0)
    drawn = Counter()
    for epoch in range(5):
        sampler.set_epoch(epoch)
        drawn.update(labels[index] for index in sampler)
    assert all(count == pytest.approx(5000 / 3, rel=0.08) for count in drawn.values())
