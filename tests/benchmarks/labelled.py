"""Images with their classes from a parquet file, and how a change of accuracy is written."""

from pathlib import Path

from datasets import Dataset, Image, load_dataset

from trainers.bootstrap import Interval


def open_rows(file: Path, count: int | None = None) -> Dataset:
    """The rows of a parquet file with columns `image`, in RGB, and `label`, or the first ones only.

    Raises:
        ValueError: if there is no such file.
    """
    if not file.is_file():
        raise ValueError(f"--data: {str(file)!r} is no file")
    rows = load_dataset("parquet", data_files=str(file), split="train").cast_column("image", Image(mode="RGB"))
    return rows.select(range(min(count or len(rows), len(rows))))


def format_change(change: Interval) -> str:
    """A change of accuracy in percentage points with its interval."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * each for each in change))
