"""Crops, policies and erasing: what they do to a batch, and that each image has parameters of its own."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch.nn.functional import pad

from trainers import image_ops
from trainers.arguments import AugmentationArguments
from trainers.augmentation import RAND_AUGMENT, Augmentation, Crop, apply, erase, jitter_colors, make_policy, shift
from trainers.draws import Draws


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
FILL = torch.tensor([128.0, 102.0, 76.0])
WARP = partial(image_ops.affine, fill=FILL)


def random_pixels(count: int, size: tuple[int, int] = (16, 16), same: bool = False) -> torch.Tensor:
    pixels = torch.randint(256, (1 if same else count, 3, *size), dtype=torch.uint8)
    return pixels.expand(count, -1, -1, -1) if same else pixels


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_without_changes_pixels_are_normalised():
    pixels = random_pixels(4)
    augmentation = Augmentation(AugmentationArguments(), MEAN, STD)
    torch.testing.assert_close(augmentation(pixels, Draws.any(4)), normalise(pixels))


@pytest.mark.parametrize(
    "options",
    [
        {"rotation": 20, "translation": 0.2, "zoom": 0.2},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"auto_augment": "3a"},
        {"auto_augment": "imagenet"},
        {"auto_augment": "cifar10"},
        {"color_jitter": 0.4},
        {"erasing": 1.0},
        {"horizontal_flip": 0.5},
        {"crop_padding": 2},
    ],
    ids=str,
)
def test_every_image_has_parameters_of_its_own(options):
    pixels = random_pixels(32, same=True)
    augmentation = Augmentation(AugmentationArguments(**options), MEAN, STD)
    numbers = torch.arange(32)
    changed = augmentation(pixels, Draws.of(1, numbers, "augmentation"))
    assert changed.shape == (32, 3, 16, 16)
    assert len({image.numpy().tobytes() for image in changed}) >= (2 if "horizontal_flip" in options else 3)
    # The same wherever they are, and beside whatever images.
    part = augmentation(pixels[:7], Draws.of(1, numbers[3:10], "augmentation"))
    torch.testing.assert_close(part, changed[3:10], rtol=0, atol=1e-6)


def test_flips_are_as_frequent_as_asked():
    pixels = random_pixels(1000, (2, 2), same=True)
    flipped = Augmentation(AugmentationArguments(horizontal_flip=0.3), MEAN, STD)(pixels, Draws.any(1000))
    assert (flipped == normalise(pixels.flip(3))).all(dim=(1, 2, 3)).float().mean() == pytest.approx(0.3, abs=0.05)


def test_operations_go_to_the_images_that_chose_them():
    pixels = random_pixels(6).float()
    operations = [operation for operation, _ in RAND_AUGMENT.values()]
    names = list(RAND_AUGMENT)
    choice = torch.tensor([names.index("Invert"), -1, names.index("Rotate"), -1, names.index("Brightness"), -1])
    changed = apply(pixels, operations, choice, torch.tensor([0.0, 0, 180, 0, 0.5, 0]), WARP)
    assert torch.equal(changed[0], 255 - pixels[0])
    assert torch.equal(changed[2], pixels[2].flip(1, 2))
    assert torch.equal(changed[4], (pixels[4] * 0.5).floor())
    assert torch.equal(changed[1::2], pixels[1::2])


def test_rand_augment_changes_as_much_as_timms():
    """The mean change of a pixel, over many draws, is that of timm's policy of the same name."""
    generator = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(generator.normal(0, 3, (32, 32, 3)), 0), 1)
    image = ((smooth - smooth.min()) / (smooth.max() - smooth.min()) * 255).astype(np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()
    random.seed(0)
    options = {"img_mean": tuple(FILL.int().tolist()), "interpolation": Image.Resampling.BILINEAR}
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", options)
    expected = [np.abs(np.asarray(theirs(Image.fromarray(image))).astype(float) - image).mean() for _ in range(3000)]
    changed = make_policy("rand-m9-mstd0.5-inc1")(pixels.expand(3000, -1, -1, -1), WARP, Draws.any(3000))
    ours = (changed - pixels).abs().mean(dim=(1, 2, 3))
    assert ours.mean().item() == pytest.approx(np.mean(expected), rel=0.05)
    assert (ours == 0).float().mean().item() == pytest.approx(np.mean(np.array(expected) == 0), abs=0.03)
    for quantile in (0.5, 0.75, 0.9):
        assert ours.quantile(quantile).item() == pytest.approx(np.quantile(expected, quantile), rel=0.15)


def test_jitter_stays_within_its_strength():
    grey = torch.full((500, 3, 4, 4), 100.0)
    changed = jitter_colors(grey, 0.3, Draws.any(500))
    assert changed.min() >= 69
    assert changed.max() <= 130
    assert changed.std() > 10


def test_erasing_replaces_a_rectangle_by_noise():
    pixels = torch.full((2000, 3, 32, 32), 7.0)
    erased = erase(pixels, 0.25, Draws.any(2000))
    mask = (erased != 7).any(dim=1)
    assert mask.any(dim=(1, 2)).float().mean() == pytest.approx(0.25, abs=0.03)
    for image in mask[mask.any(dim=(1, 2))][:50]:
        rows, columns = image.any(dim=1).nonzero().flatten(), image.any(dim=0).nonzero().flatten()
        assert image.sum() == len(rows) * len(columns) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.01 <= image.float().mean() <= 0.36
    noise = erased[erased != 7]
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("options", "size"), [({}, (8, 12)), ({"min_crop": 0.3}, (8, 8)), ({"interpolation": "bicubic"}, (8, 8))]
)
def test_crops_give_batches_of_one_size(options, size):
    images = [Image.fromarray(random_pixels(1, (20 + i, 30))[0].permute(1, 2, 0).numpy()) for i in range(3)]
    batch = Crop(AugmentationArguments(**options), size)(images, Draws.any(3))
    assert batch.shape == (3, 3, *size)
    assert batch.dtype == torch.uint8


@pytest.mark.parametrize(("size", "padding"), [((8, 8), 2), ((5, 9), 3), ((6, 3), 1)])
def test_a_shift_crops_the_padded_image_at_a_place_of_its_own(size, padding):
    pixels = random_pixels(300, size)
    padded = pad(pixels.float(), [padding] * 4, mode="reflect").byte()
    places = set()
    for shifted, image in zip(shift(pixels, padding, Draws.any(300)), padded):
        windows = image.unfold(1, size[0], 1).unfold(2, size[1], 1)
        (place,) = (windows == shifted[:, None, None]).all(dim=(0, 3, 4)).nonzero().tolist()
        places.add(tuple(place))
    assert len(places) >= min(300, (2 * padding + 1) ** 2) * 0.6
    assert {row for row, _ in places} == {column for _, column in places} == set(range(2 * padding + 1))


def test_a_shift_comes_before_the_flip():
    pixels = random_pixels(1, (8, 8))
    changed = Augmentation(AugmentationArguments(crop_padding=3, horizontal_flip=1.0), MEAN, STD)
    found = changed(pixels, Draws.of(1, [4], "augmentation"))
    torch.testing.assert_close(found, normalise(shift(pixels, 3, Draws.of(1, [4], "augmentation")).flip(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizontal_flip": 1.5}, r"horizontal_flip=1\.5 must lie"),
        ({"translation": -1}, "translation=-1 must lie"),
        ({"min_crop": 0.0}, r"min_crop=0\.0 must lie"),
        ({"crop_padding": -1}, "crop_padding=-1 must be"),
        ({"zoom": 1.0}, "zoom"),
        ({"rotation": -5.0}, r"rotation=-5\.0 must lie"),
        ({"erasing": 2.0}, r"erasing=2\.0 must lie"),
        ({"auto_augment": "rand"}, "auto_augment='rand' must be"),
    ],
)
def test_impossible_augmentation_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(AugmentationArguments(**options), MEAN, STD)
