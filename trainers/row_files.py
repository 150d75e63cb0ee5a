"""Rows of a long run: written in finished parts, and joined to one JSONL, CSV or parquet file.

A part is written under another name, flushed to the disk and renamed, so that one that is there is whole.
"""

import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq


TEMPORARY = ".tmp"


class NotWrittenError(Exception):
    """The disk did not take a file; nothing of it is left there."""


class Part(NamedTuple):
    """A finished block of rows.

    Attributes:
        number: Of the block, from 0.
        num_rows: In it.
        digest: Of the keys of its images.
    """

    number: int
    num_rows: int
    digest: str

    @property
    def file_name(self) -> str:
        return f"part-{self.number:08d}-{self.num_rows}-{self.digest}.arrow"


class Parts:
    """The folder of parts beside an output."""

    def __init__(self, output: Path):
        self.output, self.folder = output, output.with_name(f"{output.name}.parts")
        self.manifest = self.folder / "manifest.json"

    def check_output(self, overwrite: bool) -> None:
        """Raises ValueError if the output is there already, or could not be put there."""
        if self.output.is_dir():
            raise ValueError(f"--output {str(self.output)!r} is a folder")
        if not self.output.parent.is_dir():
            raise ValueError(f"--output {str(self.output)!r}: there is no folder {str(self.output.parent)!r}")
        if self.output.exists() and not overwrite and not self.manifest.exists():
            raise ValueError(f"--output {str(self.output)!r} is there already: --overwrite replaces it")

    def begin(self, request: dict, overwrite: bool) -> dict[int, Part]:
        """Finished parts of the same request by their numbers; nobody else begins or goes on while this process lives.

        Args:
            request: What rows depend on, by the name of the argument that says so.
            overwrite: Whether to throw away what is there.

        Raises:
            ValueError: if another request was begun, or another process is at it.
        """
        self._lock()
        self.check_output(overwrite)  # once more: another process may have finished meanwhile
        if overwrite:
            self.manifest.unlink(missing_ok=True)
        request = json.loads(json.dumps(request))
        if self.manifest.exists():
            self._check_request(request)
            for path in self.folder.glob(f"*{TEMPORARY}"):
                path.unlink()
        else:
            self._remove_files()
            with replacing(self.manifest) as file:
                file.write(json.dumps(request, indent=1).encode())
        return self.list()

    def _lock(self) -> None:
        # Of the process alone: workers that outlive it for a moment do not hold it.
        path = self.folder / "lock"
        while True:
            self.folder.mkdir(exist_ok=True)
            self.lock = path.open("w")
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(f"another process is writing {str(self.output)!r}") from error
            # One that finished in between has taken the file away.
            if path.exists() and os.path.samestat(os.fstat(self.lock.fileno()), path.stat()):
                return
            self.lock.close()

    def _check_request(self, request: dict) -> None:
        begun = json.loads(self.manifest.read_text(encoding="utf-8"))
        for name in {**begun, **request}:
            if begun.get(name) != request.get(name):
                then, now = (_describe(name, each) for each in (begun, request))
                raise ValueError(
                    f"{str(self.output)!r} was begun with {then}, not with {now}: "
                    "take the same arguments to go on, or --overwrite to start again"
                )

    def list(self) -> dict[int, Part]:
        """Finished parts by their numbers, in order."""
        parts = {}
        for path in sorted(self.folder.glob("part-*.arrow")):
            _, number, num_rows, digest = path.stem.split("-")
            parts[int(number)] = Part(int(number), int(num_rows), digest)
        return parts

    def write(self, part: Part, rows: pa.Table) -> None:
        """Raises NotWrittenError if the disk does not take it."""
        with replacing(self.folder / part.file_name) as file, pa.ipc.new_file(file, rows.schema) as writer:
            writer.write_table(rows)

    def read(self, part: Part) -> pa.Table:
        with pa.OSFile(str(self.folder / part.file_name)) as file, pa.ipc.open_file(file) as reader:
            return reader.read_all()

    def join(self, schema: pa.Schema, watch: Callable[[pa.Table], None]) -> None:
        """All parts to the output, one after the other, each shown to `watch`; then the parts are removed.

        Raises:
            NotWrittenError: if the disk does not take it; the parts stay.
        """

        def tables() -> Iterator[pa.Table]:
            for part in self.list().values():
                table = self.read(part)
                yield table
                watch(table)

        # On the same disk, whatever the output's folder is.
        with replacing(self.output, self.folder / f"joined{TEMPORARY}") as file:
            WRITERS[self.output.suffix](tables(), schema, file)
        self.remove()

    def remove(self) -> None:
        """The folder goes, but for what is none of ours. Killed in between, what is left counts as nothing."""
        self.manifest.unlink(missing_ok=True)
        self._remove_files()
        with suppress(OSError):
            (self.folder / "lock").unlink()
            self.folder.rmdir()

    def _remove_files(self) -> None:
        for pattern in ("part-*.arrow", f"*{TEMPORARY}"):
            for path in self.folder.glob(pattern):
                path.unlink()


def _describe(name: str, request: dict) -> str:
    value = request.get(name)
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write, which takes its place when all of it is on the disk.

    Raises:
        NotWrittenError: if the disk does not take it.
    """
    temporary = temporary or path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise NotWrittenError(f"{str(path)!r} could not be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def make_schema(with_features: bool) -> pa.Schema:
    """Columns of the output."""
    fields = [
        ("row", pa.int64()),
        ("image", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("probabilities", pa.list_(pa.float32())),
        *([("features", pa.list_(pa.float32()))] if with_features else []),
        ("error", pa.string()),
    ]
    return pa.schema(fields)


def shorten(values: list[float]) -> list[float]:
    """Single-precision numbers with nine digits, which are enough to read each of them back as it was."""
    return [float(f"{value:.9g}") for value in values]


def write_jsonl(tables: Iterator[pa.Table], schema: pa.Schema, file: BinaryIO) -> None:
    for table in tables:
        for row in table.to_pylist():
            for name in ("probabilities", "features"):
                if row.get(name) is not None:
                    row[name] = shorten(row[name])
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def write_csv(tables: Iterator[pa.Table], schema: pa.Schema, file: BinaryIO) -> None:
    """Lists become columns `label_1`, `probability_1` and so on, as many as `top_k` in the schema's metadata says."""
    top_k = int(schema.metadata[b"top_k"])
    best = [name for rank in range(1, top_k + 1) for name in (f"label_{rank}", f"probability_{rank}")]
    file.write(_format_csv([["row", "image", *best, "error"]]))
    for table in tables:
        lines = []
        for row in table.to_pylist():
            best = [""] * (2 * top_k)
            if row["error"] is None:
                best[::2], best[1::2] = row["labels"], shorten(row["probabilities"])
            lines.append([row["row"], row["image"], *best, row["error"]])
        file.write(_format_csv(lines))


def _format_csv(lines: list[list]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def write_parquet(tables: Iterator[pa.Table], schema: pa.Schema, file: BinaryIO) -> None:
    with pq.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


WRITERS = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}
