"""Data sets of labelled images: where they come from, their splits and labels, and batches for the model."""

import io
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import sklearn.datasets
from datasets import ClassLabel, Dataset, DatasetDict, Image
from datasets.utils import tqdm
from torch import Tensor
from transformers import BaseImageProcessor
from transformers.image_utils import load_image

from trainers.arguments import DataArguments


IMAGE, LABEL = "image", "label"
TRAIN, VALIDATION, TEST = "train", "validation", "test"
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
METADATA_FILES = ("metadata.csv", "metadata.jsonl")  # what the library's reader knows
BUILT_IN_TITLES = {"digits": "scikit-learn's handwritten digits"}
HUB_ID_SHAPE = "a Hub data set such as user/name"


def load_splits(arguments: DataArguments) -> DatasetDict:
    """Splits `train`, `validation` and perhaps `test`, each with a column `image` and a `ClassLabel` column `label`.

    Where there is no validation split, a stratified share of train is held out. A test split without labels is left
    out.

    Raises:
        ValueError: naming what is wrong with the data set: no images or broken ones, one class only, labels that are
            no classes.
    """
    splits = _load(arguments)
    if TRAIN not in splits:
        if len(splits) > 1:
            raise ValueError(f"data set {arguments.dataset!r} has splits {', '.join(splits)} but no {TRAIN!r}")
        splits = DatasetDict({TRAIN: next(iter(splits.values()))})
    validations = [name for name in VALIDATION_NAMES if name in splits]
    if len(validations) > 1:
        raise ValueError(f"data set {arguments.dataset!r} has two validation splits: {', '.join(validations)}")
    if validations:
        splits[VALIDATION] = splits.pop(validations[0])
    splits = DatasetDict({name: splits[name] for name in (TRAIN, VALIDATION, TEST) if name in splits})
    splits = _name_columns(splits, arguments)
    splits = _make_class_labels(splits, arguments.dataset)
    if TEST in splits and len(splits[TEST]) and all(map(_is_missing, splits[TEST][LABEL])):
        print(f"The {len(splits[TEST]):,} images of the test split have no labels: it is left out.")
        del splits[TEST]
    _check_labels(splits, arguments.dataset)
    _check_images(splits, arguments.dataset)
    if VALIDATION in splits:
        return splits
    return _hold_out(splits, arguments)


def label_names(splits: DatasetDict) -> list[str]:
    """Class names in the order of the class indices."""
    return list(splits[TRAIN].features[LABEL].names)


def with_transform(dataset: Dataset, transform: Callable) -> Dataset:
    """Decode images when they are asked for: rows become `pixel_values` (C, H, W) and `labels`."""

    return dataset.with_transform(partial(_make_batch, transform=transform))


def _make_batch(batch: dict, transform: Callable) -> dict:
    # As pipelines read images: turned as the camera was held, in RGB.
    images = [load_image(image) for image in batch[IMAGE]]
    return {"pixel_values": transform(images), "labels": batch[LABEL]}


def processor_transform(processor: BaseImageProcessor) -> Callable:
    """What the published image processor does, so that evaluation sees what a pipeline will see."""
    return partial(_process, processor=processor)


def _process(images: list[PIL.Image.Image], processor: BaseImageProcessor) -> Tensor:
    return processor(images, return_tensors="pt")["pixel_values"]


def load_digits() -> DatasetDict:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 pixels, in one split."""
    scans = sklearn.datasets.load_digits()
    pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features({IMAGE: Image(), LABEL: ClassLabel(names=[str(name) for name in scans.target_names])})
    rows = {IMAGE: list(pixels), LABEL: scans.target.tolist()}
    return DatasetDict({TRAIN: Dataset.from_dict(rows, features=features)})


def _load(arguments: DataArguments) -> DatasetDict:
    name = arguments.dataset
    if arguments.dataset_config is not None and (name in BUILT_IN_TITLES or Path(name).exists()):
        raise ValueError(f"--dataset_config {arguments.dataset_config!r} is for data sets on the Hub, not for {name!r}")
    if name in BUILT_IN_TITLES:
        return load_digits()
    folder = Path(name)
    if folder.is_dir():
        loaded = _load_folder(folder)
    elif folder.exists():
        raise ValueError(f"dataset {name!r} is a file: give its folder")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name!r}: give 'digits', a folder of images or {HUB_ID_SHAPE}")
    else:
        try:
            loaded = datasets.load_dataset(name, arguments.dataset_config)
        except Exception as error:
            # The Hub client and builders fail in many ways; each means that this name leads to no data.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"cannot load data set {name!r}: give 'digits', a folder of images or {HUB_ID_SHAPE} ({reason})"
            ) from error
    return loaded


def _load_folder(folder: Path) -> DatasetDict:
    try:
        if any(folder.rglob("*.parquet")):
            return datasets.load_dataset(str(folder))
        if any(path.name in METADATA_FILES for path in folder.rglob("metadata.*")):
            return datasets.load_dataset("imagefolder", data_dir=str(folder))
    except Exception as error:
        # Builders fail in many ways; each means that this folder leads to no data.
        raise ValueError(f"cannot load folder {str(folder)!r}: {' '.join(str(error).split())}") from error
    return _read_image_folder(folder)


def _read_image_folder(folder: Path) -> DatasetDict:
    """`class/**/image.jpg`, or the same below `train`, `val` and `test`.

    The library's own reader takes the innermost folder for the class, and finds a test split in `train/test_tube/`.
    """
    roots = {path.name.lower(): path for path in _sub_folders(folder)}
    found = {name: roots[name] for name in (TRAIN, *VALIDATION_NAMES, TEST) if name in roots}
    others = sorted(path.name for path in _sub_folders(folder) if path not in found.values())
    if found and others:
        raise ValueError(
            f"folder {str(folder)!r} holds {others[0]!r} beside the splits {', '.join(found)}: move it away, or the "
            "classes into their splits"
        )
    if found and TRAIN not in found:
        raise ValueError(f"folder {str(folder)!r} has splits {', '.join(found)} but no {TRAIN!r}")
    files = {split: _read_classes(root) for split, root in (found or {TRAIN: folder}).items()}
    names = sorted(files[TRAIN].keys() - {None})
    if not names:
        raise ValueError(
            f"folder {str(folder)!r} holds no images in class folders: expected class/image.jpg, "
            "train/class/image.jpg or parquet files"
        )
    features = datasets.Features({IMAGE: Image(), LABEL: ClassLabel(names=names)})
    splits = {}
    for split, by_class in files.items():
        unknown = sorted(by_class.keys() - {None, *names})
        if unknown:
            raise ValueError(f"class {unknown[0]!r} of split {split!r} of {str(folder)!r} has no folder in {TRAIN!r}")
        rows = [(str(path), name) for name, paths in by_class.items() for path in paths]
        labels = [-1 if name is None else names.index(name) for _, name in rows]
        splits[split] = Dataset.from_dict({IMAGE: [path for path, _ in rows], LABEL: labels}, features=features)
    return DatasetDict(splits)


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_classes(root: Path) -> dict[str | None, list[Path]]:
    """Images by the name of their class; None for those that lie in no class folder."""
    classes = {path.name: _find_images(path.rglob("*")) for path in _sub_folders(root)}
    empty = sorted(name for name, paths in classes.items() if not paths)
    if empty:
        raise ValueError(f"class folder {str(root / empty[0])!r} holds no images")
    loose = _find_images(root.iterdir())
    if classes and loose:
        raise ValueError(f"image {str(loose[0])!r} lies in no class folder ({len(loose)} of them beside the classes)")
    return classes or {None: loose}


def _find_images(paths: Iterable[Path]) -> list[Path]:
    suffixes = PIL.Image.registered_extensions()
    return sorted(path for path in paths if path.suffix.lower() in suffixes and path.is_file())


def _check_images(splits: DatasetDict, name: str) -> None:
    """Decode every image once, before hours of training end at the one that is broken."""
    for key, split in splits.items():
        encoded = split.cast_column(IMAGE, Image(decode=False))
        for row, image in enumerate(tqdm(encoded[IMAGE], desc=f"Reading {key} images", leave=False)):
            fault = _find_fault(image)
            if fault is not None:
                path = (image or {}).get("path")
                raise ValueError(f"image {row}{f' ({path})' if path else ''} of split {key!r} of {name!r} {fault}")


def _find_fault(image: dict | None) -> str | None:
    if image is None:
        return "is missing"
    try:
        with PIL.Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as decoded:
            decoded.load()
            if decoded.mode.startswith(("I", "F")):
                return f"has mode {decoded.mode}, which would be clipped: convert it to 8 bits a channel"
    except Exception as error:  # Pillow's readers fail in many ways
        return f"cannot be decoded ({' '.join(str(error).split())})"
    return None


def _name_columns(splits: DatasetDict, arguments: DataArguments) -> DatasetDict:
    features = splits[TRAIN].features
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    image = _choose_column("image", arguments.image_column, images, features)
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = labels or [name for name in ("label", "labels", "class", "target") if name in features]
    label = _choose_column("label", arguments.label_column, labels, features)
    splits = splits.select_columns([image, label])
    renamed = {old: new for old, new in ((image, IMAGE), (label, LABEL)) if old != new}
    return splits.rename_columns(renamed) if renamed else splits


def _choose_column(kind: str, wanted: str | None, found: list[str], features) -> str:
    if wanted is not None and wanted not in features:
        raise ValueError(f"--{kind}_column {wanted!r} is no column of the data set: it has {', '.join(features)}")
    if wanted is None and len(found) != 1:
        count = "no" if not found else "several"
        raise ValueError(f"the data set has {count} {kind} columns among {', '.join(features)}: pass --{kind}_column")
    return wanted or found[0]


def _make_class_labels(splits: DatasetDict, name: str) -> DatasetDict:
    """Strings and integers become classes, numbered in the sorted order of all splits' values."""
    feature = splits[TRAIN].features[LABEL]
    if isinstance(feature, ClassLabel):
        return splits
    dtype = getattr(feature, "dtype", str(feature))
    if not dtype.startswith(("int", "uint", "string", "large_string", "bool")):
        raise ValueError(f"labels of {name!r} are of type {dtype}: classes must be integers or strings")
    # A negative number stands for a missing label, as in test splits that are published without theirs.
    values = sorted({value for split in splits.values() for value in split.unique(LABEL) if not _is_missing(value)})
    index = {value: position for position, value in enumerate(values)}
    numbered = splits.map(
        lambda value: {LABEL: -1 if _is_missing(value) else index[value]},
        input_columns=LABEL,
        features=datasets.Features({**splits[TRAIN].features, LABEL: datasets.Value("int64")}),
        desc="Numbering classes",
    )
    return numbered.cast_column(LABEL, ClassLabel(names=[str(value) for value in values]))


def _is_missing(value: int | str | None) -> bool:
    return value is None or (isinstance(value, int) and value < 0)


def _check_labels(splits: DatasetDict, name: str) -> None:
    names = splits[TRAIN].features[LABEL].names
    for key, split in splits.items():
        if not len(split):
            raise ValueError(f"split {key!r} of {name!r} holds no images")
        labels = np.array([-1 if label is None else label for label in split[LABEL]])
        outside = labels[(labels < 0) | (labels >= len(names))]
        if outside.size:
            raise ValueError(
                f"split {key!r} of {name!r} has label {outside[0]}, outside 0..{len(names) - 1} "
                f"({outside.size} of {len(labels)} images)"
            )
        if split.features[LABEL].names != names:
            raise ValueError(f"split {key!r} of {name!r} has other classes than {TRAIN!r}")
    present = set(splits[TRAIN][LABEL])
    for key, split in splits.items():
        unseen = sorted(set(split[LABEL]) - present)
        if unseen:
            raise ValueError(f"class {names[unseen[0]]!r} of split {key!r} of {name!r} has no image in {TRAIN!r}")
    if len(present) < 2:
        only = f"only the class {names[next(iter(present))]!r}"
        raise ValueError(f"{name!r} has {only} to train on: a classifier needs at least two, one sub-folder for each")


def _hold_out(splits: DatasetDict, arguments: DataArguments) -> DatasetDict:
    fraction = arguments.validation_fraction
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction={fraction} must lie between 0 and 1")
    train = splits[TRAIN]
    counts = np.bincount(train[LABEL], minlength=len(train.features[LABEL].names))
    rare = [name for name, count in zip(train.features[LABEL].names, counts) if count == 1]
    if rare:
        raise ValueError(
            f"class {rare[0]!r} of {arguments.dataset!r} has a single image: "
            "a stratified validation split needs two of every class, or give one beside train"
        )
    try:
        held_out = train.train_test_split(fraction, stratify_by_column=LABEL, seed=arguments.split_seed)
    except ValueError as error:
        raise ValueError(
            f"{len(train)} images are too few to hold out a share of {fraction} of each class ({error})"
        ) from error
    return DatasetDict({**splits, TRAIN: held_out["train"], VALIDATION: held_out["test"]})
