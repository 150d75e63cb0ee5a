"""Changes of a batch of images, each image with a magnitude of its own: (B, C, H, W), (B,) -> (B, C, H, W).

Pixels are whole numbers from 0 to 255, in floating point so that a GPU works on them as well as a CPU. Colours change
as Pillow changes them, to the last level; geometry samples bilinearly.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def _each(magnitude: Tensor) -> Tensor:
    return magnitude.view(-1, 1, 1, 1)


# ----------------------------------------------------------------------------------------------------------- colours


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """From `degenerate` (factor 0) to `images` (1) and beyond."""
    return (degenerate + _each(factor) * (images - degenerate)).clamp(0, 255).floor()


def grey(images: Tensor) -> Tensor:
    """Luma by ITU-R 601-2: (B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor().unsqueeze(1)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Saturation: 0 is grey."""
    return blend(grey(images).expand_as(images), images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Brightness: 0 is black."""
    return blend(torch.zeros_like(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Contrast: 0 is the mean grey."""
    mean = (grey(images).mean(dim=(1, 2, 3)) + 0.5).floor()
    return blend(_each(mean).expand_as(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Sharpness: 0 is smoothed, except at the border."""
    channels = images.shape[1]
    kernel = torch.ones(channels, 1, 3, 3, dtype=images.dtype, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (F.conv2d(images, kernel / 13, groups=channels) + 0.5).floor()
    return blend(smooth, images, factor)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` of 8."""
    step = _each(torch.exp2(8 - bits))
    return (images / step).floor() * step


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is at least as bright as the threshold."""
    return torch.where(images < _each(threshold), images, 255 - images)


def solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    """Brighten what is darker than 128."""
    return torch.where(images < 128, (images + _each(amount)).clamp(max=255), images)


def invert(images: Tensor, _magnitude: Tensor) -> Tensor:
    return 255 - images


def autocontrast(images: Tensor, _magnitude: Tensor) -> Tensor:
    """Stretch each channel to the whole range."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    scale = 255 / (high - low).double().clamp(min=1)
    # As in Pillow, the product and the offset are made first, in double precision.
    stretched = (images * scale - low * scale).clamp(0, 255).floor().to(images.dtype)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor, _magnitude: Tensor) -> Tensor:
    """Make each channel's histogram flat."""
    levels = images.long().flatten(2)
    histogram = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=images.device)
    histogram.scatter_add_(2, levels, torch.ones_like(levels))
    step = (levels.shape[2] - histogram.gather(2, levels.amax(dim=2, keepdim=True))) // 255
    below = histogram.cumsum(dim=2) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    equalized = table.gather(2, levels).view_as(images).to(images.dtype)
    return torch.where(step.unsqueeze(3) > 0, equalized, images)


def grayscale(images: Tensor, _magnitude: Tensor) -> Tensor:
    return grey(images).expand_as(images)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur with a standard deviation of `sigma` pixels."""
    radius = max(1, math.ceil(3 * float(sigma.max())))
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    # As far as it would reach alone, whatever is beside it.
    kernel = kernel * (offsets.abs() <= (3 * sigma).ceil().clamp(min=1)[:, None])
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    batch_size, channels, height, width = images.shape
    # Each image and channel is a group, so that each image has its own kernel.
    kernel = kernel.repeat_interleave(channels, dim=0)
    blurred = images.reshape(1, batch_size * channels, height, width)
    blurred = F.pad(blurred, (radius,) * 4, mode="replicate")
    blurred = F.conv2d(blurred, kernel[:, None, None, :], groups=batch_size * channels)
    blurred = F.conv2d(blurred, kernel[:, None, :, None], groups=batch_size * channels)
    return blurred.view_as(images).round()


# ---------------------------------------------------------------------------------------------------------- geometry


def affine(images: Tensor, matrix: Tensor, fill: Tensor, interpolation: str = "bilinear") -> Tensor:
    """Sample where a map from output to input pixels (B, 2, 3) says; outside lies the colour `fill` (C,).

    The origin is the corner of the first pixel, whose centre is at (0.5, 0.5).
    """
    height, width = images.shape[2:]
    rows = torch.arange(height, dtype=images.dtype, device=images.device) + 0.5
    columns = torch.arange(width, dtype=images.dtype, device=images.device) + 0.5
    points = torch.stack(
        [columns.expand(height, width), rows[:, None].expand(height, width), torch.ones_like(images[0, 0])]
    )
    source = torch.einsum("bij,jhw->bhwi", matrix, points)
    size = torch.tensor([width, height], dtype=images.dtype, device=images.device)
    places = 2 * source / size - 1
    sampled = F.grid_sample(images, places, mode=interpolation, padding_mode="border", align_corners=False)
    inside = ((source >= 0) & (source < size)).all(dim=-1).unsqueeze(1)
    return torch.where(inside, sampled.round().clamp(0, 255), fill.view(1, -1, 1, 1))


def identity_matrix(magnitude: Tensor) -> Tensor:
    """(B,) -> (B, 2, 3)."""
    return torch.eye(2, 3, dtype=magnitude.dtype, device=magnitude.device).repeat(len(magnitude), 1, 1)


def shear_x(magnitude: Tensor, _size: tuple[int, int]) -> Tensor:
    matrix = identity_matrix(magnitude)
    matrix[:, 0, 1] = magnitude
    return matrix


def shear_y(magnitude: Tensor, _size: tuple[int, int]) -> Tensor:
    matrix = identity_matrix(magnitude)
    matrix[:, 1, 0] = magnitude
    return matrix


def translate_x(magnitude: Tensor, size: tuple[int, int]) -> Tensor:
    """To the left by a share of the width."""
    matrix = identity_matrix(magnitude)
    matrix[:, 0, 2] = magnitude * size[1]
    return matrix


def translate_y(magnitude: Tensor, size: tuple[int, int]) -> Tensor:
    """Upwards by a share of the height."""
    matrix = identity_matrix(magnitude)
    matrix[:, 1, 2] = magnitude * size[0]
    return matrix


def rotate(magnitude: Tensor, size: tuple[int, int]) -> Tensor:
    """Counter-clockwise by degrees, about the centre."""
    return rotate_and_scale(magnitude, torch.ones_like(magnitude), size)


def rotate_and_scale(degrees: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """Counter-clockwise by degrees and larger by `scale`, about the centre."""
    sine, cosine = torch.sin(torch.deg2rad(degrees)) / scale, torch.cos(torch.deg2rad(degrees)) / scale
    centre = torch.tensor([size[1] / 2, size[0] / 2], dtype=degrees.dtype, device=degrees.device)
    rotation = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], dim=1)
    return torch.cat([rotation, (centre - rotation @ centre).unsqueeze(2)], dim=2)


# ----------------------------------------------------------------------------------------------------------- display


def to_arrays(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[np.ndarray]:
    """Normalised pixels (B, C, H, W) -> 8-bit images (H, W, C)."""
    mean, std = (torch.tensor(values, device=pixels.device).view(1, -1, 1, 1) for values in (mean, std))
    images = ((pixels.float() * std + mean) * 255).round().clamp(0, 255).byte()
    return list(images.permute(0, 2, 3, 1).cpu().numpy())
