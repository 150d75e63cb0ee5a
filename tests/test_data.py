"""Data sets: where they come from, their splits and labels."""

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import Compose
from transformers import ViTImageProcessor

from trainers.arguments import AugmentationArguments, DataArguments
from trainers.augmentation import Augmentation, Crop
from trainers.data import label_names, load_splits, processor_transform, with_transform


def save_images(folder: Path, count: int, mode: str = "RGB", size: tuple[int, int] = (20, 16)) -> None:
    """`count` JPEG or PNG images of (width, height) `size` with random pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(folder.name))
    for index in range(count):
        pixels = generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        suffix = "png" if mode == "RGBA" else "jpg"
        Image.fromarray(pixels).convert(mode).save(folder / f"{index}.{suffix}")


def save_parquet(folder: Path, labels: list, feature: object, split: str = "train", images: list | None = None) -> str:
    """Images whose pixels are their row, unless others are given."""
    folder.mkdir(exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    images = images or [np.full((8, 8, 3), index, dtype=np.uint8) for index in range(len(labels))]
    rows = {"image": images, "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_digits_are_split_by_class_and_the_same_way_each_time():
    splits = load_splits(DataArguments(dataset="digits"))
    again = load_splits(DataArguments(dataset="digits"))
    other = load_splits(DataArguments(dataset="digits", split_seed=1))
    assert {name: len(split) for name, split in splits.items()} == {"train": 1437, "validation": 360}
    held_out = splits["validation"]
    assert held_out["label"][:] == again["validation"]["label"][:]
    assert held_out["label"][:] != other["validation"]["label"][:]
    assert np.bincount(held_out["label"]).min() >= 34
    assert label_names(splits) == list("0123456789")
    pixels = np.array(held_out[0]["image"])
    assert pixels.shape == (8, 8)
    assert pixels.max() == 255


def test_no_image_is_in_two_splits():
    splits = load_splits(DataArguments(dataset="digits"))
    train, held_out = ({np.array(image).tobytes() for image in split["image"]} for split in splits.values())
    assert not train & held_out
    assert len(train) + len(held_out) == 1797


@pytest.mark.parametrize("validation", ["val", "validation", "valid", "dev"])
def test_a_folder_keeps_its_own_splits(tmp_path, validation):
    for split, count in {"train": 3, validation: 2, "test": 1}.items():
        for name in ("cat", "dog"):
            save_images(tmp_path / split / name, count)
    splits = load_splits(DataArguments(dataset=str(tmp_path)))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 4, "test": 2}
    assert label_names(splits) == ["cat", "dog"]


def test_a_folder_without_splits_is_held_out_by_class(tmp_path):
    save_images(tmp_path / "cat", 30)
    save_images(tmp_path / "dog", 10)
    splits = load_splits(DataArguments(dataset=str(tmp_path)))
    assert np.bincount(splits["validation"]["label"]).tolist() == [6, 2]


def test_modes_and_sizes_become_rgb_batches(tmp_path):
    save_images(tmp_path / "grey", 4, mode="L", size=(30, 12))
    save_images(tmp_path / "transparent", 4, mode="RGBA", size=(9, 40))
    save_images(tmp_path / "print", 4, mode="CMYK")
    splits = load_splits(DataArguments(dataset=str(tmp_path), validation_fraction=0.5))
    processor = ViTImageProcessor(size={"height": 8, "width": 12})
    batch = with_transform(splits["train"], processor_transform(processor))[:]
    assert batch["pixel_values"].shape == (6, 3, 8, 12)
    assert sorted(batch["labels"]) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [
        ([5, 3] * 5, datasets.Value("int64"), {3: "3", 5: "5"}),
        (["b", "a"] * 5, datasets.Value("string"), {"a": "a", "b": "b"}),
        ([0, 1] * 5, datasets.ClassLabel(names=["no", "yes"]), {0: "no", 1: "yes"}),
    ],
)
def test_labels_of_any_kind_become_classes(tmp_path, labels, feature, expected):
    names = list(expected.values())
    splits = load_splits(DataArguments(dataset=save_parquet(tmp_path, labels, feature)))
    assert label_names(splits) == names
    # The images' pixels say which row was which.
    for row in splits["train"]:
        original = labels[np.array(row["image"])[0, 0, 0]]
        assert names[row["label"]] == expected[original]


def test_classes_may_be_called_like_splits(tmp_path):
    trees = {
        "test_tube": ["train/beaker", "train/test_tube", "val/beaker", "val/test_tube"],
        "train_station": ["beach", "train_station", "bullet_train"],
        "[a]": ["cat", "dog"],
    }
    for tree, folders in trees.items():
        for folder in folders:
            save_images(tmp_path / tree / folder, 4)
            (tmp_path / tree / folder / "0.jpg").rename(tmp_path / tree / folder / "0_test.jpg")
    found = {tree: load_splits(DataArguments(dataset=str(tmp_path / tree), validation_fraction=0.5)) for tree in trees}
    sizes = {tree: {name: len(split) for name, split in splits.items()} for tree, splits in found.items()}
    assert sizes["test_tube"] == {"train": 8, "validation": 8}
    assert sizes["train_station"] == {"train": 6, "validation": 6}
    assert sizes["[a]"] == {"train": 4, "validation": 4}
    assert label_names(found["train_station"]) == ["beach", "bullet_train", "train_station"]


def test_the_class_is_the_outer_folder(tmp_path):
    for name in ("cat", "dog"):
        for view in ("close", "far"):
            save_images(tmp_path / name / view, 2)
    splits = load_splits(DataArguments(dataset=str(tmp_path)))
    assert label_names(splits) == ["cat", "dog"]
    assert sum(map(len, splits.values())) == 8


def test_a_metadata_file_that_the_library_knows_gives_the_labels(tmp_path):
    save_images(tmp_path, 6)
    lines = [f"{index}.jpg,{'ab'[index % 2]}" for index in range(6)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert label_names(load_splits(DataArguments(dataset=str(tmp_path), validation_fraction=0.5))) == ["a", "b"]


def test_other_files_change_nothing(tmp_path):
    for name in ("cat", "dog"):
        save_images(tmp_path / name / "close", 4)
        (tmp_path / name / "metadata.txt").write_text("notes")
    assert label_names(load_splits(DataArguments(dataset=str(tmp_path)))) == ["cat", "dog"]


def test_split_folders_are_known_in_capitals(tmp_path):
    for split, count in {"Train": 3, "Val": 2}.items():
        for name in ("cat", "dog"):
            save_images(tmp_path / split / name, count)
    splits = load_splits(DataArguments(dataset=str(tmp_path)))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 4}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/cat", "train/dog", "test/cat", "annotations"], "'annotations' beside the splits train, test"),
        (["val/cat", "test/cat"], "has splits val, test but no 'train'"),
        (["train/cat", "train/dog", "val/cat", "val/cow"], "class 'cow' of split 'val' of .* has no folder in 'train'"),
        (["cat", "dog", "."], r"lies in no class folder \(2 of them"),
        (["train/cat", "train/dog", "val/cat", "dev/dog"], "has two validation splits: val, dev"),
        (["train/cat", "Train/dog", "test/cat"], "'train' beside the splits|'Train' beside the splits"),
    ],
)
def test_folders_that_make_no_sense_are_named(tmp_path, folders, message):
    for folder in folders:
        save_images(tmp_path / folder, 2)
    with pytest.raises(ValueError, match=message):
        load_splits(DataArguments(dataset=str(tmp_path)))


def test_an_empty_class_folder_is_named(tmp_path):
    for name in ("cat", "dog"):
        save_images(tmp_path / name, 2)
    (tmp_path / "zebra").mkdir()
    with pytest.raises(ValueError, match=r"class folder '.*zebra' holds no images"):
        load_splits(DataArguments(dataset=str(tmp_path)))


def test_a_folder_of_test_images_without_classes_is_left_out(tmp_path, capsys):
    for name in ("cat", "dog"):
        save_images(tmp_path / "train" / name, 5)
    save_images(tmp_path / "test", 3)
    assert list(load_splits(DataArguments(dataset=str(tmp_path)))) == ["train", "validation"]
    assert "3 images of the test split have no labels" in capsys.readouterr().out


def test_a_class_that_is_not_in_train_is_named(tmp_path):
    names = datasets.ClassLabel(names=["a", "b", "c"])
    save_parquet(tmp_path, [0, 1] * 5, names)
    save_parquet(tmp_path, [1, 2], names, split="validation")
    with pytest.raises(ValueError, match=r"class 'c' of split 'validation' of .* has no image in 'train'"):
        load_splits(DataArguments(dataset=str(tmp_path)))


def test_images_are_turned_as_the_camera_was_held(tmp_path):
    for name in ("cat", "dog"):
        save_images(tmp_path / name, 2)
        for path in (tmp_path / name).iterdir():
            pixels = np.zeros((12, 12, 3), dtype=np.uint8)
            pixels[:6] = 255
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned by 90 degrees clockwise
            Image.fromarray(pixels).save(path, exif=exif, quality=100)
    splits = load_splits(DataArguments(dataset=str(tmp_path), validation_fraction=0.5))
    processor = ViTImageProcessor(size={"height": 12, "width": 12})
    pixels = with_transform(splits["train"], processor_transform(processor))[0]["pixel_values"]
    assert pixels[:, :, :5].max() < -0.9
    assert pixels[:, :, 7:].min() > 0.9


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b""), "cannot be decoded"),
        (lambda path: path.write_bytes(path.read_bytes()[:-300]), "cannot be decoded .*[Tt]runcated"),
        (lambda path: path.write_text("no image"), "cannot be decoded"),
        (lambda path: Image.fromarray(np.zeros((4, 4), np.uint16)).save(path, format="png"), "mode I;16"),
    ],
)
def test_a_broken_image_is_found_before_training(tmp_path, spoil, message):
    save_images(tmp_path / "cat", 4)
    save_images(tmp_path / "dog", 4)
    spoil(tmp_path / "dog" / "2.jpg")
    with pytest.raises(ValueError, match=message) as raised:
        load_splits(DataArguments(dataset=str(tmp_path)))
    assert str(tmp_path / "dog" / "2.jpg") in str(raised.value)


def test_a_missing_image_is_found_before_training(tmp_path):
    images = [np.zeros((4, 4, 3), np.uint8), None] * 4
    save_parquet(tmp_path, [0, 0, 1, 1] * 2, datasets.Value("int64"), images=images)
    with pytest.raises(ValueError, match=r"image 1 of split 'train' of .* is missing"):
        load_splits(DataArguments(dataset=str(tmp_path)))


def test_a_test_split_without_labels_is_left_out(tmp_path):
    names = datasets.ClassLabel(names=["no", "yes"])
    save_parquet(tmp_path, [0, 1] * 5, names)
    save_parquet(tmp_path, [-1] * 3, names, split="test")
    assert list(load_splits(DataArguments(dataset=str(tmp_path)))) == ["train", "validation"]


def test_workers_of_any_start_method_can_take_the_transforms(tmp_path):
    splits = load_splits(DataArguments(dataset="digits"))
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    arguments = AugmentationArguments(rotation=5, auto_augment="rand-m9-mstd0.5-inc1")
    transform = Compose([Crop(arguments, (8, 8)), Augmentation(arguments, [0.5] * 3, [0.5] * 3)])
    for chosen in (transform, processor_transform(processor)):
        copied = pickle.loads(pickle.dumps(with_transform(splits["validation"], chosen)))
        assert copied[0]["pixel_values"].shape == (3, 8, 8)


def test_columns_can_be_named(tmp_path):
    features = datasets.Features(
        {"photo": datasets.Image(), "kind": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    rows = {"photo": [np.zeros((4, 4, 3), np.uint8)] * 8, "kind": ["x", "y"] * 4, "label": [0] * 8}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    splits = load_splits(DataArguments(dataset=str(tmp_path), label_column="kind"))
    assert label_names(splits) == ["x", "y"]
    with pytest.raises(
        ValueError, match="--label_column 'sort' is no column of the data set: it has photo, kind, label"
    ):
        load_splits(DataArguments(dataset=str(tmp_path), label_column="sort"))


def test_what_cannot_be_trained_on_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    save_images(tmp_path / "one" / "cat", 3)
    save_images(tmp_path / "rare" / "cat", 5)
    save_images(tmp_path / "rare" / "dog", 1)
    save_images(tmp_path / "file" / "cat", 1)
    cases = {
        "empty": "holds no images in class folders",
        "text": "class folder|holds no images",
        "one": "has only the class 'cat' to train on",
        "rare": "class 'dog' of .* has a single image",
        "file/cat/0.jpg": "is a file: give its folder",
        "nowhere": "there is no folder .*nowhere'",
    }
    with pytest.raises(ValueError, match="--dataset_config 'x' is for data sets on the Hub, not for 'digits'"):
        load_splits(DataArguments(dataset="digits", dataset_config="x"))
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as raised:
            load_splits(DataArguments(dataset=str(tmp_path / name)))
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, 1, -1] * 4, datasets.Value("int64"), r"label -1, outside 0\.\.1 \(4 of 12 images\)"),
        ([0.5] * 6, datasets.Value("float32"), "labels of .* are of type float32"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, feature, message):
    with pytest.raises(ValueError, match=message):
        load_splits(DataArguments(dataset=save_parquet(tmp_path, labels, feature)))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_share_must_be_a_share(fraction):
    with pytest.raises(ValueError, match=f"validation_fraction={fraction} must lie between 0 and 1"):
        load_splits(DataArguments(dataset="digits", validation_fraction=fraction))
