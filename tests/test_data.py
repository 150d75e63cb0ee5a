"""Data sets: where they come from, their splits and labels."""

import functools
import http.server
import io
import json
import pickle
import re
import tarfile
import threading
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from modeling_vit_custom.command_line import say
from trainers.arguments import AugmentationArguments, DataArguments, ModelArguments
from trainers.augmentation import Augmentation, Crop
from trainers.data import (
    FetchError,
    ImagesInMemory,
    StreamedImages,
    as_it_comes,
    decode,
    label_names,
    load_splits,
    processor_transform,
    sample_images,
    training_images,
    with_transform,
)
from trainers.finetune import main as finetune
from trainers.models import make_model
from trainers.predict import ImageReader, Row
from trainers.predict import main as predict
from trainers.sampling import EpochBatches, RandomOrder
from trainers.streams import StreamBatches


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
    # Both are called by where they came from, as the card says it.
    assert {str(split.split) for split in splits.values()} == {"train"}


def test_modes_and_sizes_become_rgb_batches(tmp_path):
    save_images(tmp_path / "grey", 4, mode="L", size=(30, 12))
    save_images(tmp_path / "transparent", 4, mode="RGBA", size=(9, 40))
    save_images(tmp_path / "print", 4, mode="CMYK")
    splits = load_splits(DataArguments(dataset=str(tmp_path), validation_fraction=0.5))
    processor = ViTImageProcessor(size={"height": 8, "width": 12})
    batch = with_transform(splits["train"], processor_transform(processor))[:]
    assert batch["pixel_values"].shape == (6, 3, 8, 12)
    assert sorted(batch["labels"]) == [0, 0, 1, 1, 2, 2]


def test_large_photographs_are_decoded_a_few_at_once(tmp_path, monkeypatch):
    save_images(tmp_path / "a", 5, size=(20, 16))
    save_images(tmp_path / "b", 4, size=(10, 16))
    splits = load_splits(DataArguments(dataset=str(tmp_path), validation_fraction=0.25))
    processor, counts = ViTImageProcessor(size={"height": 8, "width": 8}), []

    def transform(images):
        counts.append(len(images))
        return processor_transform(processor)(images)

    whole = with_transform(splits["train"], transform)[:]
    monkeypatch.setattr("trainers.data.MAX_PIXELS", 640)  # two of the larger ones
    parts = with_transform(splits["train"], transform)[:]
    assert counts[0] == sum(counts[1:]) == 6
    assert len(counts) > 2
    assert torch.equal(whole["pixel_values"], parts["pixel_values"])


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
    with pytest.raises(ValueError, match=r"class 'c' of .* has no image in 'train'$"):
        load_splits(DataArguments(dataset=str(tmp_path)))


def test_classes_without_images_are_named(tmp_path):
    save_parquet(tmp_path, [0, 2] * 5, datasets.ClassLabel(names=["a", "b", "c", "d", "e"]))
    with pytest.raises(ValueError, match=r"class 'b' of .* has no image in 'train', and 2 more have none$"):
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
    with pytest.raises(ValueError, match=r"4 of 8 images of .*: row 1 of split 'train', row 3 .* is missing"):
        load_splits(DataArguments(dataset=str(tmp_path)))


def spoil_images(folder: Path) -> list[str]:
    """Seven broken images of 22, in two splits."""
    for split, count in {"train": 8, "val": 3}.items():
        for name in ("cat", "dog"):
            save_images(folder / split / name, count)
    broken = [*(f"train/dog/{index}.jpg" for index in range(6)), "val/cat/1.jpg"]
    for name in broken:
        (folder / name).write_bytes(b"no image")
    return [str(folder / name) for name in broken]


def test_all_broken_images_are_told_at_once(tmp_path):
    broken = spoil_images(tmp_path)
    with pytest.raises(ValueError, match=r"^7 of 22 images of .* cannot be used: .* \(the first cannot") as raised:
        load_splits(DataArguments(dataset=str(tmp_path)))
    told = f": {', '.join(broken[:5])} and 2 more (the first cannot be decoded (cannot identify image file"
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_broken_images_can_be_skipped(tmp_path, capsys):
    spoil_images(tmp_path)
    splits = load_splits(DataArguments(dataset=str(tmp_path), on_corrupt="skip"))
    assert "7 of 22 images of" in capsys.readouterr().out
    assert {name: np.bincount(split["label"]).tolist() for name, split in splits.items()} == {
        "train": [8, 2],
        "validation": [2, 3],
    }
    assert len([np.array(image) for split in splits.values() for image in split["image"]]) == 15
    for index in (6, 7):
        (tmp_path / "train" / "dog" / f"{index}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"class 'dog' of .* has no image in 'train'$"):
        load_splits(DataArguments(dataset=str(tmp_path), on_corrupt="skip"))


def test_a_class_is_not_held_out_altogether(tmp_path):
    save_parquet(tmp_path, [0] * 10 + [1] * 2, datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match=r"class 'b' of .* has no image in 'train'$"):
        load_splits(DataArguments(dataset=str(tmp_path), validation_fraction=0.8))


def test_a_test_split_without_labels_is_left_out(tmp_path):
    names = datasets.ClassLabel(names=["no", "yes"])
    save_parquet(tmp_path, [0, 1] * 5, names)
    save_parquet(tmp_path, [-1] * 3, names, split="test")
    assert list(load_splits(DataArguments(dataset=str(tmp_path)))) == ["train", "validation"]


def test_workers_of_any_start_method_can_take_the_transforms(tmp_path):
    splits = load_splits(DataArguments(dataset="digits"))
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    arguments = AugmentationArguments(rotation=5, auto_augment="rand-m9-mstd0.5-inc1")
    crop, augmentation = Crop(arguments, (8, 8)), Augmentation(arguments, [0.5] * 3, [0.5] * 3)
    copied = pickle.loads(pickle.dumps(training_images(splits["validation"], crop, augmentation)))
    assert copied.__getitems__([0, 3])["pixel_values"].shape == (2, 3, 8, 8)
    copied = pickle.loads(pickle.dumps(with_transform(splits["validation"], processor_transform(processor))))
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


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 must lie between 0 and 1"),
        ({"validation_fraction": -0.1}, "validation_fraction=-0.1 must lie between 0 and 1"),
        ({"on_corrupt": "ignore"}, "on_corrupt='ignore' must be error or skip"),
        ({"shuffle_buffer": 0}, "shuffle_buffer=0 must be at least 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(field, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(dataset="digits", **field)


def test_nothing_is_held_out_where_a_test_split_is_enough(tmp_path):
    names = datasets.ClassLabel(names=["a", "b"])
    arguments = DataArguments(dataset=save_parquet(tmp_path, [0, 1] * 5, names), validation_fraction=0)
    with pytest.raises(ValueError, match=r"trains on all of .*: it needs a 'test' split with labels"):
        load_splits(arguments)
    save_parquet(tmp_path, [-1] * 4, names, split="test")
    with pytest.raises(ValueError, match="it needs a 'test' split with labels"):
        load_splits(arguments)
    save_parquet(tmp_path, [0, 1] * 2, names, split="test")
    assert {name: len(split) for name, split in load_splits(arguments).items()} == {"train": 10, "test": 4}
    save_parquet(tmp_path, [0, 1], names, split="validation")
    assert {name: len(split) for name, split in load_splits(arguments).items()} == {
        "train": 10,
        "validation": 2,
        "test": 4,
    }


# ------------------------------------------------------------------------------------------------------- class names


def save_names(folder: Path, names: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return str(folder / "names.txt")


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([2, 0, 1] * 5, datasets.Value("int64")),
        (["zébu", "gnu", "cow"] * 5, datasets.Value("string")),
        ([2, 0, 1] * 5, datasets.ClassLabel(names=["n01", "n02", "n03"])),
    ],
)
def test_a_file_names_the_classes(tmp_path, labels, feature):
    names = save_names(tmp_path, ["gnu", "cow", "zébu"])
    folder = save_parquet(tmp_path / "images", labels, feature)
    splits = load_splits(DataArguments(dataset=folder, class_names=names))
    assert label_names(splits) == ["gnu", "cow", "zébu"]
    for row in splits["train"]:
        assert row["label"] == (2, 0, 1)[np.array(row["image"])[0, 0, 0] % 3]


@pytest.mark.parametrize(
    ("names", "labels", "feature", "message"),
    [
        (["a", "b"], [0, 3, 2], "int64", "has label 3, which is none of the 2 classes of --class_names '.*names.txt'"),
        (["a", "b"], ["a", "c", "b"], "string", "has label 'c', which is none of the 2 classes"),
        (["a", "b", "c"], [0, 1, 0], "int64", "class 'c' of .* has no image in 'train'"),
        (["a", "", "b"], [0, 1, 2], "int64", "names.txt' has an empty line"),
        ([], [0, 1, 2], "int64", "names.txt' names no classes"),
        (["a", "crane", "crane"], [0, 1, 2], "int64", "has 2 classes called 'crane'"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, names, labels, feature, message):
    arguments = {"dataset": save_parquet(tmp_path / "images", labels * 4, datasets.Value(feature))}
    with pytest.raises(ValueError, match=message):
        load_splits(DataArguments(**arguments, class_names=save_names(tmp_path, names)))
    with pytest.raises(ValueError, match=r"--class_names 'nowhere\.txt' is no file"):
        load_splits(DataArguments(**arguments, class_names="nowhere.txt"))


# ------------------------------------------------------------------------------------------------- shards and streams


def save_shard(path: Path, rows: dict[int, object], suffix: str = "cls") -> None:
    """A WebDataset shard of images whose pixels are the key of their row, with its label beside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for key, label in rows.items():
            image = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), key, dtype=np.uint8)).save(image, "png")
            files = {"png": image.getvalue()} | ({} if label is None else {suffix: str(label).encode()})
            for extension, content in files.items():
                entry = tarfile.TarInfo(f"{key:05}.{extension}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


def save_shards(folder: Path) -> str:
    """30 images in two shards to train on, 6 for validation; the class is the pixel modulo 3."""
    for name, keys in {"train-0000": range(16), "train-0001": range(16, 30), "val-0000": range(100, 106)}.items():
        save_shard(folder / f"{name}.tar", {key: key % 3 for key in keys})
    return str(folder)


def read_pixels(rows) -> list[tuple[int, int]]:
    return [(int(np.array(row["image"])[0, 0, 0]), row["label"]) for row in rows]


@pytest.fixture
def no_delay(monkeypatch):
    """The library waits 5 s at the end of some streams, for threads of Arrow."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def test_shards_are_read(tmp_path):
    splits = load_splits(DataArguments(dataset=save_shards(tmp_path / "[a] b")))
    assert label_names(splits) == ["0", "1", "2"]
    assert read_pixels(splits["train"]) == [(key, key % 3) for key in range(30)]
    assert read_pixels(splits["validation"]) == [(key, key % 3) for key in range(100, 106)]


@pytest.mark.parametrize(
    ("shards", "sizes"),
    [
        (["a.tar", "b-1.tar"], {"train": 16, "validation": 4}),
        (["train/0.tar", "train/1.tar", "val/0.tar", "test/0.tar"], {"train": 20, "validation": 10, "test": 10}),
        (["x-train-00.tar", "x-validation-00.tar"], {"train": 10, "validation": 10}),
        (["TRAIN_0.tar", "dev0.tar", "test.0.tar"], {"train": 10, "validation": 10, "test": 10}),
        (["training-0.tar", "devices-0.tar"], {"train": 16, "validation": 4}),
    ],
)
def test_the_splits_of_shards_are_in_their_names(tmp_path, shards, sizes):
    for number, shard in enumerate(shards):
        save_shard(tmp_path / shard, {10 * number + index: index % 2 for index in range(10)})
    splits = load_splits(DataArguments(dataset=str(tmp_path)))
    assert {name: len(split) for name, split in splits.items()} == sizes


def test_shards_of_test_images_without_labels_are_left_out(tmp_path, no_delay, capsys):
    folder, names = save_shards(tmp_path), save_names(tmp_path, ["a", "b", "c"])
    save_shard(tmp_path / "z-test-0.tar", {200 + index: None for index in range(3)})
    for streaming in (False, True):
        splits = load_splits(DataArguments(dataset=folder, class_names=names, streaming=streaming))
        assert list(splits) == ["train", "validation"]
        assert "left out" in capsys.readouterr().out


def test_classes_of_shards_may_be_names(tmp_path):
    rows = {index: ("cat", "dog")[index % 2] for index in range(10)}
    save_shard(tmp_path / "names" / "0.tar", rows, suffix="txt")
    splits = load_splits(DataArguments(dataset=str(tmp_path / "names"), label_column="txt"))
    assert label_names(splits) == ["cat", "dog"]
    save_shard(tmp_path / "numbers" / "0.tar", rows)
    with pytest.raises(ValueError, match=r"b'cat' \(\.cls files hold numbers; names belong in \.txt files"):
        load_splits(DataArguments(dataset=str(tmp_path / "numbers")))


def test_an_archive_beside_images_changes_nothing(tmp_path):
    for name in ("cat", "dog"):
        save_images(tmp_path / name, 4)
    save_shard(tmp_path / "backup.tar", {0: 0})
    assert label_names(load_splits(DataArguments(dataset=str(tmp_path)))) == ["cat", "dog"]


@pytest.fixture(params=["shards", "parquet"])
def streamable(request, tmp_path, no_delay) -> DataArguments:
    """30 images to train on, 6 for validation; the class is the pixel modulo 3."""
    if request.param == "shards":
        names = save_names(tmp_path, ["a", "b", "c"])
        return DataArguments(dataset=save_shards(tmp_path / "images"), class_names=names)
    feature = datasets.ClassLabel(names=["a", "b", "c"])
    save_parquet(tmp_path, [key % 3 for key in range(30)], feature)
    return DataArguments(dataset=save_parquet(tmp_path, [0, 1, 2] * 2, feature, split="validation"))


def test_a_stream_holds_what_a_reading_holds(streamable):
    crop = Crop(AugmentationArguments(), (6, 6))
    processor = processor_transform(ViTImageProcessor(size={"height": 6, "width": 6}))
    read = load_splits(streamable)
    streamed = load_splits(replace(streamable, streaming=True, shuffle_buffer=8), seed=1)
    assert label_names(streamed) == label_names(read)
    assert read_pixels(streamed["validation"]) == read_pixels(read["validation"])
    kept = training_images(read["train"], crop).__getitems__(list(range(30)))
    passes = read_stream(training_images(streamed["train"], crop), 45)
    expected, *found = (
        [(image.numpy().tobytes(), label) for image, label in zip(batch["pixel_values"], batch["labels"].tolist())]
        for batch in (kept, passes)
    )
    assert set(found[0][:30]) == set(expected)
    assert len(set(expected)) == len(set(passes["numbers"][:30])) == 30
    assert len(set(found[0][30:])) == 15
    assert found[0][:15] != found[0][30:]
    evaluated = [list(with_transform(split["validation"], processor)) for split in (read, streamed)]
    for row, other in zip(*evaluated, strict=True):
        assert torch.equal(row["pixel_values"], other["pixel_values"])
        assert row["labels"] == other["labels"]


def read_stream(images: StreamedImages, count: int, batch_size: int = 5, **options) -> dict:
    """The first images of a stream, as one batch."""
    batches = islice(StreamBatches(images.stream, batch_size, **options), count // batch_size)
    read = [images.__getitems__(batch) for batch in batches]
    return {
        "pixel_values": torch.cat([batch["pixel_values"] for batch in read]),
        "labels": torch.cat([batch["labels"] for batch in read]),
        "numbers": [number for batch in read for number in batch["numbers"]],
    }


def test_a_stream_is_shuffled_by_its_seed_and_anew_in_each_epoch(streamable):
    def order(seed: int, epoch: int = 0) -> list[tuple[int, int]]:
        train = load_splits(replace(streamable, streaming=True), seed)["train"]
        train.set_epoch(epoch)
        return read_pixels(train)

    orders = [order(seed=1), order(seed=2), order(seed=1, epoch=1)]
    assert order(seed=1) == orders[0]
    assert len(set(map(tuple, orders))) == 3
    assert all(sorted(found) == [(key, key % 3) for key in range(30)] for found in orders)


def test_a_stream_passes_broken_images(tmp_path, no_delay, capsys):
    feature, broken = datasets.ClassLabel(names=["a", "b"]), b"no image"
    images = [np.full((4, 4, 3), index, np.uint8) for index in range(6)]
    images[1], images[4] = {"path": "one.jpg", "bytes": broken}, {"path": None, "bytes": broken}
    folder = save_parquet(tmp_path, [0, 1] * 3, feature, images=images)
    save_parquet(tmp_path, [0, 1] * 2, feature, split="test", images=[{"path": "x.jpg", "bytes": broken}] * 4)
    arguments = DataArguments(dataset=folder, validation_fraction=0, streaming=True)
    crop = Crop(AugmentationArguments(), (4, 4))
    splits = load_splits(arguments)
    with pytest.raises(
        ValueError, match=r"^image (one.jpg|without a name, of label 0) of the stream cannot be decoded"
    ):
        read_stream(training_images(splits["train"], crop), 6, batch_size=3)
    train = training_images(splits["train"], crop, on_corrupt="skip")
    for _ in range(2):
        assert sorted(read_stream(train, 6, batch_size=3)["pixel_values"][:, 0, 0, 0].tolist()) == [0, 2, 3, 5]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" of the stream")[0] for line in sorted(lines)] == [
        "Image one.jpg",
        "Image without a name, of label 0",
    ]
    with pytest.raises(ValueError, match="none of 2 images of the stream, one after the other, can be decoded"):
        read_stream(training_images(splits["test"], crop, on_corrupt="skip"), 4, batch_size=2)
    assert sample_images(splits["test"], 3) == []
    assert len(sample_images(splits["train"], 3)) == 3


def test_what_cannot_be_streamed_is_named(tmp_path, no_delay):
    save_images(tmp_path / "images" / "cat", 2)
    save_parquet(tmp_path / "integers", [0, 1], datasets.Value("int64"))
    save_parquet(tmp_path / "train", [0, 1], datasets.ClassLabel(names=["a", "b"]))
    save_parquet(tmp_path / "tested", [0, 1], datasets.ClassLabel(names=["a", "b"]))
    save_parquet(tmp_path / "tested", [0, 1], datasets.ClassLabel(names=["a", "b"]), split="test")
    save_parquet(tmp_path / "one", [0, 0], datasets.ClassLabel(names=["a"]))
    cases = {
        "digits": "--streaming true is not for 'digits', which is in memory anyway",
        str(tmp_path / "images"): "folders of images are read image by image anyway",
        str(tmp_path / "integers"): "whose classes a stream does not know: pass --class_names",
        str(tmp_path / "train"): "give it a 'validation' split, or a 'test' split and --validation_fraction 0",
        str(tmp_path / "tested"): "give it a 'validation' split, or a 'test' split and --validation_fraction 0",
        str(tmp_path / "one"): "has only the class 'a'",
    }
    for dataset, message in cases.items():
        with pytest.raises(ValueError, match=message) as raised:
            load_splits(DataArguments(dataset=dataset, streaming=True))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_of_a_stream_are_checked_as_they_come(tmp_path, no_delay, label):
    feature = datasets.Value("int64")
    save_parquet(tmp_path, [0, 1, label], feature)
    save_parquet(tmp_path, [0, 1], feature, split="validation")
    names = save_names(tmp_path, ["a", "b"])
    splits = load_splits(DataArguments(dataset=str(tmp_path), class_names=names, streaming=True))
    with pytest.raises(ValueError, match=f"label {label}, outside 0..1|[Cc]lass label {label} greater than"):
        read_stream(training_images(splits["train"], Crop(AugmentationArguments(), (8, 8))), 3, batch_size=3)


# -------------------------------------------------------------------------------------------------- images in memory


def save_photographs(folder: Path) -> str:
    for index, (name, mode) in enumerate([("cat", "RGB"), ("dog", "L"), ("gnu", "RGBA")]):
        save_images(folder / name, 5, mode, size=(20 + index, 30 - index))
    return str(folder)


def read_batches(images: torch.utils.data.Dataset, workers: int = 0) -> list[dict]:
    batches = EpochBatches(RandomOrder(len(images), seed=1), 4)
    return list(DataLoader(images, batch_sampler=batches, collate_fn=as_it_comes, num_workers=workers))


def same(batch: dict, other: dict) -> bool:
    return batch.keys() == other.keys() and all(
        batch[name] == other[name] if name == "numbers" else torch.equal(batch[name], other[name]) for name in batch
    )


@pytest.mark.parametrize("options", [{}, {"interpolation": "bicubic", "crop_padding": 2}])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_in_memory_are_those_of_the_files(tmp_path, options, workers, monkeypatch):
    arguments = AugmentationArguments(**options)
    crop, augmentation = Crop(arguments, (8, 12)), Augmentation(arguments, [0.5] * 3, [0.5] * 3)
    train = load_splits(DataArguments(dataset=save_photographs(tmp_path)))["train"]
    kept = [training_images(train, crop), training_images(train, crop, augmentation)]
    assert all(isinstance(images, ImagesInMemory) for images in kept)
    monkeypatch.setattr("trainers.data.MAX_BYTES_IN_MEMORY", len(train) * 3 * 8 * 12 - 1)
    decoded = [training_images(train, crop), training_images(train, crop, augmentation)]
    assert not any(isinstance(images, ImagesInMemory) for images in decoded)
    for ours, theirs in zip(kept, decoded):
        for batch, other in zip(read_batches(ours, workers), read_batches(theirs, workers), strict=True):
            assert same(batch, other)
            assert batch["pixel_values"].dtype == other["pixel_values"].dtype


def test_random_crops_follow_from_the_sight_alone(tmp_path):
    """Not from the worker, the images beside it or what was drawn before; and models draw as without them."""
    train = load_splits(DataArguments(dataset=save_photographs(tmp_path)))["train"]
    arguments = AugmentationArguments(min_crop=0.3, erasing=0.5, auto_augment="rand-m9-mstd0.5-inc1")
    augmentation = Augmentation(arguments, [0.5] * 3, [0.5] * 3)
    images = training_images(train, Crop(arguments, (8, 8)), augmentation, seed=3)
    count = len(train)
    state = torch.get_rng_state()
    first, later = images.__getitems__([0, 5, 7]), images.__getitems__([count, 7, 5 + count, 0])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["pixel_values"][[2, 0]], later["pixel_values"][[1, 3]])
    assert not torch.equal(first["pixel_values"][1], later["pixel_values"][2])
    assert torch.equal(first["labels"], later["labels"][[0, 2, 1]])
    other_seed = training_images(train, Crop(arguments, (8, 8)), augmentation, seed=4).__getitems__([0, 5, 7])
    assert not torch.equal(first["pixel_values"], other_seed["pixel_values"])
    for batch, other in zip(read_batches(images, 0), read_batches(images, 2), strict=True):
        assert same(batch, other)


def test_a_stream_goes_on_where_it_was_left(streamable, tmp_path):
    """Also in the second pass, and after images that were skipped: the same images, drawn from by the same numbers."""
    arguments = AugmentationArguments(min_crop=0.5, erasing=0.5)
    crop, augmentation = Crop(arguments, (6, 6)), Augmentation(arguments, [0.5] * 3, [0.5] * 3)

    def stream() -> tuple[StreamedImages, StreamBatches]:
        splits = load_splits(replace(streamable, streaming=True, shuffle_buffer=8), seed=1)
        images = training_images(splits["train"], crop, augmentation, seed=1)
        return images, StreamBatches(images.stream, 4)

    images, batches = stream()
    unbroken = [images.__getitems__(batch) for batch in islice(batches, 20)]
    batches.save(tmp_path, 12)  # of 30 images a pass, in the second one, and what was read beyond is forgotten
    images, resumed = stream()
    resumed.load(tmp_path, 12)
    going_on = list(islice(resumed, 20))
    assert going_on[:12] == [[]] * 12
    for batch, other in zip(unbroken[12:], going_on[12:], strict=True):
        assert same(batch, images.__getitems__(other))


def test_processes_that_were_fewer_go_on_from_one_place(streamable, tmp_path, capsys):
    splits = load_splits(replace(streamable, streaming=True, shuffle_buffer=8), seed=1)
    stream = training_images(splits["train"], Crop(AugmentationArguments(), (6, 6))).stream
    for rank, taken in ((0, 5), (1, 1)):  # one that is ahead of the other
        batches = StreamBatches(stream, 4, rank, 2)
        list(islice(batches, taken))
        batches.positions[7] = batches.positions[taken]
        batches.save(tmp_path, 7)
    starts = []
    for rank in range(3):
        batches = StreamBatches(stream, 4, rank, 3)
        batches.load(tmp_path, 7)
        starts.append(batches.start)
    assert len(set(starts)) == 1 and starts[0].epoch == 1
    assert "was read by 2 processes and is by 3 now" in capsys.readouterr().out


@pytest.mark.parametrize(("shards", "world"), [(4, 2), (3, 2), (1, 3)])
def test_processes_share_a_stream_without_duplicates_or_a_missing_tail(tmp_path, shards, world, no_delay):
    names, shard_of = save_names(tmp_path, ["a", "b"]), []
    for shard in range(shards):
        keys = [key for key in range(24) if key % shards == shard]
        images = [np.full((4, 4, 3), key, np.uint8) for key in keys]
        folder = save_parquet(tmp_path / f"{shard}", [key % 2 for key in keys], datasets.Value("int64"), images=images)
        (Path(folder) / "train.parquet").rename(tmp_path / f"train-{shard}.parquet")
        shard_of.append(set(keys))
    save_parquet(tmp_path, [0, 1], datasets.Value("int64"), split="test")
    arguments = DataArguments(dataset=str(tmp_path), class_names=names, streaming=True, validation_fraction=0)
    images = training_images(load_splits(arguments)["train"], Crop(AugmentationArguments(), (4, 4)))
    for passes in (1, 2):
        count = 24 // world * passes
        reads = [read_stream(images, count, 4, rank=rank, world=world) for rank in range(world)]
        pixels = [read["pixel_values"][:, 0, 0, 0].tolist() for read in reads]
        seen = Counter(pixel for each in pixels for pixel in each[-24 // world :])
        assert seen == Counter(range(24))
        numbers = [number for read in reads for number in read["numbers"]]
        assert len(set(numbers)) == len(numbers) == 24 * passes
    if shards % world == 0:  # then nobody reads what others keep
        assert all(sum(bool(shard & set(each[:12])) for shard in shard_of) == shards // world for each in pixels)


# ---------------------------------------------------------------------------------------------------------- training


MODEL = ["--model", "vit_nano_patch2_8", "--per_device_train_batch_size", "4", "--report_to", "none"]


def train(folder: Path, **fields) -> dict:
    """Train for two steps and return what was logged."""
    flags = [f"--{name}={value}" for name, value in {"max_steps": 2, "disable_tqdm": True, **fields}.items() if value]
    finetune([*MODEL, "--output_dir", str(folder), *flags])
    return json.loads((folder / "all_results.json").read_text())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_is_trained_on_a_stream(streamable, tmp_path, capsys, workers):
    results = train(
        tmp_path / "out",
        dataset=streamable.dataset,
        class_names=streamable.class_names,
        streaming=True,
        dataloader_num_workers=workers,
    )
    assert results["train_loss"] > 0
    assert 0 <= results["validation_accuracy"] <= 1
    printed = capsys.readouterr().out
    assert "streamed train, streamed validation images; 2 steps" in printed
    assert printed.count("classified as") == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"the val(idation)? split \(6 images\)", card)  # as the data set calls it


def test_the_training_seed_shuffles_a_stream(tmp_path):
    for part in make_model(ModelArguments(model="vit_nano_patch2_8"), ["a", "b", "c"]):
        part.save_pretrained(tmp_path / "model")
    names = save_names(tmp_path, ["a", "b", "c"])
    fields = {"dataset": save_shards(tmp_path / "images"), "class_names": names, "model": str(tmp_path / "model")}
    results = [train(tmp_path / str(seed), **fields, streaming=True, seed=seed) for seed in (1, 2)]
    assert results[0]["train_loss"] != results[1]["train_loss"]


def test_a_model_is_trained_without_a_validation_split(tmp_path, capsys):
    names = datasets.ClassLabel(names=["a", "b"])
    save_parquet(tmp_path / "images", [0, 1] * 8, names)
    fields = {"dataset": save_parquet(tmp_path / "images", [0, 1, 0], names, split="test"), "validation_fraction": "0"}
    results = train(tmp_path / "out", **fields)
    assert "test_accuracy" in results
    assert not any(name.startswith(("eval", "validation")) for name in results)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert not any("eval_loss" in entry for entry in state["log_history"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "test split (3 images)" in card
    assert "| train | 16 |" in card
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(tmp_path / "again", **fields, load_best_model_at_end=True)
    error = capsys.readouterr().err
    assert "--load_best_model_at_end true needs a validation split" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_steps": None}, "--streaming true needs --max_steps"),
        ({"repeated_augmentation": 2}, "--repeated_augmentation must know all training images beforehand"),
        ({"class_balanced_sampling": True}, "--class_balanced_sampling must know"),
        ({"class_weight_beta": 0.9}, "--class_weight_beta must know"),
        ({"logit_adjustment": 1.0}, "--logit_adjustment must know"),
        ({"unmixed_epochs": 1}, "--unmixed_epochs must know"),
        ({"unmasked_epochs": 1}, "--unmasked_epochs must know"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(fields, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path / "out", dataset="a/b", streaming=True, **fields)
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("on_device", [True, False])
def test_training_is_the_same_from_memory_as_from_files(tmp_path, monkeypatch, on_device):
    def losses(folder: Path) -> float:
        return train(
            folder,
            dataset=str(tmp_path / "images"),
            crop_padding=2,
            horizontal_flip=0.5,
            augment_on_device=str(on_device),
        )["train_loss"]

    save_photographs(tmp_path / "images")
    from_memory = losses(tmp_path / "memory")
    monkeypatch.setattr("trainers.data.MAX_BYTES_IN_MEMORY", 0)
    assert losses(tmp_path / "files") == from_memory


# ------------------------------------------------------------------------------------------------------------- subsets


def count_classes(**arguments) -> np.ndarray:
    return np.bincount(load_splits(DataArguments(dataset="digits", **arguments))["train"]["label"], minlength=10)


def list_images(**arguments) -> set[bytes]:
    train = load_splits(DataArguments(dataset="digits", **arguments))["train"]
    return {np.array(image).tobytes() for image in train["image"]}


def test_a_share_of_each_class_is_part_of_a_larger_one():
    whole, half, tenth = (count_classes(train_fraction=fraction) for fraction in (1, 0.5, 0.1))
    assert np.abs(half - whole / 2).max() <= 0.5 and np.abs(tenth - whole / 10).max() <= 0.5
    assert list_images(train_fraction=0.1) < list_images(train_fraction=0.5) < list_images()
    others = load_splits(DataArguments(dataset="digits", train_fraction=0.5))
    assert len(others["validation"]) == 360
    assert list_images(train_fraction=0.1) == list_images(train_fraction=0.1)
    assert list_images(train_fraction=0.1) != list_images(train_fraction=0.1, split_seed=1)
    assert (count_classes(train_fraction=1e-6) == 1).all()


def test_classes_become_rarer_exponentially():
    whole, counts = count_classes(), count_classes(train_imbalance=100)
    shares = counts / whole
    assert counts[0] == whole[0] and counts[-1] == max(1, round(whole[-1] / 100))
    np.testing.assert_allclose(shares[:6], 100 ** -(np.arange(6) / 9), atol=0.005)
    assert list_images(train_imbalance=100, train_fraction=0.5) < list_images(train_imbalance=100)


def test_images_without_classes_are_thinned_out_together(tmp_path):
    folder = save_parquet(tmp_path, [-1] * 20, datasets.ClassLabel(names=["a", "b"]))
    arguments = DataArguments(dataset=folder, validation_fraction=0.2, train_fraction=0.5)
    assert len(load_splits(arguments, needs_labels=False)["train"]) == 8
    with pytest.raises(ValueError, match=r"--train_imbalance 2.0 needs a class for every image, which '.*' does not"):
        load_splits(replace(arguments, train_imbalance=2.0), needs_labels=False)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"train_fraction": 0}, "train_fraction=0 must be above 0 and at most 1"),
        ({"train_fraction": 1.1}, "train_fraction=1.1 must be above 0 and at most 1"),
        ({"train_imbalance": 0.5}, "train_imbalance=0.5 must be at least 1"),
        ({"train_fraction": 0.5, "streaming": True}, "--train_fraction must know all training images beforehand"),
        ({"train_imbalance": 2.0, "streaming": True}, "--train_imbalance must know all training images beforehand"),
    ],
)
def test_shares_that_make_no_sense_are_refused(field, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(dataset="digits", **field)


# ----------------------------------------------------------------------------------------------------------- elsewhere


@pytest.fixture
def server(tmp_path):
    """Images on loopback, and the address of their folder."""
    save_images(tmp_path / "served", 1, "RGBA")
    (tmp_path / "served" / "text.png").write_text("no image")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            return self.send_error(503) if self.path == "/lost.png" else super().do_GET()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_that_cannot_be_fetched_is_not_a_broken_one(server, tmp_path):
    fetched = decode({"bytes": None, "path": f"{server}/0.png"})
    with Image.open(tmp_path / "served" / "0.png") as image:
        assert fetched.mode == "RGB" and fetched.size == image.size
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode({"bytes": None, "path": f"{server}/text.png"})
    with pytest.raises(ValueError, match="is not there"):
        decode({"bytes": None, "path": f"{server}/gone.png"})
    with pytest.raises(FetchError, match=r"lost\.png cannot be fetched"):
        decode({"bytes": None, "path": f"{server}/lost.png"})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_cannot_be_fetched_ends_a_prediction_in_a_line(server, num_workers):
    path = f"{server}/lost.png"
    batch = [(0, 0, Row(path, path, {"bytes": None, "path": path}))]
    reader = ImageReader(lambda images: torch.zeros(len(images), 3, 8, 8))
    loader = DataLoader(reader, batch_sampler=[batch], num_workers=num_workers, collate_fn=as_it_comes)
    with pytest.raises(FetchError) as error:
        next(iter(loader))
    assert say(error.value).startswith(f"image {path} cannot be fetched (")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_all_that_a_process_of_a_data_loader_says_is_told(num_workers):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise RuntimeError("first: this\n  and then that")

    with pytest.raises(RuntimeError) as error:
        next(iter(DataLoader(Broken(), num_workers=num_workers)))
    assert say(error.value) == "first: this and then that"


@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
def test_no_image_of_a_stream_is_skipped_for_want_of_a_connection(server, on_corrupt):
    rows = [{"image": {"bytes": None, "path": f"{server}/{name}"}, "label": 0} for name in ("0.png", "lost.png")]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    stream = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    images = StreamedImages(stream, Crop(AugmentationArguments(), (8, 8)), None, 0, on_corrupt)
    encoded = list(stream.cast_column("image", datasets.Image(decode=False)))
    assert images.__getitems__([(0, encoded[0])])["pixel_values"].shape == (1, 3, 8, 8)
    with pytest.raises(FetchError, match=r"lost\.png"):
        images.__getitems__(list(enumerate(encoded)))


def save_addresses(folder: Path, addresses: list[str], split: str) -> None:
    """A parquet file of images that lie elsewhere, of two classes."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = [{"image": {"bytes": None, "path": path}, "label": row % 2} for row, path in enumerate(addresses)]
    folder.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=features.arrow_schema)  # datasets itself would fetch them
    pq.write_table(table, folder / f"{split}.parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_training_ends_in_a_line_where_images_cannot_be_fetched(server, streaming, tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "run"
    save_addresses(data, 4 * [f"{server}/0.png"], "test")
    save_addresses(data, 3 * [f"{server}/0.png"] + [f"{server}/lost.png"], "train")
    argv = ["--dataset", str(data), "--model", "vit_nano_patch2_8", "--output_dir", str(output), "--use_cpu", "true"]
    argv += ["--per_device_train_batch_size", "2", "--max_steps", "4", "--on_corrupt", "skip", "--report_to", "none"]
    argv += ["--validation_fraction", "0", "--eval_strategy", "no", "--disable_tqdm", "true"]
    with pytest.raises(SystemExit) as exit_:
        finetune([*argv, "--streaming", str(streaming).lower()])
    said = exit_.value.code if streaming else capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and f"image {server}/lost.png cannot be fetched (" in said
    assert streaming or exit_.value.code == 2


def test_predictions_end_in_a_line_where_images_cannot_be_fetched(server, tmp_path):
    make_model(ModelArguments("vit_nano_patch2_8"), ["a", "b"])[0].save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    save_addresses(tmp_path / "data", [f"{server}/{name}.png" for name in ("0", "gone", "lost")], "test")
    argv = [str(tmp_path / "model"), str(tmp_path / "data" / "test.parquet"), "--output", str(tmp_path / "out.csv")]
    with pytest.raises(SystemExit) as exit_:
        predict(argv)
    assert len(exit_.value.code.splitlines()) == 1 and "nothing is lost: settle that and go on by" in exit_.value.code
    with Image.open(tmp_path / "served" / "0.png") as image:
        image.save(tmp_path / "served" / "found.png")
    save_addresses(tmp_path / "data", [f"{server}/{name}.png" for name in ("0", "gone", "found")], "test")
    predict([*argv, "--overwrite"])
    rows = (tmp_path / "out.csv").read_text().splitlines()
    assert ["is not there" in row for row in rows] == [False, False, True, False]
