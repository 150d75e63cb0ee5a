"""Random numbers of which every image has a stream of its own, wherever and beside whatever it is augmented."""

import math
from collections.abc import Sequence
from zlib import crc32

import torch
from scipy.special import betaincinv
from torch import Tensor


# Constants of SplitMix64 (https://doi.org/10.1145/2714064.2660195, figure 16) as signed integers, since PyTorch has no
# others to multiply and shift.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class Draws:
    """Random numbers for the images of a batch.

    What an image gets depends on its key and on how often was drawn before, and on nothing else: not on the images
    beside it, on the process or worker that prepares it, or on what was drawn before a run was interrupted.

    Args:
        keys: (B,), whole numbers; see `of`.
    """

    def __init__(self, keys: Tensor):
        self.keys, self.count = keys, 0

    @classmethod
    def of(cls, seed: int, numbers: Tensor | Sequence[int], purpose: str) -> "Draws":
        """Of images that a run knows by `numbers` (B,), for one purpose out of several."""
        stream = torch.tensor(seed) * _STEP + crc32(purpose.encode())
        return cls(_scramble(_scramble(torch.as_tensor(numbers)) + stream))

    @classmethod
    def any(cls, count: int) -> "Draws":
        """Of `count` images, by keys from PyTorch's own generator."""
        return cls(torch.randint(2**62, (count,)))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, chosen: Tensor) -> "Draws":
        """Of some of the images, by a mask (B,), to draw from once and no more."""
        draws = Draws(self.keys[chosen])
        draws.count = self.count
        return draws

    def _bits(self, *shape: int, device: torch.device | None = None) -> Tensor:
        self.count += 1
        places = torch.arange(math.prod(shape), device=device)
        streams = _scramble(self.keys + torch.tensor(self.count) * _STEP).to(places.device)
        return _scramble(streams[:, None] + places * _STEP).view(len(self), *shape)

    def rand(self, *shape: int, device: torch.device | None = None) -> Tensor:
        """Evenly distributed from 0 to below 1: (B, *shape)."""
        return _shift(self._bits(*shape, device=device), 40).float() / 2**24

    def randn(self, *shape: int, device: torch.device | None = None) -> Tensor:
        """Normally distributed: (B, *shape)."""
        radius, angle = 1 - self.rand(*shape, device=device), self.rand(*shape, device=device)
        return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()

    def integers(self, low: int, high: int) -> Tensor:
        """From `low` to below `high`: (B,)."""
        return low + _shift(self._bits(), 1).remainder(high - low)

    def beta(self, alpha: float) -> Tensor:
        """From a symmetric beta distribution: (B,)."""
        return torch.from_numpy(betaincinv(alpha, alpha, self.rand().double().numpy())).float()


def _shift(values: Tensor, bits: int) -> Tensor:
    """To the right, with zeros coming in from the left."""
    return (values >> bits) & (2 ** (64 - bits) - 1)


def _scramble(values: Tensor) -> Tensor:
    values = (values ^ _shift(values, 30)) * _FIRST
    values = (values ^ _shift(values, 27)) * _SECOND
    return values ^ _shift(values, 31)
