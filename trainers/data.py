"""Data sets of labelled images: where they come from, their splits and labels, and batches for the model."""

import atexit
import glob
import multiprocessing.util  # whose own work at the exit must come after ours
import os
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import fsspec.asyn
import numpy as np
import PIL.Image
import sklearn.datasets
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError
from datasets.utils import tqdm
from datasets.utils.file_utils import is_local_path, xopen
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import BaseImageProcessor

from modeling_vit_custom.command_line import say
from modeling_vit_custom.images import ClippedImageError, to_rgb
from trainers.arguments import DataArguments
from trainers.augmentation import Augmentation, Crop
from trainers.draws import Draws


IMAGE, LABEL = "image", "label"
# The last is what WebDataset shards call theirs.
LABEL_NAMES = ("label", "labels", "class", "target", "cls")
TRAIN, VALIDATION, TEST = "train", "validation", "test"
ALL = "all"  # of them together
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
METADATA_FILES = ("metadata.csv", "metadata.jsonl")  # what the library's reader knows
BUILT_IN_TITLES = {"digits": "scikit-learn's handwritten digits"}
HUB_ID_SHAPE = "a Hub data set such as user/name"
MAX_BYTES_IN_MEMORY = 2**30
IMAGES_FOR_THREADS = 256  # handed over at once, still encoded
IMAGES_OF_STREAM = 32  # decoded at once
MAX_PIXELS = 2**24  # of decoded images at once, as far as it is not a single one: 48 MiB of them

if hasattr(os, "register_at_fork"):  # there are systems without forks
    # With older versions a data loader's process would wait for ever for the thread that fetches files in this one.
    os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)

Splits = DatasetDict | IterableDatasetDict


def load_splits(arguments: DataArguments, seed: int = 0, needs_labels: bool = True) -> Splits:
    """Splits `train`, `validation` and `test`, each with a column `image` and a `ClassLabel` column `label`.

    Where there is no validation split, a stratified share of train is held out, or none is made if that share is 0. Of
    what is left to train on, a share is taken where one was asked for.
    A test split without labels is left out, and so are broken images if they are to be skipped.

    With `streaming` the splits are read as they come, train in an order that `seed` decides.

    Where labels are not needed, images without classes do as well: there is no column `label` then, nor in a stream.

    Raises:
        ValueError: naming what is wrong with the data set: no images or broken ones, one class only, labels that are
            no classes, classes without images, no split to evaluate on, nothing that can be streamed.
    """
    splits = _name_columns(_name_splits(_load(arguments, needs_labels), arguments.dataset), arguments, needs_labels)
    if arguments.streaming:
        return _prepare_streams(splits, arguments, seed)
    if not needs_labels:
        splits = _make_class_labels(splits, arguments) if _has_classes(splits) else splits.select_columns(IMAGE)
        splits = _check_images(splits, arguments)
        return thin_out(splits if VALIDATION in splits else _hold_out(splits, arguments, needs_labels), arguments)
    splits = _make_class_labels(splits, arguments)
    splits = _drop_unlabelled_test(splits)
    _check_labels(splits, arguments.dataset)
    splits = _check_images(splits, arguments)
    if VALIDATION not in splits:
        splits = _hold_out(splits, arguments, needs_labels)
    # Once more: images that were left out or held out may have been all of their class.
    _check_labels(splits, arguments.dataset)
    return thin_out(splits, arguments)


@dataclass(frozen=True)
class EvaluatedSplit:
    """Images to evaluate on.

    Attributes:
        name: What `load_evaluated` was asked for, or chose.
        images: With columns `image` and `label`.
        total: Images that these were drawn from; None of a stream.
        is_held_out: Whether they are a share of train that was held out.
    """

    name: str
    images: Dataset
    total: int | None
    is_held_out: bool


def load_evaluated(
    arguments: DataArguments, split: str | None = None, max_images: int | None = None, seed: int = 0
) -> EvaluatedSplit:
    """A split to evaluate on, with columns as `load_splits` gives them.

    Of other splits nothing is decoded unless `validation` is held out of them, which takes the same images as training
    does. A stream is read once; its images stay in memory, encoded.

    Args:
        arguments: As for training.
        split: train, validation, test, or `all` of what there is; without it test, or else validation.
        max_images: Take as many, drawn by `seed`; of a stream the first ones.

    Raises:
        ValueError: if there is no such split, or something is wrong with its images or labels.
    """
    name = arguments.dataset
    splits = _name_splits(_load(arguments, needs_labels=True, needs_train=False), name, needs_train=False)
    splits = _name_columns(splits, arguments, needs_labels=True)
    if not arguments.streaming:
        splits = _make_class_labels(splits, arguments)
        if split is None and len(splits) > 1:
            splits = _drop_unlabelled_test(splits)
    may_hold_out = TRAIN in splits and VALIDATION not in splits and not arguments.streaming
    known = [each for each in (TRAIN, VALIDATION, TEST) if each in splits or (each == VALIDATION and may_hold_out)]
    if split not in (None, ALL, *known):
        raise ValueError(f"{name!r} has no split {split!r}: give one of {', '.join([*known, ALL])}")
    if split is None:
        split = next(each for each in (TEST, VALIDATION, TRAIN) if each in known)
        if split == TRAIN:
            raise ValueError(f"the stream {name!r} has no other split than {TRAIN}: pass --split {TRAIN}")
    wanted, is_held_out = [each for each in splits if split in (each, ALL)], False
    if arguments.streaming:
        splits = DatasetDict({each: _read_stream(splits[each], max_images) for each in wanted})
        splits = _make_class_labels(splits, arguments)
    elif may_hold_out and split in (TRAIN, VALIDATION):
        if split == VALIDATION and arguments.validation_fraction == 0:
            raise ValueError(f"--validation_fraction 0 holds nothing out of {name!r}: pass --split {TRAIN} or {ALL}")
        if arguments.validation_fraction > 0:
            readable = _check_images(DatasetDict({TRAIN: splits[TRAIN]}), arguments)
            splits = _hold_out(readable, arguments, needs_labels=True)
            is_held_out = split == VALIDATION
        wanted = [split]
    images = datasets.concatenate_datasets([splits[each] for each in wanted])
    unlabelled = sum(map(_is_missing, images[LABEL]))
    if unlabelled:
        raise ValueError(f"{unlabelled:,} of {len(images):,} images of split {split!r} of {name!r} have no label")
    _check_range(images, split, name)
    total = None if arguments.streaming else len(images)
    is_drawn = max_images is not None and max_images < len(images)
    if is_drawn:
        images = images.select(sorted(np.random.default_rng(seed).permutation(len(images))[:max_images].tolist()))
    images = _check_images(DatasetDict({split: images}), arguments)[split]
    if total is not None and not is_drawn:
        total = len(images)  # less those that were left out
    if not len(images):
        raise ValueError(f"split {split!r} of {name!r} holds no images: there is nothing to evaluate on")
    return EvaluatedSplit(split, images, total, is_held_out)


def _read_stream(stream: IterableDataset, count: int | None) -> Dataset:
    rows = list(tqdm(islice(stream.cast_column(IMAGE, Image(decode=False)), count), desc="Reading images", leave=False))
    return Dataset.from_list(rows, features=stream.features)


def label_names(splits: Splits) -> list[str]:
    """Class names in the order of the class indices."""
    return list(splits[TRAIN].features[LABEL].names)


def training_images(
    split: Dataset | IterableDataset,
    crop: Crop,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    on_corrupt: str = "error",
) -> "TrainingImages | StreamedImages":
    """What a model is trained on: batches of `pixel_values` (B, C, H, W), `labels` and the images' `numbers`.

    Images that are not cropped at random are decoded once, if all of them fit into 1 GiB.

    Args:
        augmentation: Of the batches, where it is not left to the training device.
        seed: Of all that is drawn.
        on_corrupt: As in `with_transform`.
    """
    if isinstance(split, IterableDataset):
        return StreamedImages(split, crop, augmentation, seed, on_corrupt)
    height, width = crop.size
    if not crop.is_random and len(split) * 3 * height * width <= MAX_BYTES_IN_MEMORY:
        return ImagesInMemory(split, crop, augmentation, seed)
    return TrainingImages(split, crop, augmentation, seed)


class TrainingImages(torch.utils.data.Dataset):
    """The images of a split by the numbers of their sights, see `trainers.sampling`: batches come whole."""

    def __init__(self, split: Dataset, crop: Crop, augmentation: Augmentation | None, seed: int):
        self.rows = split.cast_column(IMAGE, Image(decode=False))
        self.crop, self.augmentation, self.seed = crop, augmentation, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: list[int]) -> dict[str, Tensor]:
        batch = self.read([number % len(self) for number in numbers], numbers)
        return _finish(batch, self.augmentation, self.seed, numbers)

    def read(self, rows: list[int], numbers: list[int]) -> dict[str, Tensor]:
        """8-bit pixels (B, C, H, W), and labels (B,) if there are any."""
        batch = self.rows[rows]
        images = [decode(image) for image in batch[IMAGE]]
        pixels = {"pixel_values": self.crop(images, Draws.of(self.seed, numbers, "crop"))}
        return pixels | ({"labels": torch.tensor(batch[LABEL])} if LABEL in batch else {})


class ImagesInMemory(TrainingImages):
    """The same, decoded once."""

    def __init__(self, split: Dataset, crop: Crop, augmentation: Augmentation | None, seed: int):
        super().__init__(split, crop, augmentation, seed)
        self.labels = torch.tensor(split[LABEL][:]) if LABEL in split.features else None
        self.pixels = torch.empty(len(split), 3, *crop.size, dtype=torch.uint8)
        resized = _map_images(lambda image: crop([decode(image)], Draws.any(1))[0], split, "Decoding train images")
        for row, pixels in enumerate(resized):
            self.pixels[row] = pixels

    def read(self, rows: list[int], numbers: list[int]) -> dict[str, Tensor]:
        pixels = {"pixel_values": self.pixels[rows]}
        return pixels if self.labels is None else pixels | {"labels": self.labels[rows]}


class StreamedImages(torch.utils.data.Dataset):
    """The images of a stream: batches of encoded rows with their numbers, from `trainers.streams`, are decoded."""

    def __init__(
        self, stream: IterableDataset, crop: Crop, augmentation: Augmentation | None, seed: int, on_corrupt: str
    ):
        self.stream = stream.cast_column(IMAGE, Image(decode=False))
        self.read = _StreamReader(stream, on_corrupt)
        self.crop, self.augmentation, self.seed = crop, augmentation, seed

    def __getitems__(self, numbered: list[tuple[int, dict]]) -> dict[str, Tensor]:
        numbers, rows = zip(*numbered)
        kept, images, labels = self.read([row[IMAGE] for row in rows], [row.get(LABEL) for row in rows])
        if not kept:
            raise BrokenImageError(f"none of {len(rows)} images of the stream, one after the other, can be decoded")
        numbers = [numbers[place] for place in kept]
        batch = {"pixel_values": self.crop(images, Draws.of(self.seed, numbers, "crop"))}
        batch |= {} if self.read.num_classes is None else {"labels": torch.tensor(labels)}
        return _finish(batch, self.augmentation, self.seed, numbers)


def _finish(batch: dict[str, Tensor], augmentation: Augmentation | None, seed: int, numbers: list[int]) -> dict:
    # Numbers stay a list, which no one moves to a GPU: what follows from them is drawn by the processor.
    if augmentation is not None:
        batch["pixel_values"] = augmentation(batch["pixel_values"], Draws.of(seed, numbers, "augmentation"))
    return batch | {"numbers": numbers}


def as_it_comes(batch: dict) -> dict:
    """For a data loader, which would make a batch of rows, where batches come whole."""
    return batch


def outlive_termination(_worker: int) -> None:
    """How a data loader's workers begin: a notice to stop may reach all processes, and these are needed for a while.

    The main process must call `kill_workers_at_exit`: the library would tell them to stop, and wait for ever.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_workers_at_exit() -> None:
    """Processes that this one has started go when it does, also after an error."""
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would make an error of it
    for process in multiprocessing.active_children():
        process.kill()


def with_transform(
    dataset: Dataset | IterableDataset, transform: Callable, on_corrupt: str = "error"
) -> Dataset | IterableDataset:
    """Decode images when they are asked for: rows become `pixel_values` (C, H, W) and `labels`.

    Args:
        transform: A list of RGB images to pixels (B, C, H, W).
        on_corrupt: What to do about an image of a stream that cannot be decoded: `error`, or `skip` its row.
    """
    encoded = dataset.cast_column(IMAGE, Image(decode=False))
    if isinstance(dataset, Dataset):
        return encoded.with_transform(partial(_make_batch, transform=transform))
    read = partial(_make_stream_batch, transform=transform, read=_StreamReader(dataset, on_corrupt))
    return encoded.map(read, batched=True, batch_size=IMAGES_OF_STREAM, remove_columns=list(dataset.features))


def _make_batch(batch: dict, transform: Callable) -> dict:
    labels = {"labels": batch[LABEL]} if LABEL in batch else {}
    parts = [transform(images) for images in split_by_pixels(map(decode, batch[IMAGE]))]
    return {"pixel_values": parts[0] if len(parts) == 1 else torch.cat(parts)} | labels


def split_by_pixels(images: Iterable[PIL.Image.Image]) -> Iterator[list[PIL.Image.Image]]:
    """Images in their order, as few at once as large ones need not to fill the memory."""
    together, pixels = [], 0
    for image in images:
        together.append(image)
        pixels += image.width * image.height
        if pixels > MAX_PIXELS:
            yield together
            together, pixels = [], 0
    if together:
        yield together


def _make_stream_batch(batch: dict, transform: Callable, read: "_StreamReader") -> dict:
    _, images, labels = read(batch[IMAGE], batch.get(LABEL, [None] * len(batch[IMAGE])))
    pixels = {"pixel_values": transform(images) if images else []}
    return pixels if read.num_classes is None else pixels | {"labels": labels}


class BrokenImageError(ValueError):
    """An image of a stream cannot be used."""


class _StreamReader:
    """Decodes what comes of a stream, and checks it."""

    def __init__(self, stream: IterableDataset, on_corrupt: str):
        self.num_classes = stream.features[LABEL].num_classes if LABEL in stream.features else None
        self.on_corrupt, self.skipped = on_corrupt, set()

    def __call__(
        self, encoded: Sequence[dict | None], classes: Sequence[int | None]
    ) -> tuple[list[int], list[PIL.Image.Image], list[int | None]]:
        """Places, images and labels of those that can be used."""
        places, images, labels = [], [], []
        for place, (image, label) in enumerate(zip(encoded, classes)):
            name = (image or {}).get("path") or f"without a name, of label {label}"
            if self.num_classes is not None and (label is None or not 0 <= label < self.num_classes):
                outside = f"outside 0..{self.num_classes - 1}"
                raise BrokenImageError(f"image {name} of the stream has label {label}, {outside}")
            try:
                images.append(decode(image))
            except ValueError as error:
                if self.on_corrupt == "error":
                    message = f"image {name} of the stream {error}; --on_corrupt skip leaves it out"
                    raise BrokenImageError(message) from error
                if name not in self.skipped:
                    print(f"Image {name} of the stream {error}: it is left out.")
                    self.skipped.add(name)
            else:
                places.append(place)
                labels.append(label)
        return places, images, labels


def sample_images(split: Dataset | IterableDataset, count: int) -> list[tuple[PIL.Image.Image, int]]:
    """Up to `count` images with their labels: drawn from the split, always the same, or the first ones of a stream."""
    encoded = split.cast_column(IMAGE, Image(decode=False))
    if isinstance(split, Dataset):
        encoded = encoded.select(np.random.default_rng(0).permutation(len(split)))
    return list(islice(_decode_readable(encoded), count))


def _decode_readable(rows: Iterable[dict]) -> Iterator[tuple[PIL.Image.Image, int]]:
    for row in rows:
        try:
            image = decode(row[IMAGE])
        except (ValueError, FetchError):
            continue
        yield image, row[LABEL]


class FetchError(OSError):
    """An image cannot be fetched from where it lies, which says nothing of the image."""


def decode(encoded: dict | None) -> PIL.Image.Image:
    """An image as pipelines read it, turned as the camera was held, in RGB, from its `bytes` or at its `path`.

    Raises:
        ValueError: saying what is wrong with it, without its name.
        FetchError: if it lies elsewhere, from where nothing is to be had now.
    """
    if encoded is None:
        raise ValueError("is missing")
    if encoded["bytes"] is None and encoded["path"] is not None and not is_local_path(encoded["path"]):
        encoded = encoded | {"bytes": _fetch(encoded["path"])}
    try:
        return to_rgb(Image().decode_example(encoded))
    except ClippedImageError:
        raise
    except Exception as error:  # Pillow's readers fail in many ways
        # An address in memory says nothing, and is another one next time.
        reason = re.sub(r"\s*<_io\.BytesIO object at 0x\w+>", "", str(error))
        raise ValueError(f"cannot be decoded ({' '.join(reason.split())})") from error


def _fetch(path: str) -> bytes:
    try:
        with xopen(path, "rb") as file:
            return file.read()
    except Exception as error:  # file systems and their networks fail in many ways
        if isinstance(error, FileNotFoundError) and _says_missing(error.__cause__):
            raise ValueError("is not there") from error
        cause = error.__cause__ or error
        raise FetchError(f"image {path} cannot be fetched ({type(cause).__name__}: {say(cause)})") from error


def _says_missing(cause: BaseException | None) -> bool:
    """Whether a file is not there that is said not to be found; fsspec says so of any failure on the web."""
    return cause is None or isinstance(cause, HfHubHTTPError) or getattr(cause, "status", None) in (404, 410)


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
    return DatasetDict({TRAIN: Dataset.from_dict(rows, features=features, split=datasets.Split.TRAIN)})


def _load(arguments: DataArguments, needs_labels: bool, needs_train: bool = True) -> Splits:
    name = arguments.dataset
    if arguments.dataset_config is not None and (name in BUILT_IN_TITLES or Path(name).exists()):
        raise ValueError(f"--dataset_config {arguments.dataset_config!r} is for data sets on the Hub, not for {name!r}")
    if name in BUILT_IN_TITLES:
        if arguments.streaming:
            raise ValueError(f"--streaming true is not for {name!r}, which is in memory anyway")
        return load_digits()
    folder = Path(name)
    if folder.is_dir():
        loaded = _load_folder(folder, arguments.streaming, needs_labels, needs_train)
    elif folder.exists():
        raise ValueError(f"dataset {name!r} is a file: give its folder")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name!r}: give 'digits', a folder of images or {HUB_ID_SHAPE}")
    else:
        try:
            loaded = datasets.load_dataset(name, arguments.dataset_config, streaming=arguments.streaming)
        except Exception as error:
            # The Hub client and builders fail in many ways; each means that this name leads to no data.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"cannot load data set {name!r}: give 'digits', a folder of images or {HUB_ID_SHAPE} ({reason})"
            ) from error
    return loaded


def _load_folder(folder: Path, streaming: bool, needs_labels: bool, needs_train: bool) -> Splits:
    shards = _find_shards(folder)
    try:
        if any(folder.rglob("*.parquet")):
            return datasets.load_dataset(str(folder), streaming=streaming)
        if shards:
            return datasets.load_dataset("webdataset", data_files=shards, streaming=streaming)
        if streaming:
            raise ValueError(
                "--streaming true is for parquet files, WebDataset shards and Hub data sets: "
                "folders of images are read image by image anyway"
            )
        if any(path.name in METADATA_FILES for path in folder.rglob("metadata.*")):
            return datasets.load_dataset("imagefolder", data_dir=str(folder))
    except Exception as error:
        # Builders fail in many ways; each means that this folder leads to no data.
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        hint = " (.cls files hold numbers; names belong in .txt files, with --label_column txt)" if shards else ""
        raise ValueError(f"cannot load folder {str(folder)!r}: {' '.join(str(reason).split())}{hint}") from error
    return _read_image_folder(folder, needs_labels, needs_train)


def _find_shards(folder: Path) -> dict[str, list[str]]:
    """WebDataset shards by the split that their folder or their name speaks of: `val/00.tar`, `data-val-00.tar`.

    Archives beside images are left alone: they may hold the same images once more.
    """
    paths = sorted(folder.rglob("*.tar"))
    if not paths or _find_images(folder.rglob("*")):
        return {}
    shards = defaultdict(list)
    for path in paths:
        words = re.split("[^a-z]+", str(path.relative_to(folder)).lower())
        split = next((word for word in words if word in (TRAIN, *VALIDATION_NAMES, TEST)), TRAIN)
        shards[split].append(glob.escape(str(path)))
    # The library takes the columns from the last split, and those of a test split may lack the labels.
    return {split: shards[split] for split in sorted(shards, key=lambda split: split == TRAIN)}


def _read_image_folder(folder: Path, needs_labels: bool, needs_train: bool) -> DatasetDict:
    """`class/**/image.jpg`, or the same below `train`, `val` and `test`; without labels also `image.jpg`.

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
    if needs_train and found and TRAIN not in found:
        raise ValueError(f"folder {str(folder)!r} has splits {', '.join(found)} but no {TRAIN!r}")
    files = {split: _read_classes(root) for split, root in (found or {TRAIN: folder}).items()}
    first = files.get(TRAIN) or next(iter(files.values()))
    if not needs_labels and first.get(None):
        features = datasets.Features({IMAGE: Image()})
        paths = {
            split: [str(path) for paths in by_class.values() for path in paths] for split, by_class in files.items()
        }
        return DatasetDict(
            {
                split: Dataset.from_dict({IMAGE: paths[split]}, features=features, split=datasets.NamedSplit(split))
                for split in files
            }
        )
    named = [files[TRAIN]] if TRAIN in files else files.values()
    names = sorted({name for by_class in named for name in by_class} - {None})
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
        columns = {IMAGE: [path for path, _ in rows], LABEL: labels}
        splits[split] = Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
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
    return sorted(path for path in paths if has_image_suffix(path.name) and path.is_file())


def has_image_suffix(name: str) -> bool:
    """Whether a file of this name is taken for an image, one that Pillow knows how to read or to write."""
    return os.path.splitext(name)[1].lower() in PIL.Image.registered_extensions()


def _check_images(splits: DatasetDict, arguments: DataArguments) -> DatasetDict:
    """Decode every image once, before hours of training end at one that is broken, and leave the broken ones out."""
    broken, readable = [], {}
    for key, split in splits.items():
        encoded = split.cast_column(IMAGE, Image(decode=False))
        faults = _find_faults(split, f"Reading {key} images")
        for row, fault in faults.items():
            path = (encoded[row][IMAGE] or {}).get("path")
            broken.append((path or f"row {row} of split {key!r}", fault))
        readable[key] = split.select([row for row in range(len(split)) if row not in faults])
    if not broken:
        return splits
    more = f" and {len(broken) - 5:,} more" if len(broken) > 5 else ""
    message = (
        f"{len(broken):,} of {sum(map(len, splits.values())):,} images of {arguments.dataset!r} cannot be used: "
        f"{', '.join(name for name, _ in broken[:5])}{more} (the first {broken[0][1]})"
    )
    if arguments.on_corrupt == "error":
        raise ValueError(f"{message}: mend them, or leave them out by --on_corrupt skip")
    _announce(f"{message}: left out.")
    return DatasetDict(readable)


def _find_faults(split: Dataset, description: str) -> dict[int, str]:
    """What is wrong with the images, by row. Each of several processes reads its share and hears of the others'.

    Raises:
        FetchError: in all of them, if one cannot fetch an image.
    """
    rank, world = rank_and_world()
    rows = range(rank, len(split), world)
    try:
        found = zip(rows, _map_images(_find_fault, split.select(rows), description))
        share = {row: fault for row, fault in found if fault is not None}
    except FetchError as error:
        share = error
    shares = [share] * world
    if world > 1:
        torch.distributed.all_gather_object(shares, share)
    for share in shares:
        if isinstance(share, FetchError):
            raise share
    return dict(sorted(item for share in shares for item in share.items()))


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _announce(message: str) -> None:
    """Once, however many processes there are."""
    if rank_and_world()[0] == 0:
        print(message)


def _find_fault(encoded: dict | None) -> str | None:
    try:
        decode(encoded)
    except ValueError as error:
        return str(error)
    return None


def _map_images(function: Callable, split: Dataset, description: str) -> Iterator:
    """`function` of every encoded image in turn, in threads: Pillow decodes without Python's lock."""
    encoded = split.cast_column(IMAGE, Image(decode=False)).select_columns(IMAGE)
    with ThreadPoolExecutor() as threads, tqdm(total=len(split), desc=description, leave=False) as progress:
        for start in range(0, len(split), IMAGES_FOR_THREADS):
            for result in threads.map(function, encoded[start : start + IMAGES_FOR_THREADS][IMAGE]):
                progress.update()
                yield result


def _name_splits(splits: Splits, name: str, needs_train: bool = True) -> Splits:
    """Only `train`, `validation` and `test`, in that order and under these names."""
    if TRAIN not in splits and (needs_train or not splits.keys() & {*VALIDATION_NAMES, TEST}):
        if len(splits) > 1:
            raise ValueError(f"data set {name!r} has splits {', '.join(splits)} but no {TRAIN!r}")
        splits = type(splits)({TRAIN: next(iter(splits.values()))})
    validations = [key for key in VALIDATION_NAMES if key in splits]
    if len(validations) > 1:
        raise ValueError(f"data set {name!r} has two validation splits: {', '.join(validations)}")
    if validations:
        splits[VALIDATION] = splits.pop(validations[0])
    return type(splits)({key: splits[key] for key in (TRAIN, VALIDATION, TEST) if key in splits})


def _name_columns(splits: Splits, arguments: DataArguments, needs_labels: bool) -> Splits:
    features = next(iter(splits.values())).features
    if features is None:
        raise ValueError(f"the columns of {arguments.dataset!r} are not known before it is read: it cannot be streamed")
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    image = choose_column("image", arguments.image_column, images, features)
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = labels or [name for name in LABEL_NAMES if name in features]
    if not needs_labels and (arguments.streaming or (arguments.label_column is None and len(labels) != 1)):
        splits = splits.select_columns(image)
        return splits if image == IMAGE else splits.rename_column(image, IMAGE)
    label = choose_column("label", arguments.label_column, labels, features)
    splits = splits.select_columns([image, label])
    renamed = {old: new for old, new in ((image, IMAGE), (label, LABEL)) if old != new}
    return splits.rename_columns(renamed) if renamed else splits


def choose_column(kind: str, wanted: str | None, found: list[str], features) -> str:
    """The column asked for by `--{kind}_column`, or the only one found.

    Raises:
        ValueError: if there is no such column, or not just one of the kind.
    """
    if wanted is not None and wanted not in features:
        raise ValueError(f"--{kind}_column {wanted!r} is no column of the data set: it has {', '.join(features)}")
    if wanted is None and len(found) != 1:
        count = "no" if not found else "several"
        raise ValueError(f"the data set has {count} {kind} columns among {', '.join(features)}: pass --{kind}_column")
    return wanted or found[0]


def _has_classes(splits: DatasetDict) -> bool:
    """Whether there are labels, of two kinds at least and none missing."""
    if LABEL not in splits[TRAIN].features:
        return False
    labels = {label for split in splits.values() for label in split.unique(LABEL)}
    return len(labels) > 1 and not any(map(_is_missing, labels))


def _prepare_streams(splits: IterableDatasetDict, arguments: DataArguments, seed: int) -> IterableDatasetDict:
    name = arguments.dataset
    if LABEL not in splits[TRAIN].features:
        splits[TRAIN] = splits[TRAIN].shuffle(seed=seed, buffer_size=arguments.shuffle_buffer)
        return splits
    if arguments.class_names is not None:
        splits = splits.cast_column(LABEL, ClassLabel(names=read_class_names(arguments.class_names)))
    if not isinstance(splits[TRAIN].features[LABEL], ClassLabel):
        raise ValueError(
            f"labels of {name!r} are numbers or strings whose classes a stream does not know: pass --class_names"
        )
    if len(label_names(splits)) < 2:
        raise ValueError(f"{name!r} has only the class {label_names(splits)[0]!r} to train on")
    if TEST in splits and _is_missing(next(iter(splits[TEST].select_columns(LABEL)))[LABEL]):
        _announce("The first image of the test split has no label: it is left out.")
        del splits[TEST]
    if VALIDATION not in splits and (arguments.validation_fraction > 0 or TEST not in splits):
        raise ValueError(
            f"nothing can be held out of the stream {name!r}: give it a {VALIDATION!r} split, "
            f"or a {TEST!r} split and --validation_fraction 0"
        )
    splits[TRAIN] = splits[TRAIN].shuffle(seed=seed, buffer_size=arguments.shuffle_buffer)
    return splits


def read_class_names(file: str) -> list[str]:
    """One name a line, in the order of the class indices.

    Raises:
        ValueError: if there is no such file, it is empty, or a line in it is empty or stands there twice.
    """
    if not Path(file).is_file():
        raise ValueError(f"--class_names {file!r} is no file: give one with the name of a class on each line")
    names = [line.strip() for line in Path(file).read_text(encoding="utf-8").rstrip().splitlines()]
    if not names:
        raise ValueError(f"--class_names {file!r} names no classes")
    if not all(names):
        raise ValueError(f"--class_names {file!r} has an empty line: give each class a name")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"--class_names {file!r} has {count} classes called {name!r}: tell them apart")
    return names


def _make_class_labels(splits: DatasetDict, arguments: DataArguments) -> DatasetDict:
    """Strings and integers become classes, numbered as in the file of class names, or else in their sorted order."""
    feature, name = next(iter(splits.values())).features[LABEL], arguments.dataset
    if isinstance(feature, ClassLabel) and arguments.class_names is None:
        return splits
    dtype = getattr(feature, "dtype", str(feature))
    if not dtype.startswith(("int", "uint", "string", "large_string", "bool")):
        raise ValueError(f"labels of {name!r} are of type {dtype}: classes must be integers or strings")
    # A negative number stands for a missing label, as in test splits that are published without theirs.
    values = sorted({value for split in splits.values() for value in split.unique(LABEL) if not _is_missing(value)})
    names = [str(value) for value in values]
    if arguments.class_names is not None:
        names = read_class_names(arguments.class_names)
        known = names if "string" in dtype else range(len(names))
        unknown = [value for value in values if value not in known]
        if unknown:
            raise ValueError(
                f"{name!r} has label {unknown[-1]!r}, which is none of the {len(names)} classes of --class_names "
                f"{arguments.class_names!r}"
            )
        values = known
    index = {value: position for position, value in enumerate(values)}
    numbers = {
        key: [-1 if _is_missing(value) else index[value] for value in split[LABEL]] for key, split in splits.items()
    }
    feature = ClassLabel(names=names)
    return DatasetDict(
        {
            key: split.remove_columns(LABEL).add_column(LABEL, numbers[key], feature=feature)
            for key, split in splits.items()
        }
    )


def _is_missing(value: int | str | None) -> bool:
    return value is None or (isinstance(value, int) and value < 0)


def _drop_unlabelled_test(splits: DatasetDict) -> DatasetDict:
    if TEST in splits and len(splits[TEST]) and all(map(_is_missing, splits[TEST][LABEL])):
        _announce(f"The {len(splits[TEST]):,} images of the test split have no labels: it is left out.")
        del splits[TEST]
    return splits


def _check_labels(splits: DatasetDict, name: str) -> None:
    names = splits[TRAIN].features[LABEL].names
    for key, split in splits.items():
        if not len(split):
            raise ValueError(f"split {key!r} of {name!r} holds no images")
        _check_range(split, key, name)
    if len(names) < 2:
        only = f"only the class {names[0]!r}"
        raise ValueError(f"{name!r} has {only} to train on: a classifier needs at least two, one sub-folder for each")
    counts = np.bincount(splits[TRAIN][LABEL], minlength=len(names))
    empty = [class_name for class_name, count in zip(names, counts) if not count]
    if empty:
        more = f", and {len(empty) - 1:,} more have none" if len(empty) > 1 else ""
        raise ValueError(f"class {empty[0]!r} of {name!r} has no image in {TRAIN!r}{more}")


def _check_range(split: Dataset, key: str, name: str) -> None:
    """Raises ValueError if a split of a data set has labels that stand for no class."""
    labels = np.array([-1 if label is None else label for label in split[LABEL][:]])
    last = split.features[LABEL].num_classes - 1
    outside = labels[(labels < 0) | (labels > last)]
    if outside.size:
        raise ValueError(
            f"split {key!r} of {name!r} has label {outside[0]}, outside 0..{last} "
            f"({outside.size} of {len(labels)} images)"
        )


def _hold_out(splits: DatasetDict, arguments: DataArguments, needs_labels: bool) -> DatasetDict:
    """A share of train, the same of each class where there are classes, or nothing if the share is 0."""
    fraction, train = arguments.validation_fraction, splits[TRAIN]
    if fraction == 0:
        if needs_labels and TEST not in splits:
            raise ValueError(
                f"validation_fraction=0 trains on all of {arguments.dataset!r}: it needs a {TEST!r} split with labels"
            )
        return splits
    rare = []
    if LABEL in train.features:
        names = train.features[LABEL].names
        rare = [name for name, count in zip(names, np.bincount(train[LABEL], minlength=len(names))) if count == 1]
    if needs_labels and rare:
        raise ValueError(
            f"class {rare[0]!r} of {arguments.dataset!r} has a single image: "
            "a stratified validation split needs two of every class, or give one beside train"
        )
    stratify = LABEL if LABEL in train.features and not rare else None
    try:
        held_out = train.train_test_split(fraction, stratify_by_column=stratify, seed=arguments.split_seed)
    except ValueError as error:
        raise ValueError(
            f"{len(train)} images are too few to hold out a share of {fraction} of each class ({error})"
        ) from error
    return DatasetDict({**splits, TRAIN: held_out["train"], VALIDATION: held_out["test"]})


def thin_out(splits: DatasetDict, arguments: DataArguments) -> DatasetDict:
    """As large a share of the training images as was asked for, of later classes a smaller one (Cui et al., 2019,
    https://arxiv.org/abs/1901.05555, section 5.1), but an image of each at least."""
    if arguments.train_fraction == arguments.train_imbalance == 1:
        return splits
    train = splits[TRAIN]
    if LABEL not in train.features and arguments.train_imbalance > 1:
        raise ValueError(
            f"--train_imbalance {arguments.train_imbalance} needs a class for every image, which {arguments.dataset!r} "
            "does not tell"
        )
    labels, num_classes = np.zeros(len(train), dtype=int), 1
    if LABEL in train.features:
        labels = np.array(train[LABEL][:])
        num_classes = train.features[LABEL].num_classes
    # Every share takes images from the front of one order, so that a smaller one is a part of a larger one.
    order = np.random.default_rng(arguments.split_seed).permutation(len(labels))
    shares = arguments.train_fraction * arguments.train_imbalance ** -np.linspace(0, 1, num_classes)
    kept, drawn = [], labels[order]
    for label in np.unique(labels):
        of_class = order[drawn == label]
        kept += of_class[: max(1, round(shares[label] * len(of_class)))].tolist()
    return DatasetDict({**splits, TRAIN: train.select(sorted(kept))})
