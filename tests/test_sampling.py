"""Orders: how often each image comes, when, and in which process."""

from collections import Counter

import pytest
import torch

from trainers.sampling import BalancedOrder, EpochBatches, RandomOrder, RepeatedOrder


ORDERS = {
    "random": lambda: RandomOrder(100, seed=1),
    "repeated": lambda: RepeatedOrder(100, 3, seed=1),
    "balanced": lambda: BalancedOrder([0] * 90 + [1] * 10, seed=1),
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_follow_from_seed_and_epoch_and_no_number_comes_twice(name):
    one, two = ORDERS[name](), ORDERS[name]()
    epochs = [one.numbers(epoch) for epoch in range(4)]
    assert torch.equal(two.numbers(2), epochs[2])
    assert all(len(numbers) == 100 for numbers in epochs)
    assert len(set(torch.cat(epochs).tolist())) == 400
    assert not torch.equal(epochs[0] % 100, epochs[1] % 100)


def test_every_image_comes_once_in_an_epoch():
    assert sorted((RandomOrder(101, seed=2).numbers(3) % 101).tolist()) == list(range(101))


@pytest.mark.parametrize("length", [96, 99])
def test_repeats_come_together_but_not_beside_each_other(length):
    images = (RepeatedOrder(length, 3, seed=0).numbers(0) % length).tolist()
    assert len(images) == length
    counts = Counter(images)
    assert sorted(counts.values())[2:] == [3] * (len(counts) - 2)
    assert all(len(set(images[start : start + 6])) == 2 for start in range(0, length - 6, 6))
    assert all(one != two for one, two in zip(images[::2], images[1::2]))


def test_classes_come_equally_often():
    labels = [0] * 900 + [1] * 90 + [2] * 10
    order, drawn = BalancedOrder(labels, seed=0), Counter()
    for epoch in range(5):
        drawn.update(labels[number % 1000] for number in order.numbers(epoch).tolist())
    assert all(count == pytest.approx(5000 / 3, rel=0.08) for count in drawn.values())


SHARED = [(64, 16, 2), (90, 16, 3), (41, 8, 2), (66, 8, 4), (50, 1, 4), (50, 3, 2), (47, 15, 2)]


@pytest.mark.parametrize(("length", "batch_size", "world"), SHARED)
def test_processes_share_the_batches_of_one(length, batch_size, world):
    order = RandomOrder(length, seed=0)
    alone = EpochBatches(order, batch_size * world)
    shares = [EpochBatches(order, batch_size, rank, world) for rank in range(world)]
    for batches in (alone, *shares):
        batches.set_epoch(2)
        assert len(list(batches)) == len(batches) == len(alone)
    for whole, *parts in zip(alone, *shares):
        together = [number for part in parts for number in part]
        assert together == whole or (len(whole) < 2 * world and set(together) == set(whole))
        assert all(1 <= len(part) <= batch_size for part in parts)
        assert batch_size % 2 or all(len(part) % 2 == 0 for part in parts[:-1])
