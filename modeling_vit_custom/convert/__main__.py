"""Convert a checkpoint of another library to this family, or either to another library or a graph.

Sources: Google's .npz; timm's folders and files; the files of DeiT, DeiT III, PVT, Swin, MAE and SimMIM; transformers'
folders of ViT, DeiT, PVT, Swin, ViTMAE and SimMIM; torchvision's vit_* and swin_*. What it is, the tensors' names say.
"""

import argparse
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, ViTImageProcessor
from transformers.utils import logging

from modeling_vit_custom import (
    ViTCustomBackbone,
    ViTCustomConfig,
    ViTCustomForImageClassification,
    ViTCustomForMaskedImageModeling,
    ViTCustomForPreTraining,
    ViTCustomModel,
)
from modeling_vit_custom.command_line import Parser, positive, report_user_errors
from modeling_vit_custom.convert import convert, export
from modeling_vit_custom.convert.checkpoints import PREPROCESSOR
from modeling_vit_custom.convert.export import FORMATS
from modeling_vit_custom.convert.preprocessing import resize_processor
from modeling_vit_custom.modeling_vit_custom import ViTCustomPreTrainedModel
from modeling_vit_custom.presets import list_presets


OWN_CLASSES = (
    ViTCustomModel,
    ViTCustomForImageClassification,
    ViTCustomForPreTraining,
    ViTCustomForMaskedImageModeling,
    ViTCustomBackbone,
)
PROGRAM = "python -m modeling_vit_custom.convert"
EXAMPLES = f"""\
examples:
  # a file as its authors published it
  {PROGRAM} swin_tiny_patch4_window7_224.pth runs/swin_converted

  # a model on the Hub, as timm or transformers put it there
  {PROGRAM} timm/deit3_small_patch16_224.fb_in1k runs/deit3_converted

  # for images of 384 pixels: positions are interpolated, windows grow along
  {PROGRAM} google/vit-base-patch16-224 runs/vit_384 --image_size 384

  # and back
  {PROGRAM} runs/mine exported/timm --to timm

  # for onnxruntime, with images of any size
  {PROGRAM} runs/mine exported/onnx --to onnx

presets:
{textwrap.indent(textwrap.fill(" ".join(list_presets()), 110), "  ")}"""


def main(argv: list[str] | None = None) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with report_user_errors("convert"), telling_warnings():
            arguments = parse_arguments(argv)
            check_output_dir(arguments)
            model, processor = open_source(arguments)
            if arguments.image_size is not None:
                model.resize_image_size(arguments.image_size, arguments.window_size)
                resize_processor(processor, *model.config.native_size)
            if arguments.dtype is not None:
                model = model.to(getattr(torch, arguments.dtype))
            write(model, processor, arguments.to, arguments.output_dir)
    except KeyboardInterrupt:
        print("\nconvert: interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    height, width = model.config.native_size
    labels = f", {model.config.num_labels:,} classes" if hasattr(model, "head") else ""
    print(
        f"{arguments.output_dir}: {type(model).__name__}{labels} for {height} x {width} pixels, "
        f"{model.num_parameters():,} parameters{f', as {arguments.to}' if arguments.to else ''}"
    )


@contextmanager
def telling_warnings() -> Iterator[None]:
    """One line for each of ours, once, if nothing worse happened."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(each.message) for each in caught if is_ours_to_tell(each)):
        print(f"convert: warning: {message}", file=sys.stderr)


def is_ours_to_tell(warning: warnings.WarningMessage) -> bool:
    return warning.category is UserWarning and "modeling_vit_custom" in Path(warning.filename).parts


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__, EXAMPLES)
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


def check_output_dir(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a folder whose files must stay."""
    folder, source = arguments.output_dir, Path(arguments.source)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"OUTPUT_DIR {str(folder)!r} is a file: give a folder")
    if source.exists() and folder.resolve() in (source.resolve(), source.resolve().parent):
        raise ValueError(f"OUTPUT_DIR {str(folder)!r} holds SOURCE, which is to stay: give another one")
    if folder.exists() and any(folder.iterdir()) and not arguments.overwrite:
        raise ValueError(f"OUTPUT_DIR {str(folder)!r} is not empty: pass --overwrite, or give another one")


def open_source(arguments: argparse.Namespace) -> tuple[ViTCustomPreTrainedModel, ViTImageProcessor]:
    """A model of ours as it is, anything else converted."""
    if is_ours(arguments.source, arguments.revision):
        return open_ours(arguments)
    fields = {} if arguments.num_attention_heads is None else {"num_attention_heads": arguments.num_attention_heads}
    return convert(arguments.source, arguments.revision, arguments.preset, **fields)


def is_ours(source: str, revision: str) -> bool:
    """Whether it is a folder, or a repository on the Hub, with a configuration of this family."""
    if Path(source).is_file():
        return False
    try:
        fields, _ = ViTCustomConfig.get_config_dict(source, revision=revision)
    except (AttributeError, OSError, TypeError, ValueError):  # it has none, or is not there, of which `convert` speaks
        return False
    return fields.get("model_type") == ViTCustomConfig.model_type


def open_ours(arguments: argparse.Namespace) -> tuple[ViTCustomPreTrainedModel, ViTImageProcessor]:
    source, options = arguments.source, {"revision": arguments.revision}
    if arguments.to is None and arguments.image_size is None and arguments.dtype is None:
        raise ValueError(f"{source!r} is a model of this family already: say what to do by --to")
    for name in ("preset", "num_attention_heads"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} means nothing for {source!r}, which is a model of this family")
    config = AutoConfig.from_pretrained(source, **options)
    classes = {each.__name__: each for each in OWN_CLASSES}
    model_class = classes.get((config.architectures or ["ViTCustomModel"])[0])
    if model_class is None:
        raise ValueError(f"architectures={config.architectures} of {source!r} must be one of {', '.join(classes)}")
    model = model_class.from_pretrained(source, dtype="auto", **options).eval()
    if Path(source).is_dir() and not Path(source, PREPROCESSOR).exists():
        height, width = config.native_size
        warnings.warn(f"{source!r} has no {PREPROCESSOR}: images are taken to go from -1 to 1", stacklevel=1)
        return model, ViTImageProcessor(size={"height": height, "width": width})
    return model, ViTImageProcessor.from_pretrained(source, **options)


def write(model: ViTCustomPreTrainedModel, processor: ViTImageProcessor, to: str | None, folder: Path) -> None:
    """All of it, or nothing: made beside the folder, where the disk is the same, and moved file by file."""
    parent = next(each for each in folder.absolute().parents if each.is_dir())
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{folder.name}_") as made:
        if to is None:
            model.save_pretrained(made)
            processor.save_pretrained(made)
        else:
            export(model, processor, to, Path(made))
        files = sorted(Path(made).iterdir())
        wrong = next((file.name for file in files if (folder / file.name).is_dir()), None)
        if wrong:
            raise ValueError(f"OUTPUT_DIR {str(folder)!r} has a folder {wrong!r} where a file is to be")
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            os.replace(file, folder / file.name)


if __name__ == "__main__":
    main()
