"""What the commands share: how they read arguments, and how they tell what is wrong with them."""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


class Parser(argparse.ArgumentParser):
    """argparse without the page of usage that would bury the one line that matters, and with texts as written."""

    def __init__(self, program: str, description: str, examples: str):
        super().__init__(
            prog=program,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise ValueError(f"{message} (see --help)")


@contextmanager
def report_user_errors(program: str) -> Iterator[None]:
    """Turn what is wrong with the user's input into one line on stderr and exit status 2.

    Wrap what reads arguments, data and checkpoints; an error in training is not the user's and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        print(f"{program}: error: {say(error)}", file=sys.stderr)
        raise SystemExit(2) from error


def say(error: BaseException) -> str:
    """What an error says, in one line: of one that comes of a data loader's process with a traceback, the end."""
    text = str(error)
    if "in DataLoader worker process" in text:
        *_, text = re.split(r"^[\w.]+(?:Error|Exception): ", text, flags=re.MULTILINE)
    return " ".join(text.split())


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    return _at_least(text, 1)


def not_negative(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
    return value
