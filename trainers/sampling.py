"""In which order training images come, and how often: samplers that give every process the same order."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Indices that depend on the seed and the epoch alone, so that processes agree and a resumed run goes on."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)


class RepeatedAugmentationSampler(EpochSampler):
    """Each image several times in a batch, and accordingly fewer images in an epoch of the same length.

    https://arxiv.org/abs/1901.09335, as DeiT uses it (https://arxiv.org/abs/2012.12877, section 6).
    """

    def __init__(self, length: int, repeats: int, seed: int):
        super().__init__(length, seed)
        self.repeats = repeats

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.length, generator=self.generator())
        yield from order.repeat_interleave(self.repeats)[: self.length].tolist()


class ClassBalancedSampler(EpochSampler):
    """Every class equally often, however many images it has."""

    def __init__(self, labels: Sequence[int], seed: int):
        super().__init__(len(labels), seed)
        labels = torch.as_tensor(labels)
        self.weights = 1.0 / torch.bincount(labels)[labels].double()

    def __iter__(self) -> Iterator[int]:
        yield from torch.multinomial(self.weights, self.length, replacement=True, generator=self.generator()).tolist()
