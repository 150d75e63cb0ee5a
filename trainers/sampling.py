"""Which training images come when: orders that follow from the seed and the epoch, and each process's share of them.

An order consists of *numbers*. A number stands for one sight of one image: `number % length` is the image, and no
number comes twice in a run, so that all that is drawn at random for a sight can follow from its number
(`trainers.draws`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class RandomOrder:
    """Every image once in an epoch."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed

    def numbers(self, epoch: int) -> Tensor:
        """(length,)"""
        images = self.draw(torch.Generator().manual_seed(self.seed + 1_000_003 * epoch))
        return images + self.length * (epoch * self.length + count_earlier(images))

    def draw(self, generator: torch.Generator) -> Tensor:
        """The images of an epoch: (length,)"""
        return torch.randperm(self.length, generator=generator)


class RepeatedOrder(RandomOrder):
    """Each image several times in a row, and accordingly fewer images in an epoch of the same length.

    https://arxiv.org/abs/1901.09335, as DeiT uses it (https://arxiv.org/abs/2012.12877, section 6). Two images take
    turns, so that neighbours, which are mixed, are not the same image.
    """

    def __init__(self, length: int, repeats: int, seed: int):
        super().__init__(length, seed)
        self.repeats = repeats

    def draw(self, generator: torch.Generator) -> Tensor:
        pairs = super().draw(generator)[: self.length - self.length % 2].view(-1, 2)
        return pairs.repeat(1, self.repeats).flatten()[: self.length]


class BalancedOrder(RandomOrder):
    """Every class equally often, however many images it has."""

    def __init__(self, labels: Sequence[int], seed: int):
        super().__init__(len(labels), seed)
        labels = torch.as_tensor(labels)
        self.weights = 1.0 / torch.bincount(labels)[labels].double()

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.weights, self.length, replacement=True, generator=generator)


def count_earlier(images: Tensor) -> Tensor:
    """How often each image came before in the same epoch: 5, 7, 5 -> 0, 0, 1."""
    places = images.argsort(stable=True)
    sorted_images = images[places]
    earlier = torch.empty_like(images)
    earlier[places] = torch.arange(len(images)) - torch.searchsorted(sorted_images, sorted_images)
    return earlier


class EpochBatches:
    """A process's share of every batch of an epoch, for a data loader.

    A batch of all processes holds the same images as one of a single process that is as large. The last one, which may
    be smaller, is divided as well, so that every image is seen once; only if it holds less than each process needs,
    some of its images come twice.

    Args:
        order: Of the images.
        batch_size: Images of each process in a batch. If it is even, neighbours, which may be mixed, stay together.
        rank, world: The number of this process, and how many there are.
    """

    def __init__(self, order: RandomOrder, batch_size: int, rank: int = 0, world: int = 1):
        self.order, self.batch_size, self.rank, self.world, self.epoch = order, batch_size, rank, world, 0

    def __len__(self) -> int:
        return -(-self.order.length // (self.batch_size * self.world))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        together = 1 if self.batch_size % 2 else 2
        for batch in self.order.numbers(self.epoch).split(self.batch_size * self.world):
            yield share(batch, self.rank, self.world, together).tolist()


def share(batch: Tensor, rank: int, world: int, together: int = 1) -> Tensor:
    """What a process gets of a batch, in pieces of so many images that stay together."""
    if world > 1 and len(batch) < together * world:
        batch = batch.repeat(together * world)[: together * world]
    pieces = batch.split(together)
    return torch.cat(pieces[len(pieces) * rank // world : len(pieces) * (rank + 1) // world])
