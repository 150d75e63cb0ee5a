"""Random changes of a training image."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import v2

from trainers.arguments import AugmentationArguments


def train_transform(
    arguments: AugmentationArguments, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Callable:
    """PIL images -> pixels (B, C, H, W), each image with random parameters of its own.

    Raises:
        ValueError: if a probability or share is out of range.
    """
    for name in ("horizontal_flip", "translation", "zoom"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise ValueError(f"{name}={getattr(arguments, name)} must lie between 0 and 1")
    if not 0 <= arguments.rotation <= 180:
        raise ValueError(f"rotation={arguments.rotation} must lie between 0 and 180 degrees")
    if arguments.min_crop is not None and not 0 < arguments.min_crop <= 1:
        raise ValueError(f"min_crop={arguments.min_crop} must lie between 0 and 1")
    if arguments.zoom == 1:
        raise ValueError("zoom=1.0 would shrink an image to nothing: choose a smaller share")

    # Turning comes after resizing: at the model's size it costs least, and small images are blurred least by it.
    steps = [v2.PILToTensor()]
    if arguments.min_crop is not None:
        steps.append(v2.RandomResizedCrop(size, scale=(arguments.min_crop, 1.0), antialias=True))
    else:
        steps.append(v2.Resize(size, antialias=True))
    if arguments.rotation or arguments.translation or arguments.zoom:
        steps.append(
            v2.RandomAffine(
                degrees=arguments.rotation,
                translate=(arguments.translation, arguments.translation),
                scale=(1 - arguments.zoom, 1 + arguments.zoom),
                interpolation=v2.InterpolationMode.BILINEAR,
            )
        )
    if arguments.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(arguments.horizontal_flip))
    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    return partial(_transform, change=v2.Compose(steps), finish=finish)


def _transform(images: list[Image], change: Callable, finish: Callable) -> Tensor:
    return finish(torch.stack([change(image) for image in images]))
