"""What strangers send: only files that were uploaded here are opened, and only images within limits."""

import os
import re
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.responses import PlainTextResponse

from modeling_vit_custom.images import ClippedImageError, to_rgb


MAX_FILE_BYTES = 10 * 1024**2
# Pillow warns above 89 megapixels and refuses above 179. A phone camera's 50 megapixels pass here.
MAX_PIXELS = 64_000_000
# What a JPEG can hold. Resizing an image of 1 x 60,000,000 pixels takes 10 GB.
MAX_SIDE = 65_535
# Models that want a shorter side of some length would make a strip of 1 x 60,000 pixels many times as large.
MAX_ASPECT = 32
# Of a request beside the file that it uploads, if it does. What it names, gradio keeps for each visitor.
MAX_REQUEST_BYTES = 100_000
SECONDS_KEPT = 3600
# A short list, because some of Pillow's readers do more than read: EPS starts Ghostscript.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")

NOT_UPLOADED = "Upload the image itself: neither a path on the server nor an address is accepted."
NOT_AN_IMAGE = "This file cannot be read as an image. Use an intact JPEG, PNG, WebP, GIF or BMP file."
TOO_DEEP = "The image has more than 8 bits a channel, which would be cut off. Convert it to 8 bits."
TOO_LARGE = f"The file is larger than {MAX_FILE_BYTES // 1024**2} MB. Use a smaller one."
TOO_MANY_PIXELS = f"The image has more than {MAX_PIXELS // 10**6} megapixels or is too long. Use a smaller one."
NO_IMAGE = "Choose an image first."
DELETED = "This image was deleted, as all are after an hour. Upload it again."


def refuse(sentence: str) -> gr.Error:
    """What a visitor reads instead of an answer."""
    return gr.Error(sentence, print_exception=False)


def require_upload(path: Any, upload_folder: Path) -> Path:
    """The resolved path of a file that was uploaded here; any other is refused, and not repeated to the caller."""
    sentence = NOT_UPLOADED
    try:
        resolved = Path(path).resolve()
        if resolved.is_relative_to(upload_folder.resolve()):
            if resolved.is_file():
                return resolved
            sentence = NOT_UPLOADED if resolved.exists() else DELETED
    except (OSError, TypeError, ValueError):  # a link to itself, a number, a null byte
        pass
    raise refuse(sentence)


def open_upload(payload: dict[str, Any] | None, upload_folder: Path) -> Image.Image:
    """Open an uploaded image, as gradio's payload names it, in RGB, turned the way its camera was held."""
    if payload is None:
        raise refuse(NO_IMAGE)
    file = require_upload(payload["path"], upload_folder)
    if file.stat().st_size > MAX_FILE_BYTES:
        raise refuse(TOO_LARGE)
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            # Only the header has been read so far.
            strip = max(image.size) > MAX_SIDE or max(image.size) > MAX_ASPECT * min(image.size)
            if strip or image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise refuse(TOO_MANY_PIXELS) from error
    except ClippedImageError as error:
        raise refuse(TOO_DEEP) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:  # all that Pillow raised on 290,000 damaged files
        raise refuse(NOT_AN_IMAGE) from error


class WithoutSideDoors:
    """Answers 404 to what gradio offers and this page does not need, and 413 to what is too long to be a question.

    It would run ffmpeg on whatever is posted as a recording, fetch any address that is asked for as a file, and write
    what a visitor last sent to the disk for good, as a link to it.
    """

    CLOSED = re.compile(r"/process_recording$|/deep_link$|/file[=/]\s*https?:", re.IGNORECASE)
    UPLOAD = "/gradio_api/upload"

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self.CLOSED.search(scope["path"].rstrip("/")):
            await PlainTextResponse("Not found", status_code=404)(scope, receive, send)
        else:
            await self.answer(scope, receive, send)

    async def answer(self, scope: dict, receive: Any, send: Any) -> None:
        """What gradio answers, unless it is sent more than it should read."""
        too_long = PlainTextResponse("Too long", status_code=413)
        is_upload = scope["path"].removeprefix(scope.get("root_path", "")) == self.UPLOAD
        left = MAX_REQUEST_BYTES + (MAX_FILE_BYTES if is_upload else 0)
        length = dict(scope["headers"]).get(b"content-length", b"")
        # Of those that do not say how long they are, uploads are counted as they come.
        may_be_endless = scope["method"] == "POST" and not is_upload
        if int(length) > left if length.isdigit() else may_be_endless:
            await too_long(scope, receive, send)
            return

        async def receive_less() -> dict:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise TooLongError
            return message

        async def send_unless_too_long(message: dict) -> None:
            if left >= 0:  # or it complains of what it could not read
                await send(message)

        with suppress(TooLongError):
            await self.app(scope, receive_less, send_unless_too_long)
        if left < 0:
            await too_long(scope, receive, send)


class TooLongError(Exception):
    """A request is longer than it may be."""


def delete_uploads(folder: Path, age: float) -> None:
    """Deletes files that have been there for longer than `age` seconds, those of requests that broke off as well.

    Gradio deletes what it was sent whole and under the name that it expects.
    """
    for file in folder.rglob("*"):
        with suppress(OSError):
            if file.is_file() and time.time() - file.stat().st_mtime > age:
                file.unlink()


@contextmanager
def own_upload_folder() -> Iterator[Path]:
    """A new folder for what is uploaded to pages that are built meanwhile: every hour older files go, at last all.

    Gradio's own is shared with all other programs of the user that gradio serves, and what is theirs stays there.
    """
    parent = os.environ.get("GRADIO_TEMP_DIR")

    def keep_deleting() -> None:
        while Path(folder).exists():
            time.sleep(SECONDS_KEPT)
            delete_uploads(Path(folder), SECONDS_KEPT)

    with tempfile.TemporaryDirectory(prefix="uploads_", dir=parent, ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        threading.Thread(target=keep_deleting, daemon=True).start()
        try:
            yield Path(folder)
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            os.environ |= {} if parent is None else {"GRADIO_TEMP_DIR": parent}


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
