"""Batch operations on images against Pillow, image by image."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from trainers import image_ops


FILL = (124, 116, 104)


def make_images() -> list[np.ndarray]:
    """Noise, smooth, flat and pale images, (24, 20, 3)."""
    generator = np.random.default_rng(0)
    noise = [generator.normal(128, 60, (24, 20, 3)).clip(0, 255) for _ in range(3)]
    smooth = [np.cumsum(np.cumsum(generator.normal(0, 6, (24, 20, 3)), 0), 1) % 256 for _ in range(3)]
    flat, pale = np.full((24, 20, 3), 77), generator.integers(100, 140, (24, 20, 3))
    return [image.astype(np.uint8) for image in (*noise, *smooth, flat, pale)]


IMAGES = make_images()
BATCH = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in IMAGES]).float()
FACTORS = torch.tensor([0.1, 0.5, 0.9, 1.0, 1.3, 1.9, 0.3, 1.5])


def by_pillow(change, magnitudes: torch.Tensor) -> torch.Tensor:
    changed = [change(Image.fromarray(image), m) for image, m in zip(IMAGES, magnitudes.tolist())]
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in changed]).float()


@pytest.mark.parametrize(
    ("operation", "change", "magnitudes"),
    [
        (image_ops.color, lambda image, m: ImageEnhance.Color(image).enhance(m), FACTORS),
        (image_ops.brightness, lambda image, m: ImageEnhance.Brightness(image).enhance(m), FACTORS),
        (image_ops.contrast, lambda image, m: ImageEnhance.Contrast(image).enhance(m), FACTORS),
        (image_ops.sharpness, lambda image, m: ImageEnhance.Sharpness(image).enhance(m), FACTORS),
        (image_ops.posterize, lambda image, m: ImageOps.posterize(image, int(m)), torch.arange(1.0, 9.0)),
        (image_ops.solarize, ImageOps.solarize, torch.tensor([0.0, 50, 100, 128, 200, 255, 256, 77])),
        (image_ops.invert, lambda image, m: ImageOps.invert(image), FACTORS),
        (image_ops.autocontrast, lambda image, m: ImageOps.autocontrast(image), FACTORS),
        (image_ops.equalize, lambda image, m: ImageOps.equalize(image), FACTORS),
        (image_ops.grayscale, lambda image, m: ImageOps.grayscale(image), FACTORS),
    ],
)
def test_colours_are_pillows_to_the_last_level(operation, change, magnitudes):
    assert torch.equal(operation(BATCH, magnitudes), by_pillow(change, magnitudes))


def test_solarize_add_brightens_what_is_dark():
    levels = torch.arange(256.0).view(1, 1, 16, 16)
    added = image_ops.solarize_add(levels, torch.tensor([30.0])).flatten()
    assert torch.equal(added[:128], torch.arange(128.0) + 30)
    assert torch.equal(added[128:], torch.arange(128.0, 256.0))


def transform(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


@pytest.mark.parametrize(
    ("operation", "change", "magnitudes"),
    [
        (
            image_ops.rotate,
            lambda image, m: image.rotate(m, Image.Resampling.BILINEAR, fillcolor=FILL),
            torch.tensor([-30.0, -7, 0, 3, 15, 30, 90, 145]),
        ),
        (image_ops.shear_x, lambda image, m: transform(image, 1, m, 0, 0, 1, 0), 0.3 * (FACTORS - 1)),
        (image_ops.shear_y, lambda image, m: transform(image, 1, 0, 0, m, 1, 0), 0.3 * (FACTORS - 1)),
        (image_ops.translate_x, lambda image, m: transform(image, 1, 0, 20 * m, 0, 1, 0), FACTORS - 1),
        (image_ops.translate_y, lambda image, m: transform(image, 1, 0, 0, 0, 1, 24 * m), FACTORS - 1),
    ],
)
def test_geometry_is_pillows_within_a_level(operation, change, magnitudes):
    moved = image_ops.affine(BATCH, operation(magnitudes, (24, 20)), torch.tensor(FILL).float())
    assert (moved - by_pillow(change, magnitudes)).abs().max() <= 1


def test_bicubic_moves_are_closer_to_pillows_than_bilinear_ones():
    """Not the same: Pillow's cubic is that of Catmull and Rom (a = -0.5), PyTorch's is sharper (a = -0.75)."""
    magnitudes = torch.tensor([-30.0, -7, 0, 3, 15, 30, 90, 145])
    expected = by_pillow(lambda image, m: image.rotate(m, Image.Resampling.BICUBIC, fillcolor=FILL), magnitudes)
    matrix = image_ops.rotate(magnitudes, (24, 20))
    distance = {
        name: (image_ops.affine(BATCH, matrix, torch.tensor(FILL).float(), name) - expected).abs().mean()
        for name in ("bilinear", "bicubic")
    }
    assert distance["bicubic"] < distance["bilinear"] / 2


def test_larger_by_two_about_the_centre():
    image = torch.zeros(1, 1, 8, 8)
    image[:, :, 3:5, 3:5] = 200
    matrix = image_ops.rotate_and_scale(torch.zeros(1), torch.full((1,), 2.0), (8, 8))
    zoomed = image_ops.affine(image, matrix, torch.zeros(1))
    assert zoomed[0, 0, 2:6, 2:6].min() > 100
    assert zoomed.sum().item() == pytest.approx(4 * image.sum().item(), rel=0.01)


def test_each_image_has_its_own_blur():
    point = torch.zeros(3, 1, 31, 31)
    point[:, :, 15, 15] = 255 * 50
    sigma = torch.tensor([0.8, 1.5, 2.0])
    blurred = image_ops.gaussian_blur(point, sigma)
    steps = torch.arange(31.0) - 15
    variance = (blurred.sum(dim=(1, 2)) * steps**2).sum(dim=1) / blurred.sum(dim=(1, 2, 3))
    torch.testing.assert_close(variance.sqrt(), sigma, rtol=0.03, atol=0)


def test_a_blur_does_not_depend_on_its_neighbours():
    sigma = torch.tensor([0.4, 1.0, 2.0, 0.1, 1.5, 0.7, 0.2, 1.1])
    alone = [image_ops.gaussian_blur(BATCH[[index]], sigma[[index]]) for index in range(len(BATCH))]
    # Sums in another order may round to the other side.
    different = image_ops.gaussian_blur(BATCH, sigma) != torch.cat(alone)
    assert different.float().mean() < 1e-4
