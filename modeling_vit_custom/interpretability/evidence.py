"""Which patches carry a prediction, and how well a map tells."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling_vit_custom import ViTCustomForImageClassification, to_image
from .attention import (
    attention_rollout,
    classify,
    gradient_attention,
    gradient_rollout,
    place,
    prepare_images,
    to_pixels,
    to_probabilities,
)


def leaves_map(model: ViTCustomForImageClassification) -> bool:
    """Whether `grad_cam` can say something: a class token must not be all that the last stage's patches feed."""
    return model.config.pooling != "cls" or model.config.stages[-1].depth > 1


def grad_cam(
    model: ViTCustomForImageClassification, pixel_values: Tensor, classes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where the evidence for a class lies: (B, C, H, W) -> maps (B, h, w) from 0 to 1, and logits (B, L).

    Grad-CAM, https://arxiv.org/abs/1610.02391, equations 1 and 2, on the patches of the last stage: before its last
    block where a class token is pooled, since what comes after does not read the patches, and after it otherwise.

    Args:
        model: A classifier of at least two blocks in its last stage, if it pools a class token.
        pixel_values: Normalised images.
        classes: (B,); the likeliest ones by default.

    Raises:
        ValueError: if no block mixes the patches into the class token.
    """
    config = model.config
    if not leaves_map(model):
        raise ValueError("a class token that one block reads into leaves no map: the last stage needs two blocks")
    hidden, blocks = prepare_images(model.base_model, pixel_values)
    last = blocks.pop() if config.pooling == "cls" else None
    with torch.no_grad():
        for block in blocks:
            hidden, _ = block.run(hidden)
    with torch.enable_grad():
        tokens = hidden.detach().requires_grad_()
        logits = classify(model, tokens if last is None else last.run(tokens)[0])
        chosen = logits.argmax(dim=-1) if classes is None else classes
        (gradients,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), tokens)
    patches, gradients = (each.detach().float()[:, config.num_prefix_tokens :] for each in (tokens, gradients))
    weights = gradients.mean(dim=1, keepdim=True)
    grid = model.model.feature_grids(tuple(pixel_values.shape[-2:]))[-1]
    maps = to_image((patches * weights).sum(dim=-1, keepdim=True), grid)[:, 0].relu()
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12), logits.detach()


def explain(
    model: ViTCustomForImageClassification, pixel_values: Tensor, classes: Tensor | None = None
) -> dict[str, Tensor]:
    """Maps (B, h, w) of what a class rests on, from 0 to 1, by every method that has a meaning for the model.

    Args:
        model: A classifier, in evaluation mode.
        pixel_values: Normalised images (B, C, H, W).
        classes: (B,); the likeliest ones by default. Attention rollout knows of none.
    """
    maps = {}
    if leaves_map(model):
        maps["Grad-CAM"] = grad_cam(model, pixel_values, classes)[0]
    if model.config.is_plain:
        maps["rollout"] = attention_rollout(model, pixel_values)
        maps["gradient rollout"] = gradient_rollout(model, pixel_values, classes)
    maps["gradient attention"] = gradient_attention(model, pixel_values, -1, classes)
    return {name: each / each.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12) for name, each in maps.items()}


class PatchScores(NamedTuple):
    """Mean probability of the predicted class while patches come or go in the order of a map.

    Attributes:
        insertion: (B,), from nothing to all, the most important first; high is good.
        deletion: (B,), from all to nothing, the most important first; low is good.
    """

    insertion: Tensor
    deletion: Tensor


@torch.no_grad()
def score_map(
    model: ViTCustomForImageClassification, pixel_values: Tensor, maps: Tensor, steps: int = 16
) -> PatchScores:
    """How well maps (B, h, w) tell what a prediction rests on, to compare the ways to make them.

    After RISE, https://arxiv.org/abs/1806.07421, section 4: areas under the curves of the predicted class's
    probability. What is not there is blurred in insertion, to means over a sixteenth of the image, and of the mean
    colour of the normalisation in deletion; whole patches come and go, those of equal weight in an order drawn once.
    """
    pixel_values, size = place(model, pixel_values), tuple(pixel_values.shape[-2:])
    blurred = F.interpolate(F.adaptive_avg_pool2d(pixel_values, 4), size, mode="bilinear")
    grey = torch.zeros_like(pixel_values)
    flat = maps.flatten(1)
    # Where many patches weigh nothing, an order from left to right would tell something as well.
    shuffled = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(flat.device)
    order = shuffled[flat[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    ranks = order.argsort(dim=1).unflatten(1, maps.shape[1:])
    classes = model(pixel_values).logits.argmax(dim=-1, keepdim=True)
    areas = []
    for start, end in ((blurred, pixel_values), (pixel_values, grey)):
        curve = []
        for step in range(steps + 1):
            changed = (ranks < round(step / steps * flat.shape[1])).to(pixel_values.dtype)
            changed = to_pixels(model, changed, size, is_smooth=False)[:, None]
            logits = model(torch.lerp(start, end, changed)).logits
            curve.append(to_probabilities(logits, model.config).gather(1, classes)[:, 0])
        areas.append(torch.trapezoid(torch.stack(curve, dim=1), dx=1 / steps))
    return PatchScores(*areas)
