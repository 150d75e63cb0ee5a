"""Convert a checkpoint of another library to this family, or either to another library or a graph.

Sources: Google's .npz; timm's folders and files; the files of DeiT, DeiT III, PVT, Swin, MAE and SimMIM; transformers'
folders of ViT, DeiT, PVT, Swin, ViTMAE and SimMIM; torchvision's vit_* and swin_*. What it is, the tensors' names say.
"""

import argparse
import os
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, ViTImageProcessor
from transformers.utils import logging

import modeling_vit_custom
from modeling_vit_custom import ViTCustomConfig
from modeling_vit_custom.convert import convert, export
from modeling_vit_custom.convert.export import FORMATS
from modeling_vit_custom.modeling_vit_custom import ViTCustomPreTrainedModel
from modeling_vit_custom.presets import list_presets


PROGRAM = "python -m modeling_vit_custom.convert"
EXAMPLES = f"""\
examples:
  # a file as its authors published it
  {PROGRAM} swin_tiny_patch4_window7_224.pth runs/swin

  # a model on the Hub, as timm or transformers put it there
  {PROGRAM} timm/deit3_small_patch16_224.fb_in1k runs/deit3

  # for images of 384 pixels: positions are interpolated, windows grow along
  {PROGRAM} google/vit-base-patch16-224 runs/vit_384 --image_size 384

  # and back
  {PROGRAM} runs/mine exported --to timm

  # for onnxruntime, with images of any size
  {PROGRAM} runs/mine exported --to onnx

presets:
{textwrap.indent(textwrap.fill(" ".join(list_presets()), 110), "  ")}"""


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_output_dir(arguments.output_dir, arguments.overwrite)
        model, processor = open_source(arguments)
        if arguments.image_size is not None:
            resize(model, processor, arguments.image_size, arguments.window_size)
        if arguments.dtype is not None:
            model = model.to(getattr(torch, arguments.dtype))
        write(model, processor, arguments.to, arguments.output_dir)
    except (OSError, ValueError, StrictDataclassError) as error:
        print(f"convert: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("\nconvert: interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    height, width = model.config.native_size
    labels = f", {model.config.num_labels:,} classes" if hasattr(model, "head") else ""
    print(
        f"{arguments.output_dir}: {type(model).__name__}{labels} for {height} x {width} pixels, "
        f"{model.num_parameters():,} parameters{f', as {arguments.to}' if arguments.to else ''}"
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="file, folder, or user/name on the Hub; or a model of ours")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="a folder, new or empty")
    parser.add_argument("--to", choices=FORMATS, help="write it as another library does, or as a graph")
    parser.add_argument("--preset", choices=list_presets(), metavar="NAME", help="size, where weights do not tell it")
    parser.add_argument("--num_attention_heads", type=positive, metavar="N", help="where no preset fits either")
    parser.add_argument("--image_size", type=positive, metavar="N", help="make it the native one: side in pixels")
    parser.add_argument(
        "--window_size", type=positive, metavar="N", help="of Swin's at that size; by default scaled along"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (the source's)")
    parser.add_argument("--revision", default="main", metavar="NAME", help="branch, tag or commit on the Hub (main)")
    parser.add_argument("--overwrite", action="store_true", help="replace what the folder holds under the same names")
    arguments = parser.parse_args(argv)
    if arguments.window_size is not None and arguments.image_size is None:
        parser.error("--window_size comes with --image_size")
    return arguments


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def check_output_dir(folder: Path, overwrite: bool) -> None:
    """Raises ValueError for a folder whose files must stay."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"OUTPUT_DIR {str(folder)!r} is a file: give a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"OUTPUT_DIR {str(folder)!r} is not empty: pass --overwrite, or give another one")


def open_source(arguments: argparse.Namespace) -> tuple[ViTCustomPreTrainedModel, ViTImageProcessor]:
    """A model of ours as it is, anything else converted."""
    if is_ours(arguments.source, arguments.revision):
        if arguments.to is None and arguments.image_size is None and arguments.dtype is None:
            raise ValueError(f"{arguments.source!r} is a model of this family already: say what to do by --to")
        source, options = arguments.source, {"revision": arguments.revision}
        name = (AutoConfig.from_pretrained(source, **options).architectures or ["ViTCustomModel"])[0]
        opened = getattr(modeling_vit_custom, name).from_pretrained(source, dtype="auto", **options).eval()
        return opened, ViTImageProcessor.from_pretrained(source, **options)
    fields = {} if arguments.num_attention_heads is None else {"num_attention_heads": arguments.num_attention_heads}
    return convert(arguments.source, arguments.revision, arguments.preset, **fields)


def is_ours(source: str, revision: str) -> bool:
    """Whether it is a folder, or a repository on the Hub, with a configuration of this family."""
    if Path(source).is_file():
        return False
    try:
        fields, _ = ViTCustomConfig.get_config_dict(source, revision=revision)
    except OSError:  # it has none, or is not there, of which `convert` speaks
        return False
    return fields.get("model_type") == ViTCustomConfig.model_type


def resize(
    model: ViTCustomPreTrainedModel, processor: ViTImageProcessor, image_size: int, window_size: int | None
) -> None:
    """Positions and windows are interpolated, and images prepared accordingly."""
    model.resize_image_size(image_size, window_size)
    size = {"height": image_size, "width": image_size}
    if processor.do_center_crop:
        share = image_size / processor.crop_size["height"]
        processor.size = {"shortest_edge": round(processor.size["shortest_edge"] * share)}
        processor.crop_size = size
    else:
        processor.size = size


def write(model: ViTCustomPreTrainedModel, processor: ViTImageProcessor, to: str | None, folder: Path) -> None:
    """All of it, or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}_") as made:
        if to is None:
            model.save_pretrained(made)
            processor.save_pretrained(made)
        else:
            export(model, processor, to, Path(made))
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(made).iterdir()):
            os.replace(file, folder / file.name)


if __name__ == "__main__":
    main()
