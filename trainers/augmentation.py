"""Random changes of training images.

A crop works on one decoded image, in the data loader's workers. All that comes after it works on a whole batch of
8-bit images, each with parameters of its own, and therefore in the workers or on the training device alike. All is
drawn by `trainers.draws.Draws`, so that an image is changed in the same way whoever prepares it.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import PIL.Image
import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from trainers import image_ops
from trainers.arguments import INTERPOLATIONS, AugmentationArguments
from trainers.draws import Draws


class Crop:
    """Images of any size -> one batch of 8-bit pixels (B, C, H, W): a random part of each, or all of it.

    Raises:
        ValueError: as `Augmentation` does.
    """

    def __init__(self, arguments: AugmentationArguments, size: tuple[int, int]):
        check_arguments(arguments)
        interpolation = v2.InterpolationMode(arguments.interpolation)
        self.size, self.is_random = size, arguments.min_crop is not None
        if self.is_random:
            cut = v2.RandomResizedCrop(size, scale=(arguments.min_crop, 1.0), interpolation=interpolation)
        else:
            cut = v2.Resize(size, interpolation)
        self.change = v2.Compose([cut, v2.PILToTensor()])

    def __call__(self, images: list[PIL.Image.Image], draws: Draws) -> Tensor:
        if not self.is_random:
            return torch.stack([self.change(image) for image in images])
        # torchvision asks PyTorch's own generator, which must be left as it was where models draw from it.
        cropped = []
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(images, draws.integers(0, 2**32).tolist(), strict=True):
                torch.default_generator.manual_seed(seed)
                cropped.append(self.change(image))
        return torch.stack(cropped)


class Augmentation:
    """8-bit pixels (B, C, H, W) -> normalised pixels (B, C, H, W), each image changed by parameters of its own.

    Raises:
        ValueError: if a probability or share is out of range, or there is no such policy.
    """

    def __init__(self, arguments: AugmentationArguments, mean: Sequence[float], std: Sequence[float]):
        check_arguments(arguments)
        self.arguments = arguments
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        self.policy = make_policy(arguments.auto_augment) if arguments.auto_augment else None

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        arguments = self.arguments
        fill = (self.mean * 255).round().to(images.device)
        pixels = (shift(images, arguments.crop_padding, draws) if arguments.crop_padding else images).float()
        if arguments.horizontal_flip:
            flipped = _each(draws.rand() < arguments.horizontal_flip).to(pixels.device)
            pixels = torch.where(flipped, pixels.flip(3), pixels)
        if arguments.rotation or arguments.translation or arguments.zoom:
            pixels = self.move(pixels, draws)
        if self.policy is not None:
            warp = partial(image_ops.affine, fill=fill, interpolation=arguments.interpolation)
            pixels = self.policy(pixels, warp, draws)
        if arguments.color_jitter:
            pixels = jitter_colors(pixels, arguments.color_jitter, draws)
        pixels = (pixels / 255 - _each_channel(self.mean, pixels)) / _each_channel(self.std, pixels)
        return erase(pixels, arguments.erasing, draws) if arguments.erasing else pixels

    def move(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Rotate, shift and scale in one go, black outside."""
        size, arguments = tuple(pixels.shape[2:]), self.arguments
        most = (arguments.rotation, arguments.translation * size[1], arguments.translation * size[0], arguments.zoom)
        degrees, right, down, zoom = ((2 * draws.rand(4) - 1) * torch.tensor(most)).unbind(1)
        scale = 1 + zoom
        matrix = image_ops.rotate_and_scale(degrees, scale, size)
        matrix[:, :, 2] += torch.stack([right, down], dim=1)
        black = pixels.new_zeros(pixels.shape[1])
        return image_ops.affine(pixels, matrix.to(pixels.device), black, self.arguments.interpolation)


def check_arguments(arguments: AugmentationArguments) -> None:
    """Raises ValueError if a probability or share is out of range."""
    for name in ("horizontal_flip", "translation", "zoom", "color_jitter", "erasing"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise ValueError(f"{name}={getattr(arguments, name)} must lie between 0 and 1")
    if not 0 <= arguments.rotation <= 180:
        raise ValueError(f"rotation={arguments.rotation} must lie between 0 and 180 degrees")
    if arguments.crop_padding < 0:
        raise ValueError(f"crop_padding={arguments.crop_padding} must be at least 0")
    if arguments.interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={arguments.interpolation!r} must be {' or '.join(INTERPOLATIONS)}")
    if arguments.min_crop is not None and not 0 < arguments.min_crop <= 1:
        raise ValueError(f"min_crop={arguments.min_crop} must lie between 0 and 1")
    if arguments.zoom == 1:
        raise ValueError("zoom=1.0 would shrink an image to nothing: choose a smaller share")


def shift(pixels: Tensor, padding: int, draws: Draws) -> Tensor:
    """Crop each image (C, H, W) out of itself with `padding` mirrored pixels around, at a place of its own.

    The padded crop of CIFAR's recipes (https://arxiv.org/abs/1512.03385, section 4.2), mirrored as in DeiT III
    (https://arxiv.org/abs/2204.07118, section 3.2).
    """
    count, channels, height, width = pixels.shape
    down, right = (draws.integers(-padding, padding + 1)[:, None] for _ in range(2))
    rows = _mirror(torch.arange(height) + down, height).to(pixels.device)
    columns = _mirror(torch.arange(width) + right, width).to(pixels.device)
    pixels = pixels.gather(2, rows.view(count, 1, height, 1).expand(-1, channels, -1, width))
    return pixels.gather(3, columns.view(count, 1, 1, width).expand(-1, channels, height, -1))


def _mirror(positions: Tensor, length: int) -> Tensor:
    """Positions outside 0..length - 1 reflected into it, without the edge itself twice."""
    period = max(1, 2 * (length - 1))
    positions = positions.remainder(period)
    return torch.minimum(positions, period - positions)


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _each_channel(values: Tensor, pixels: Tensor) -> Tensor:
    return values.to(pixels.device).view(1, -1, 1, 1)


# ---------------------------------------------------------------------------------------------------------- policies

# Images (B, C, H, W) and maps from output to input pixels (B, 2, 3) to moved images.
Warp = Callable[[Tensor, Tensor], Tensor]
# Operations with the argument that a level from 0 (none) to 1 (most) stands for. A level comes with a random sign.
Operation = tuple[Callable, Callable[[Tensor, Tensor], Tensor]]


def _enhance(level: Tensor, sign: Tensor) -> Tensor:
    return (1 + 0.9 * level * sign).clamp(min=0.1)


GEOMETRY = {
    image_ops.rotate,
    image_ops.shear_x,
    image_ops.shear_y,
    image_ops.translate_x,
    image_ops.translate_y,
}
# https://arxiv.org/abs/1909.13719 with the ranges of the "increasing" variant that DeiT and Swin were trained with.
RAND_AUGMENT: dict[str, Operation] = {
    "AutoContrast": (image_ops.autocontrast, lambda level, sign: level),
    "Equalize": (image_ops.equalize, lambda level, sign: level),
    "Invert": (image_ops.invert, lambda level, sign: level),
    "Rotate": (image_ops.rotate, lambda level, sign: 30 * level * sign),
    "Posterize": (image_ops.posterize, lambda level, sign: 4 - (4 * level).floor()),
    "Solarize": (image_ops.solarize, lambda level, sign: 256 - (256 * level).floor()),
    "SolarizeAdd": (image_ops.solarize_add, lambda level, sign: (110 * level).floor()),
    "Color": (image_ops.color, _enhance),
    "Contrast": (image_ops.contrast, _enhance),
    "Brightness": (image_ops.brightness, _enhance),
    "Sharpness": (image_ops.sharpness, _enhance),
    "ShearX": (image_ops.shear_x, lambda level, sign: 0.3 * level * sign),
    "ShearY": (image_ops.shear_y, lambda level, sign: 0.3 * level * sign),
    "TranslateX": (image_ops.translate_x, lambda level, sign: 0.45 * level * sign),
    "TranslateY": (image_ops.translate_y, lambda level, sign: 0.45 * level * sign),
}
# https://arxiv.org/abs/1805.09501, where levels are tenths from 0 to 9.
AUTO_AUGMENT: dict[str, Operation] = {
    **RAND_AUGMENT,
    "Posterize": (image_ops.posterize, lambda level, sign: 8 - (4 * level).round()),
    "Solarize": (image_ops.solarize, lambda level, sign: 255 - 255 * level),
    "TranslateX": (image_ops.translate_x, lambda level, sign: 150 / 331 * level * sign),
    "TranslateY": (image_ops.translate_y, lambda level, sign: 150 / 331 * level * sign),
}


def apply(pixels: Tensor, operations: Sequence[Callable], choice: Tensor, argument: Tensor, warp: Warp) -> Tensor:
    """To each image its own operation, `choice` (B,) of them or none (-1), with its own argument (B,)."""
    size, changed = tuple(pixels.shape[2:]), pixels.clone()
    moved, matrices = [], []
    for index in choice.unique().tolist():
        rows = (choice == index).nonzero().flatten()
        if index < 0:
            continue
        operation = operations[index]
        if operation in GEOMETRY:
            moved.append(rows)
            matrices.append(operation(argument[rows], size))
        else:
            on_device = rows.to(pixels.device)
            changed[on_device] = operation(pixels[on_device], argument[rows].to(pixels.device))
    if moved:
        rows = torch.cat(moved).to(pixels.device)
        changed[rows] = warp(pixels[rows], torch.cat(matrices).to(pixels.device))
    return changed


class RandAugment:
    """`num_operations` random operations one after the other, each with probability 0.5.

    Levels are out of 10, normally distributed around `magnitude`.
    """

    def __init__(self, magnitude: float, magnitude_std: float = 0.0, num_operations: int = 2):
        self.magnitude, self.magnitude_std, self.num_operations = magnitude, magnitude_std, num_operations

    def __call__(self, pixels: Tensor, warp: Warp, draws: Draws) -> Tensor:
        for _ in range(self.num_operations):
            choice = draws.integers(0, len(RAND_AUGMENT))
            level = (self.magnitude + self.magnitude_std * draws.randn()).clamp(0, 10) / 10
            pixels = apply_levels(pixels, RAND_AUGMENT, choice, level, draws.rand() < 0.5, warp, draws)
        return pixels


class AutoAugment:
    """One of the learnt pairs of operations, for ImageNet or CIFAR-10."""

    def __init__(self, policy: torchvision.transforms.AutoAugmentPolicy):
        names = list(AUTO_AUGMENT)
        pairs = torchvision.transforms.AutoAugment(policy).policies
        table = [[(names.index(name), chance, level or 0) for name, chance, level in pair] for pair in pairs]
        self.table = torch.tensor(table, dtype=torch.float32)  # (pairs, 2, 3): operation, probability, level

    def __call__(self, pixels: Tensor, warp: Warp, draws: Draws) -> Tensor:
        pair = self.table[draws.integers(0, len(self.table))]
        for operation in pair.unbind(1):
            choice, chance, level = operation.unbind(1)
            chosen = draws.rand() < chance
            pixels = apply_levels(pixels, AUTO_AUGMENT, choice.long(), level / 9, chosen, warp, draws)
        return pixels


class ThreeAugment:
    """Grey, solarised or blurred, one of the three (https://arxiv.org/abs/2204.07118, section 3.2)."""

    operations = (image_ops.grayscale, image_ops.solarize, image_ops.gaussian_blur)

    def __call__(self, pixels: Tensor, warp: Warp, draws: Draws) -> Tensor:
        choice = draws.integers(0, 3)
        sigma = 0.1 + 1.9 * draws.rand()
        return apply(pixels, self.operations, choice, torch.where(choice == 1, 128.0, sigma), warp)


def apply_levels(
    pixels: Tensor,
    table: dict[str, Operation],
    choice: Tensor,
    level: Tensor,
    chosen: Tensor,
    warp: Warp,
    draws: Draws,
) -> Tensor:
    """To the chosen images (B,) their operation of the table at their level (B,), with random signs."""
    operations, arguments = zip(*table.values())
    sign = draws.integers(0, 2) * 2.0 - 1
    argument = torch.stack([argument(level, sign) for argument in arguments]).gather(0, choice[None])[0]
    return apply(pixels, operations, choice.where(chosen, -1), argument, warp)


def make_policy(name: str) -> Callable[[Tensor, Warp, Draws], Tensor]:
    """`rand-m9-mstd0.5-inc1` (as in timm), `3a`, `imagenet` or `cifar10`.

    Raises:
        ValueError: if there is no such policy.
    """
    if name == "3a":
        return ThreeAugment()
    if name in ("imagenet", "cifar10"):
        return AutoAugment(torchvision.transforms.AutoAugmentPolicy(name))
    match = re.fullmatch(r"rand-m(?P<m>[\d.]+)(-n(?P<n>\d+))?(-mstd(?P<mstd>[\d.]+))?-inc1", name)
    if match is None:
        raise ValueError(f"auto_augment={name!r} must be as rand-m9-mstd0.5-inc1, or one of 3a, imagenet, cifar10")
    return RandAugment(float(match["m"]), float(match["mstd"] or 0), int(match["n"] or 2))


def jitter_colors(pixels: Tensor, strength: float, draws: Draws) -> Tensor:
    """Brightness, contrast and saturation, in random order, by factors from 1 - strength to 1 + strength."""
    operations = (image_ops.brightness, image_ops.contrast, image_ops.color)
    order = draws.rand(len(operations)).argsort(dim=1)
    for choice in order.unbind(1):
        factor = 1 + strength * (2 * draws.rand() - 1)
        pixels = apply(pixels, operations, choice, factor, image_ops.affine)  # none of them moves anything
    return pixels


def erase(pixels: Tensor, probability: float, draws: Draws, attempts: int = 10) -> Tensor:
    """Replace a rectangle by noise (https://arxiv.org/abs/1708.04896, "pixel mode") in normalised images.

    Its area is 2 to 33 % of the image, its aspect ratio 0.3 to 3.3; where no attempt fits, nothing is erased.
    """
    height, width = pixels.shape[2:]
    area = (0.02 + (1 / 3 - 0.02) * draws.rand(attempts)) * height * width
    aspect = torch.exp((2 * draws.rand(attempts) - 1) * math.log(1 / 0.3))
    sides = torch.stack([(area * aspect).sqrt().round(), (area / aspect).sqrt().round()])
    fits = (sides[0] < height) & (sides[1] < width)
    first = fits.int().argmax(dim=1, keepdim=True)
    tall, wide = (side.gather(1, first)[:, 0] for side in sides)
    erased = fits.any(dim=1) & (draws.rand() < probability)
    top, left = (draws.rand() * (height - tall + 1)).floor(), (draws.rand() * (width - wide + 1)).floor()
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    mask = (in_rows[:, :, None] & in_columns[:, None, :])[erased].to(pixels.device)
    places = erased.nonzero().flatten().to(pixels.device)
    noise = draws[erased].randn(*pixels.shape[1:], device=pixels.device)
    return pixels.index_copy(0, places, torch.where(mask.unsqueeze(1), noise, pixels[places]))
