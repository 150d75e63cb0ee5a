"""The gallery of what a recipe does to images."""

import numpy as np
import pytest
from PIL import Image
from test_finetune import error_of

from trainers.gallery import main as gallery


@pytest.fixture
def images(tmp_path):
    """A folder of four red and four blue images."""
    for name, colour in {"red": (250, 0, 0), "blue": (0, 0, 250)}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (40, 30), colour).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def draw(images, *argv) -> np.ndarray:
    file = images.parent / "gallery.png"
    gallery(["--dataset", str(images), "--model", "vit_nano_patch4_32", "--gallery", str(file), *argv])
    return np.asarray(Image.open(file).convert("RGB"))


def share_of(figure: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(figure.astype(int) - colour).max(axis=-1) < 8).mean())


def test_images_are_shown_as_they_are(images, capsys):
    figure = draw(images, "--gallery_images", "8", "--gallery_views", "2")
    assert capsys.readouterr().out.endswith("gallery.png: 8 images at 32 x 32 pixels\n")
    red, blue = share_of(figure, (250, 0, 0)), share_of(figure, (0, 0, 250))
    assert red == pytest.approx(blue, rel=0.2)
    assert red + blue > 0.8


def test_views_are_augmented_and_mixed(images):
    inverted = draw(images, "--auto_augment", "rand-m10-n1-inc1", "--gallery_views", "6")
    assert share_of(inverted, (250, 0, 0)) + share_of(inverted, (0, 0, 250)) < 0.8
    mixed = draw(images, "--mixup", "200", "--gallery_images", "8", "--gallery_views", "3")
    assert share_of(mixed, (125, 0, 125)) > 0.02
    assert mixed.shape[1] > draw(images, "--gallery_views", "3").shape[1]


def test_a_recipe_of_pretraining_mixes_nothing(images):
    assert draw(images, "--recipe", "cifar10_mae").shape == draw(images, "--min_crop", "0.5").shape


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gallery", "gallery.txt"], "gallery='gallery.txt' must end in one of .png"),
        (["--gallery", "nowhere/gallery.png"], "lies in a folder that does not exist"),
        (["--gallery_images", "0"], "gallery_images=0 must be at least 1"),
        (["--min_crop", "2"], "min_crop=2.0 must lie between 0 and 1"),
        (["--interpolation", "cubic"], "interpolation='cubic' must be bilinear or bicubic"),
        (["--model", "nothing"], "there is no model 'nothing'"),
        (["--streaming", "true"], "--streaming true has no images to choose from"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(images, argv, message, capsys):
    given = ["--dataset", str(images), "--model", "vit_nano_patch4_32", *argv]
    assert message in error_of(capsys, given, gallery)
