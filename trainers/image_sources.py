"""Images to classify, read as they come: files, folders, globs and parquet files, or a data set on the Hub.

However many there are, no list of them is ever made: what is held is one folder's names and a few encoded images.
"""

import argparse
import glob
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, IterableDataset
from huggingface_hub import HfApi

from trainers.data import HUB_ID_SHAPE, choose_column, has_image_suffix


PARQUET = ".parquet"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
IMAGES_AT_ONCE = 32  # read from a parquet file, still encoded
BUFFER_BYTES = 2**20  # of a column, where otherwise a whole row group would be read

# Whether anybody wants the image of a row, by its number.
Needed = Callable[[int], bool]


class Row(NamedTuple):
    """One image.

    Attributes:
        key: Where it comes from; other images have other keys, as far as that is known without reading them.
        name: What it is called in the output; None where it has no name of its own.
        encoded: What `trainers.data.decode` takes; None where the image is missing, and where it was not needed.
    """

    key: str
    name: str | None
    encoded: dict | None


@dataclass(frozen=True)
class LocalImages:
    """Of files, folders with all that is below them, globs, and parquet files, in the order they are given.

    Attributes:
        inputs: As typed.
        image_column: Of the parquet files; None where each has a single one.
    """

    inputs: list[str]
    image_column: str | None = None
    identity: str | None = None  # each image has a key instead

    def count(self, output: Path) -> int:
        """How many rows there are, without reading images.

        Raises:
            ValueError: if one of the inputs is not there or holds no images, a parquet file has no image column, or
                the output is among them.
        """
        total, tables, is_there = 0, 0, output.exists()
        for given in self.inputs:
            rows = 0
            for file in _list_files(given):
                if is_there and os.path.exists(file) and os.path.samefile(file, output):
                    raise ValueError(f"--output {str(output)!r} is among the images: give another place")
                if _is_parquet(file):
                    tables += 1
                    with _open_parquet(file) as table:
                        find_image_column(table.schema_arrow, self.image_column, file)
                        rows += table.metadata.num_rows
                else:
                    rows += 1
            if not rows:
                raise ValueError(f"{given!r} leads to no images and no parquet files of images")
            total += rows
        if self.image_column is not None and not tables:
            raise ValueError(f"--image_column {self.image_column!r} is for parquet files, and there are none")
        return total

    def read(self, is_needed: Needed) -> Iterator[Row]:
        """Every row, in order; row groups of parquet files of which nothing is needed are not read."""
        number = 0
        for given in self.inputs:
            for file in _list_files(given):
                if not _is_parquet(file):
                    name = printable(file)
                    yield Row(name, name, {"path": file, "bytes": None})
                    number += 1
                    continue
                for row in _read_parquet(file, self.image_column, number, is_needed):
                    yield row
                    number += 1


class HubImages:
    """Of one split of a data set on the Hub, streamed.

    Attributes:
        identity: The commit that is read, so that a data set that has changed is noticed.

    Raises:
        ValueError: if there is no such data set, split or column.
    """

    def __init__(self, name: str, config: str | None = None, split: str | None = None, column: str | None = None):
        try:
            self.identity = HfApi().dataset_info(name).sha
            loaded = datasets.load_dataset(name, config, split=split, streaming=True, revision=self.identity)
        except Exception as error:
            # The Hub client and builders fail in many ways; each means that this name leads to no data.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"there is no file or folder {name!r}, and as {HUB_ID_SHAPE} it cannot be loaded ({reason})"
            ) from error
        if not isinstance(loaded, IterableDataset):
            if len(loaded) > 1:
                raise ValueError(f"data set {name!r} has splits {', '.join(loaded)}: pass --split")
            (loaded,) = loaded.values()
        features = loaded.features
        if features is None:
            raise ValueError(f"the columns of {name!r} are not known before it is read: it cannot be streamed")
        images = [key for key, feature in features.items() if isinstance(feature, Image)]
        self.column = choose_column("image", column, images, features)
        splits = loaded.info.splits or {}
        self.num_rows = splits[str(loaded.split)].num_examples if str(loaded.split) in splits else None
        self.stream = loaded.select_columns(self.column).cast_column(self.column, Image(decode=False))

    def count(self, output: Path) -> int | None:
        """How many rows the data set's card says there are; None where it says nothing."""
        return self.num_rows

    def read(self, is_needed: Needed) -> Iterator[Row]:
        """Every row, in order. A stream has no short way past those that nobody needs."""
        for row in self.stream:
            encoded = row[self.column]
            name = _name(encoded)
            yield Row(name or "", name, encoded)


def open_images(arguments: argparse.Namespace) -> LocalImages | HubImages:
    """Where the images come from that are named on the command line.

    Raises:
        ValueError: if that is nowhere.
    """
    inputs = arguments.images
    for given in inputs:
        if os.path.lexists(given) or glob.has_magic(given):
            continue
        if not HUB_ID.fullmatch(given) or has_image_suffix(given) or _is_parquet(given):
            raise ValueError(f"there is no file or folder {given!r}")
        if len(inputs) > 1:
            raise ValueError(f"there is no file or folder {given!r}, and a data set on the Hub must be given alone")
        return HubImages(given, arguments.dataset_config, arguments.split, arguments.image_column)
    for name in ("dataset_config", "split"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} {getattr(arguments, name)!r} is for data sets on the Hub, not for files")
    return LocalImages(inputs, arguments.image_column)


def printable(text: str) -> str:
    r"""Text that can be written in UTF-8: bytes of a file's name that are none become `\udc..`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _name(encoded: dict | None) -> str | None:
    path = encoded["path"] if encoded else None
    return printable(path) if path else None


def _is_parquet(file: str) -> bool:
    return file.lower().endswith(PARQUET)


def _list_files(given: str) -> Iterator[str]:
    """Images and parquet files that one argument stands for. A file that is named is taken, whatever its suffix."""
    if os.path.isdir(given):
        yield from _walk(given)
    elif os.path.lexists(given):
        yield given
    else:
        yield from _match(given)


def _walk(folder: str, may_enter: Callable[[str], bool] = lambda path: True, above: frozenset = frozenset()):
    """Images and parquet files of a folder, sorted, then those of its folders in turn, and none that are hidden.

    Links are followed, except to a folder that they are in.
    """
    status = os.stat(folder or os.curdir)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    files, folders = [], []
    with os.scandir(folder or os.curdir) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # A link to nowhere counts as an image that is broken; of a link to itself, entries can say nothing.
            is_link = entry.is_symlink()
            if os.path.isdir(entry) if is_link else entry.is_dir():
                folders.append(entry.name)
            elif has_image_suffix(entry.name) or _is_parquet(entry.name):
                is_file = os.path.isfile(entry) or not os.path.exists(entry) if is_link else entry.is_file()
                if is_file:
                    files.append(entry.name)
    for name in sorted(files):
        yield os.path.join(folder, name)
    del files
    for name in sorted(folders):
        path = os.path.join(folder, name)
        if may_enter(path):
            yield from _walk(path, may_enter, above | {identity})


def _match(pattern: str) -> Iterator[str]:
    """What a glob stands for: as where the shell takes its place, folders mean what is in them."""
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root, wanted = "/".join(parts[:first]), [part for part in parts[first:] if part]
    root = "/" if pattern.startswith("/") and not root else root
    if not os.path.isdir(root or os.curdir):
        return

    def names(path: str) -> list[str]:
        return path[len(root) :].strip("/").split("/")

    for path in _walk(root, lambda path: _matches(names(path), wanted, partly=True)):
        if _matches(names(path), wanted):
            yield path


def _matches(names: list[str], wanted: list[str], partly: bool = False) -> bool:
    """Whether a path or a folder above it matches; `partly`, whether something below it may."""
    if not wanted:
        return True
    if not names:
        return partly
    if wanted[0] == "**":
        return any(_matches(names[skipped:], wanted[1:], partly) for skipped in range(len(names) + 1))
    return fnmatchcase(names[0], wanted[0]) and _matches(names[1:], wanted[1:], partly)


def _open_parquet(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {file!r}: {error}") from error


def find_image_column(schema: pa.Schema, wanted: str | None, file: str) -> str:
    """The column with encoded images, or with paths where it is asked for.

    Raises:
        ValueError: if there is none, or several and none is asked for, or something else is in it.
    """
    try:
        features = Features.from_arrow_schema(schema)
    except (ValueError, KeyError, TypeError):  # column types that the library does not know
        features = {}
    images = [name for name in schema.names if isinstance(features.get(name), Image)]
    images = images or [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    try:
        column = choose_column("image", wanted, images, schema.names)
    except ValueError as error:
        raise ValueError(f"{file!r}: {error}") from error
    kind = schema.field(column).type
    if not _holds_bytes(kind) and not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
        raise ValueError(f"--image_column {column!r} of {file!r} is of type {kind}: encoded images or paths are needed")
    return column


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _read_parquet(file: str, image_column: str | None, start: int, is_needed: Needed) -> Iterator[Row]:
    with _open_parquet(file) as table:
        column, first = find_image_column(table.schema_arrow, image_column, file), start
        status = os.stat(file)  # another file under the same name is noticed
        place = f"{printable(file)}:{status.st_size}:{status.st_mtime_ns}"
        for group in range(table.num_row_groups):
            end = start + table.metadata.row_group(group).num_rows
            if not any(map(is_needed, range(start, end))):
                yield from (Row(f"{place}:{number - first}", None, None) for number in range(start, end))
            else:
                read = table.iter_batches(IMAGES_AT_ONCE, row_groups=[group], columns=[column], use_threads=False)
                images = (image for batch in read for image in _as_encoded(batch.column(0)))
                for number, image in enumerate(images, start):
                    yield Row(f"{place}:{number - first}", _name(image), image)
            start = end


def _as_encoded(column: pa.Array) -> list[dict | None]:
    """Encoded images, whatever way they are stored; datasets 4.0 does not know the large types."""
    small = {pa.large_binary(): pa.binary(), pa.large_string(): pa.string()}.get(column.type, column.type)
    return Image().cast_storage(column.cast(small)).to_pylist()
