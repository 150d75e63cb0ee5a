"""Pages of Markdown with their figures and facts: how they are written, and the parts they are made of."""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from model_cards.rendering import FIGURE_DPI, break_lines, escape_markdown, fence


def write_page(folder: Path, texts: Mapping[str, str], figures: Mapping[str, Figure], names: Sequence[str]) -> None:
    """Writes texts and figures by their names into a folder, in place of all files of an older page.

    Args:
        folder: Made if there is none; other files in it stay.
        texts: By name.
        figures: By name.
        names: All that such a page may have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # All is made before anything that is there goes.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".page_") as made:
        for name, figure in figures.items():
            figure.savefig(Path(made, name), dpi=FIGURE_DPI)
        for name, text in texts.items():
            Path(made, name).write_text(text, encoding="utf-8")
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for file in Path(made).iterdir():
            shutil.move(file, folder / file.name)


def tabulate(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_settings(command: str, settings: Mapping[str, str | None]) -> list[str]:
    """A command and what is known of where it ran."""
    rows = [(name, escape_markdown(fact)) for name, fact in settings.items() if fact is not None]
    return [fence(break_lines(command), "bash"), tabulate(("", ""), rows)]


def show(name: str, title: str) -> str:
    """A figure beside the page."""
    return f"![{title}]({name})"


def to_json(facts: Mapping) -> str:
    """One fact a line: a confusion matrix of a thousand classes would else be a million lines."""
    lines = [f" {json.dumps(name)}: {_dump(value)}" for name, value in facts.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _dump(value: object) -> str:
    return json.dumps(_without_nan(value), ensure_ascii=False, allow_nan=False)


def _without_nan(value: object) -> object:
    """JSON has no word for what is not known but null."""
    if isinstance(value, Mapping):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
