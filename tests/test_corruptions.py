"""Corruptions: what they change, how strongly, and that they depend on nothing but the image and the seed."""

import colorsys
import io
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest
from scipy.ndimage import gaussian_filter

from trainers.corruptions import CORRUPTIONS, SEVERITIES, corrupt, name_parameters


# Those that draw no random numbers.
FIXED = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


def make_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some grain, as photographs have."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    smooth = gaussian_filter(noise, (min(height, width) / 12, min(height, width) / 12, 0))
    grain = gaussian_filter(noise, (0.7, 0.7, 0))
    mixed = smooth / smooth.std() + 0.4 * grain / grain.std()
    return (128 + 45 * mixed).round().clip(0, 255).astype(np.uint8)


def strength(image: np.ndarray, name: str, severity: int) -> float:
    """Mean squared difference."""
    return float(((corrupt(image, name, severity).astype(float) - image) ** 2).mean())


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (33, 47), (97, 61), (8, 8), (5, 3)], ids=str)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_size_keeps_its_shape(name, size):
    image = make_image(*size)
    for severity in (1, 5):
        corrupted = corrupt(image, name, severity)
        assert corrupted.dtype == np.uint8
        assert corrupted.shape == image.shape


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_flat_and_grey_images_do_as_well(name):
    for value in (0, 130, 255):
        assert corrupt(np.full((32, 32, 3), value, dtype=np.uint8), name, 3).shape == (32, 32, 3)
    grey = make_image(32, 32)[..., :1].repeat(3, axis=2)
    assert corrupt(grey, name, 3).shape == (32, 32, 3)
    if name in ("defocus_blur", "motion_blur", "zoom_blur", "fog", "brightness", "contrast", "pixelate"):
        corrupted = corrupt(grey, name, 3).astype(int)
        assert np.abs(corrupted - corrupted[..., :1]).max() <= 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_and_a_seed_decide(name):
    image, other = make_image(32, 32), make_image(32, 32, seed=1)
    first = corrupt(image, name, 3, seed=7)
    corrupt(other, name, 5)
    np.random.seed(1)
    np.testing.assert_array_equal(corrupt(image.copy(), name, 3, seed=7), first)
    np.testing.assert_array_equal(corrupt(np.asfortranarray(image), name, 3, seed=7), first)
    assert (corrupt(image, name, 3, seed=8) != first).any() == (name not in FIXED)


# In the published parameters, elastic transforms of severity 1 and 2 move the whole image, those of higher ones bend it
# locally; glass blur, snow and frost trade one parameter for another.
BY_ERROR = [name for name in CORRUPTIONS if name not in {"elastic_transform", "glass_blur", "snow", "frost"}]


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", BY_ERROR)
def test_severity_grows(name, side):
    image = make_image(side, side)
    strengths = [strength(image, name, severity) for severity in SEVERITIES]
    assert strengths[0] > 0
    assert all(weak <= strong for weak, strong in pairwise(strengths)), strengths


@pytest.mark.parametrize("side", [32, 224])
def test_ice_and_snow_hide_ever_more(side):
    """Less and less of the image's own contrast is left."""
    for name in ("snow", "frost"):
        image = make_image(side, side)
        left = []
        for severity in (1, 3, 5):
            corrupted = corrupt(image, name, severity).astype(float)
            left.append(np.corrcoef(corrupted.ravel(), image.astype(float).ravel())[0, 1])
        assert left == sorted(left, reverse=True), (name, left)


def test_noise_is_as_strong_as_its_parameter():
    flat = np.full((224, 224, 3), 128, dtype=np.uint8)
    assert corrupt(flat, "gaussian_noise", 1).std() / 255 == pytest.approx(0.08, rel=0.02)
    # Of 60 photons for white, a count of half of them has a variance of 30.
    assert corrupt(flat, "shot_noise", 1).std() / 255 == pytest.approx(np.sqrt(60 * 128 / 255) / 60, rel=0.02)
    noisy = corrupt(flat, "impulse_noise", 5)
    assert (noisy != 128).mean() == pytest.approx(0.27, abs=0.005)
    assert set(np.unique(noisy)) == {0, 128, 255}


def test_a_point_becomes_what_its_blur_makes_of_it():
    point = np.zeros((224, 224, 3), dtype=np.uint8)
    point[110:113, 110:113] = 255
    rows, columns, _ = np.nonzero(corrupt(point, "defocus_blur", 3))
    assert rows.min() + rows.max() == columns.min() + columns.max() == 222  # round the middle
    assert np.hypot(rows - 111, columns - 111).max() == pytest.approx(6 + 1.5, abs=1.5)
    rows, columns, _ = np.nonzero(corrupt(point, "motion_blur", 3))
    assert np.ptp(columns) > 12
    assert np.ptp(rows) < np.ptp(columns) + 4  # at most 45 degrees


def test_zooming_leaves_the_middle():
    image = make_image(224, 224)
    change = np.abs(corrupt(image, "zoom_blur", 5).astype(int) - image).mean(axis=2)
    assert change[104:120, 104:120].mean() < 0.5 * change.mean()


def test_brightness_is_added_to_the_value():
    image = make_image(40, 40)
    expected = []
    for pixel in image.reshape(-1, 3) / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.1)))
    # 40 pixels are nearer to 32 than to 224.
    np.testing.assert_allclose(corrupt(image, "brightness", 2).reshape(-1, 3) / 255, expected, atol=0.5001 / 255)


def test_contrast_goes_towards_the_mean_colour():
    image = make_image(32, 32)
    mean = image.mean(axis=(0, 1))
    np.testing.assert_allclose(corrupt(image, "contrast", 5), mean + 0.15 * (image - mean), atol=0.51)


def test_pixels_and_jpeg_are_pillows():
    image = make_image(224, 224)
    few = PIL.Image.fromarray(image).resize((56, 56), PIL.Image.Resampling.BOX)
    np.testing.assert_array_equal(
        corrupt(image, "pixelate", 5), np.asarray(few.resize((224, 224), PIL.Image.Resampling.NEAREST))
    )
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "JPEG", quality=7)
    np.testing.assert_array_equal(corrupt(image, "jpeg_compression", 5), np.asarray(PIL.Image.open(file)))


def test_an_elastic_transform_without_strength_moves_three_points():
    """Of severity 1 at 32 pixels only the affine part is left: what is straight stays straight."""
    ramp = np.zeros((32, 32, 3), dtype=np.uint8)
    ramp[...] = (np.arange(32) * 4 + 60)[None, :, None]
    middle = corrupt(ramp, "elastic_transform", 1)[8:24, 8:24, 0].astype(float)
    assert np.abs(np.diff(middle, n=2, axis=0)).max() <= 2
    assert np.abs(np.diff(middle, n=2, axis=1)).max() <= 2


def test_lengths_grow_with_the_image():
    """The same scene at twice the size is blurred as much, seen from twice as far."""
    large = make_image(448, 448)
    small = np.asarray(PIL.Image.fromarray(large).resize((224, 224), PIL.Image.Resampling.BOX))
    for name in ("defocus_blur", "motion_blur", "zoom_blur"):
        strengths = [strength(image, name, 3) for image in (small, large)]
        assert strengths[0] == pytest.approx(strengths[1], rel=0.5), name


def test_the_nearer_data_set_decides():
    assert name_parameters(32) == "CIFAR-10-C (32 pixels)"
    assert name_parameters(64) == "CIFAR-10-C (32 pixels; lengths times 2)"
    assert name_parameters(96) == "ImageNet-C (224 pixels; lengths times 0.429)"


@pytest.mark.parametrize(
    ("image", "name", "severity", "message"),
    [
        (make_image(8, 8), "fogg", 1, "there is no corruption 'fogg': give one of gaussian_noise, shot_noise"),
        (make_image(8, 8), "fog", 6, "severity 6 must be one of 1, 2, 3, 4, 5"),
        (make_image(8, 8)[..., 0], "fog", 1, r"an image of uint8 and shape \(8, 8\) must be of uint8"),
        (make_image(8, 8) / 255, "fog", 1, "an image of float64"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(image, name, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupt(image, name, severity)
