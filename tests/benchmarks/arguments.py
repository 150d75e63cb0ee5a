"""What the command lines of the benchmarks share."""

import argparse
from pathlib import Path

import torch

from modeling_vit_custom.command_line import positive


def add_output(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--output", type=output_file, metavar="FILE", help=help_text)


def add_device(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--device", type=device, metavar="cpu|cuda", default=default, help=f"default here: {default}")


def output_file(text: str) -> Path:
    if not Path(text).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {Path(text).resolve().parent}")
    return Path(text)


def image_side(text: str) -> int:
    """Side in pixels of images that the patches of every model's last stage fill: 32 pixels wide in Swin and PVT."""
    side = positive(text)
    if side % 32:
        raise argparse.ArgumentTypeError(f"the image size {side} must be a multiple of 32")
    return side


def device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} must be cpu or cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no GPU here; use cpu")
    return text
