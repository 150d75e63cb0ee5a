"""Mixup and CutMix: pairs of images of a batch become one image with two labels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.draws import Draws


class Mixing:
    """Pixels (B, C, H, W) and classes (B,) -> mixed pixels and class probabilities (B, L).

    Each image is mixed with its neighbour in the batch, whose order is random, by a share of its own: by Mixup
    (https://arxiv.org/abs/1710.09412) or by CutMix (https://arxiv.org/abs/1905.04899), chosen for each image where both
    are on. Neighbours stay together where a batch is divided between processes or accumulated.

    Args:
        mixup: Parameter of the beta distribution of Mixup's shares; 0 is off.
        cutmix: The same for CutMix.
        probability: Share of the images that are mixed at all.
        switch_probability: Probability of CutMix where both are on.
        num_labels: Number of classes.
        label_smoothing: Probability that is spread over all classes.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        mixup: float,
        cutmix: float,
        probability: float,
        switch_probability: float,
        num_labels: int,
        label_smoothing: float = 0.0,
    ):
        for name, value in {"mixup": mixup, "cutmix": cutmix}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be 0 or more")
        for name, value in {
            "mix_probability": probability,
            "mix_switch_probability": switch_probability,
            "label_smoothing": label_smoothing,
        }.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie between 0 and 1")
        self.alphas, self.probability = (cutmix, mixup), probability
        self.switch_probability = switch_probability if mixup and cutmix else float(cutmix > 0)
        self.num_labels, self.label_smoothing = num_labels, label_smoothing
        self.is_on = True

    def __call__(self, pixels: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        targets = smooth(F.one_hot(labels, self.num_labels).float(), self.label_smoothing)
        if not self.is_on or not any(self.alphas):
            return pixels, targets
        cut = draws.rand() < self.switch_probability
        share = torch.where(cut, *(draws.beta(alpha) if alpha else torch.ones(len(draws)) for alpha in self.alphas))
        share = share.where(draws.rand() < self.probability, 1.0)
        box = draw_boxes(share, tuple(pixels.shape[2:]), draws)
        # What is cut out is a whole number of pixels, and the labels follow it.
        share = torch.where(cut, 1 - box.float().mean(dim=(1, 2)), share)
        weight = torch.where(cut[:, None, None], (~box).float(), share[:, None, None]).to(pixels.device).unsqueeze(1)
        partner = neighbours(len(pixels)).to(pixels.device)
        share = share.to(pixels.device)
        mixed = weight * pixels + (1 - weight) * pixels[partner]
        return mixed, share[:, None] * targets + (1 - share[:, None]) * targets[partner]


def neighbours(count: int) -> Tensor:
    """Of each image of a batch the place of the one that it is mixed with: 1, 0, 3, 2, ..., and of an odd last one."""
    places = torch.arange(count)
    return torch.where((places ^ 1) < count, places ^ 1, places - 1).clamp(min=0)


def draw_boxes(share: Tensor, size: tuple[int, int], draws: Draws) -> Tensor:
    """Boxes that cover 1 - share (B,) of the image, cut off at its border: masks (B, H, W)."""
    height, width = size
    ratio = (1 - share).sqrt()
    masks = []
    for side in (height, width):
        centre, half = (draws.rand() * side).floor(), (ratio * side).floor() // 2
        steps = torch.arange(side)
        masks.append((steps >= (centre - half)[:, None]) & (steps < (centre + half)[:, None]))
    return masks[0][:, :, None] & masks[1][:, None, :]


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Spread a part of the probability over all classes (https://arxiv.org/abs/1512.00567, section 7)."""
    return targets * (1 - smoothing) + smoothing / targets.shape[-1]
