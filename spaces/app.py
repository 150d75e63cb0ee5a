"""A demo of an image classifier in the browser, and the same as an API: upload an image, read the most likely classes.

Everything that a stranger can send is judged here before anything opens it: see `require_upload` and `open_upload`.
"""

import argparse
import html
import os
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any


# Gradio reads these while it is imported. Without them it reports every launch to its makers, and keeps each visitor's
# images in the visitor's browser storage.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr
import torch
from PIL import Image, ImageOps
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    logging,
)


if find_spec("modeling_vit_custom"):
    import modeling_vit_custom  # noqa: F401 - importing it registers its classes with the Auto classes

DEFAULT_MODEL = "runs/digits"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

MAX_FILE_BYTES = 10 * 1024**2
# Pillow warns above 89 megapixels and refuses above 179. A phone camera's 50 megapixels pass here.
MAX_PIXELS = 64_000_000
# What a JPEG can hold. Resizing an image of 1 x 60,000,000 pixels takes 10 GB.
MAX_SIDE = 65_535
# A short list, because some of Pillow's readers do more than read: EPS starts Ghostscript.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
MAX_TOP_K = 20

NOT_UPLOADED = "Upload the image itself: neither a path on the server nor an address is accepted."
NOT_AN_IMAGE = "This file cannot be read as an image. Use an intact JPEG, PNG, WebP, GIF or BMP file."
TOO_LARGE = f"The file is larger than {MAX_FILE_BYTES // 1024**2} MB. Use a smaller one."
TOO_MANY_PIXELS = f"The image has more than {MAX_PIXELS // 10**6} megapixels or is too long. Use a smaller one."
NO_IMAGE = "Choose an image first."

CSS = """
.gradio-container { width: 100%; max-width: 60rem !important; margin: 0 auto !important; }
#introduction, #introduction .html-container { padding: 0; }
#introduction h1 { font-size: 1.4rem; font-weight: 600; margin: 0.5rem 0 0.25rem; }
#introduction p, #about { opacity: 0.8; overflow-wrap: anywhere; }
#about .prose { text-align: center; font-size: 0.8rem; }
"""
# Gradio's own button colours leave white text with a contrast of 2.5; these have 5.4 and more.
THEME = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"]).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
    stat_background_fill="*primary_600",
    stat_background_fill_dark="*primary_500",
)
LAUNCH_OPTIONS = {
    "theme": THEME,
    "css": CSS,
    "max_file_size": MAX_FILE_BYTES,
    "share": False,
    "show_error": False,
}


class UnusableModelError(Exception):
    """The model that was asked for cannot be shown; the message is one line for the person who asked."""


@dataclass(frozen=True)
class Classifier:
    """A model with its image processor; `name` and `labels` are what visitors see."""

    name: str
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    labels: tuple[str, ...]

    @torch.inference_mode()
    def classify(self, image: Image.Image, top_k: int) -> dict[str, float]:
        """The `top_k` most likely labels with their probabilities, the most likely first."""
        pixels = self.image_processor(images=image, return_tensors="pt")
        logits = self.model(**pixels).logits[0].float()
        if self.model.config.problem_type == "multi_label_classification":
            probabilities = logits.sigmoid()
        else:
            probabilities = logits.softmax(dim=-1)
        values, indices = probabilities.topk(top_k)
        return {self.labels[index]: value for index, value in zip(indices.tolist(), values.tolist(), strict=True)}


def distinct_labels(id2label: dict[int, str]) -> tuple[str, ...]:
    """The label of every class in order; a label of two classes gets the class number (ImageNet has two cranes)."""
    labels = [str(id2label[index]) for index in range(len(id2label))]
    shared = {label for label, count in Counter(labels).items() if count > 1}
    return tuple(f"{label} ({index})" if label in shared else label for index, label in enumerate(labels))


def load_classifier(model: str, trust_remote_code: bool = False) -> Classifier:
    """Load a folder written by `save_pretrained`, or a model of the Hub, or raise UnusableModelError."""
    is_folder = Path(model).is_dir()
    # A folder of runs also looks like a Hub id. It must never become one: anybody could own that name there.
    if not is_folder and model.startswith("runs/"):
        raise UnusableModelError(f"there is no model in {model!r}: run `make quickstart` first or pass --model")
    expected = "pass --model a folder written by save_pretrained or a Hub id such as user/name"
    if not is_folder and not HUB_ID.fullmatch(model):
        raise UnusableModelError(f"there is no folder {model!r}: {expected}")
    try:
        image_processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
        network, loading = AutoModelForImageClassification.from_pretrained(
            model, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        labels = distinct_labels(network.config.id2label)
    except Exception as error:
        # Broken files and foreign code fail in too many ways to list; each of them means that this model is unusable.
        reason = next(iter(str(error).strip().splitlines()), "no reason given").rstrip(" .")
        if "trust_remote_code" in str(error) and not trust_remote_code:
            expected = "read that code and pass --trust_remote_code if you trust it"
        raise UnusableModelError(f"cannot load {model!r} ({type(error).__name__}: {reason}): {expected}") from error
    # transformers fills what the checkpoint lacks with random numbers, and a random head gives random answers.
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UnusableModelError(f"{model!r} is no trained classifier, it lacks {missing}: {expected}")
    return Classifier(Path(model).resolve().name if is_folder else model, network, image_processor, labels)


def require_upload(path: Any, upload_folder: Path) -> Path:
    """The resolved path of a file that was uploaded here; any other is refused, and not repeated to the caller."""
    try:
        resolved = Path(path).resolve()
        if resolved.is_relative_to(upload_folder.resolve()) and resolved.is_file():
            return resolved
    except (OSError, TypeError, ValueError):  # a link to itself, a number, a null byte
        pass
    raise gr.Error(NOT_UPLOADED, print_exception=False)


def open_upload(path: Any, upload_folder: Path) -> Image.Image:
    """Open an uploaded image in RGB, turned the way its camera was held."""
    file = require_upload(path, upload_folder)
    if file.stat().st_size > MAX_FILE_BYTES:
        raise gr.Error(TOO_LARGE, print_exception=False)
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            # Only the header has been read so far.
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                raise Image.DecompressionBombError
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise gr.Error(TOO_MANY_PIXELS, print_exception=False) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:  # all that Pillow raised on 290,000 damaged files
        raise gr.Error(NOT_AN_IMAGE, print_exception=False) from error


def named_paths(payload: Any) -> Iterator[Any]:
    """Every `path` in a JSON payload, at any depth."""
    if isinstance(payload, dict):
        if payload.get("path") is not None:
            yield payload["path"]
        payload = list(payload.values())
    if isinstance(payload, list):
        for value in payload:
            yield from named_paths(value)


class UploadsOnlyBlocks(gr.Blocks):
    """Blocks that accept a file only if it was uploaded here.

    Before a function runs, gradio checks the files that a payload names only if the payload marks them as files, and it
    downloads every address that a payload names, whatever its size. This looks at a payload before gradio does.
    """

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        super().validate_inputs(block_fn, inputs)
        for path in named_paths(inputs):
            require_upload(path, Path(self.GRADIO_CACHE))


def describe_version() -> str:
    try:
        return f"vit-custom {metadata.version('vit-custom')}"
    except metadata.PackageNotFoundError:
        return "vit-custom"


def introduction(classifier: Classifier) -> str:
    shown = ", ".join(classifier.labels[:MAX_TOP_K])
    rest = ", …" if len(classifier.labels) > MAX_TOP_K else ""
    return (
        "<h1>What is in this image?</h1>"
        f"<p>A Vision Transformer tells {len(classifier.labels):,} classes apart: {html.escape(shown)}{rest}.</p>"
    )


def about(classifier: Classifier) -> str:
    parameters = f"{classifier.model.num_parameters():,} parameters"
    return html.escape(" · ".join((classifier.name, parameters, describe_version())))


def build_demo(classifier: Classifier) -> gr.Blocks:
    """The page and its endpoint `/classify`; launch it with LAUNCH_OPTIONS."""
    most = min(MAX_TOP_K, len(classifier.labels))
    title = f"{classifier.name} · vit-custom"
    # Uploads are looked for every hour and deleted when they are an hour old.
    with UploadsOnlyBlocks(title=title, delete_cache=(3600, 3600)) as demo:
        gr.HTML(introduction(classifier), elem_id="introduction")
        with gr.Row():
            with gr.Column(min_width=280):
                image_input = gr.Image(
                    label="Image", type="filepath", sources=["upload", "clipboard"], height=320, buttons=["fullscreen"]
                )
                top_k_input = gr.Slider(1, most, value=min(5, most), step=1, label="Classes to show")
                button = gr.Button("Classify", variant="primary")
            with gr.Column(min_width=280):
                label_output = gr.Label(label="Most likely classes")
        gr.HTML(about(classifier), elem_id="about")

        def classify(image: dict[str, Any] | None, top_k: float) -> dict[str, float]:
            """Classify an uploaded image: its most likely classes with their probabilities, the most likely first."""
            if image is None:
                raise gr.Error(NO_IMAGE, print_exception=False)
            if top_k not in range(1, most + 1):
                raise gr.Error(f"The number of classes must be a whole number from 1 to {most}.", print_exception=False)
            return classifier.classify(open_upload(image["path"], Path(demo.GRADIO_CACHE)), int(top_k))

        def classify_again(image: dict[str, Any] | None, top_k: float) -> dict[str, float] | None:
            return None if image is None else classify(image, top_k)

        # Without preprocess=False, gradio opens and decodes the image before our limits are looked at.
        event = {"inputs": [image_input, top_k_input], "outputs": label_output, "preprocess": False}
        gr.on([image_input.upload, button.click], classify, api_name="classify", **event)
        top_k_input.release(classify_again, api_visibility="private", **event)
        image_input.clear(lambda: None, outputs=label_output, api_visibility="private")
    # One image at a time, a bounded number of visitors waiting, and no way around the queue.
    return demo.queue(max_size=32, default_concurrency_limit=1, api_open=False)


def port_number(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not between 1 and 65535")
    return port


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="app.py",
        description="Show an image classifier in the browser.",
        epilog="example:\n  python spaces/app.py --model runs/digits --port 7861",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="DIR|user/name",
        help=f"a folder written by save_pretrained, or a model of the Hub (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--port", type=port_number, metavar="N", help="default: the first free port from 7860 on")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run the Python files that come with the model, if its class is not installed; read them first",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        classifier = load_classifier(arguments.model, arguments.trust_remote_code)
    except UnusableModelError as error:
        print(f"app.py: error: {error}", file=sys.stderr)
        return 2
    try:
        build_demo(classifier).launch(server_port=arguments.port, **LAUNCH_OPTIONS)
    except OSError as error:
        reason = str(error).split(". ")[0]
        print(f"app.py: error: cannot serve ({reason}): pass another --port", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
