"""Image classifiers at work, of any kind: opened with their image processor, at a size, a precision, on a device."""

import argparse
import copy
import inspect
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import PIL.Image
import torch
from datasets.utils import logging as datasets_logging
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from modeling_vit_custom.command_line import not_negative, positive
from trainers.arguments import ModelArguments, suggest
from trainers.models import check_is_model, open_processor, read_processor


MAX_WORKERS = 8


class Classifier:
    """A checkpoint that `AutoModelForImageClassification` opens.

    Attributes:
        model: In evaluation mode, on `device`.
        processor: Its own image processor, at the size asked for.
        label_names: In the order of the logits.

    Raises:
        ValueError: if it does not open, lacks weights, or cannot work at that size.
    """

    def __init__(
        self,
        name: str,
        revision: str = "main",
        trust_remote_code: bool = False,
        image_size: int | None = None,
        bf16: bool = False,
        device: torch.device | None = None,
    ):
        check_is_model(name, "classifier")
        self.name, self.device = name, device or choose_device()
        arguments = ModelArguments(
            model=name, revision=revision, trust_remote_code=trust_remote_code, image_size=image_size
        )
        self.arguments, self.processor = arguments, open_processor(arguments)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.model = _open_model(name, revision, trust_remote_code, self.dtype).eval().to(self.device)
        self.label_names = [str(self.model.config.id2label[index]) for index in range(self.model.config.num_labels)]
        # Models of transformers must be told that an image may have another size than they were trained with.
        accepts = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if accepts else {}

    def at_size(self, side: int) -> "Classifier":
        """The same model for square images of another size.

        Raises:
            ValueError: if it cannot work at that.
        """
        resized = copy.copy(self)
        resized.arguments = replace(self.arguments, image_size=side)
        resized.processor = open_processor(resized.arguments)
        resized.check_size()
        return resized

    def check_size(self) -> None:
        """Raises ValueError if the model cannot work at the size that its processor makes."""
        self._try()

    def check_numbers(self) -> None:
        """Raises ValueError if the model gives no numbers."""
        if not self._try().isfinite().all():
            raise ValueError(f"{self.name!r} gives logits that are no numbers: its training diverged")

    def _try(self) -> Tensor:
        height, width = read_processor(self.processor)[0]
        try:
            return self(torch.zeros(1, 3, height, width))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self.name!r} cannot work on images of {height} x {width} pixels: {reason}") from error

    def prepare(self, images: list[PIL.Image.Image]) -> Tensor:
        """RGB images of any sizes -> pixels (B, C, H, W)."""
        return self.processor(images, return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) -> logits (B, L) in single precision."""
        pixels = pixels.to(self.device, self.dtype, non_blocking=True)
        return self.model(pixel_values=pixels, **self.options).logits.float()


def _open_model(name: str, revision: str, trust_remote_code: bool, dtype: torch.dtype):
    try:
        with quiet():  # what is missing is refused below
            model, loading = AutoModelForImageClassification.from_pretrained(
                name,
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # which are refused below, like those that are missing
                output_loading_info=True,
            )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"cannot open the model {name!r}: {error}") from error
    for key, there, here in loading["mismatched_keys"]:
        raise ValueError(
            f"cannot open the model {name!r}: its weights {key} are of shape {tuple(there)}, and its config.json asks "
            f"for {tuple(here)}"
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(
            f"{name!r} has no weights for {missing[0]} ({len(missing)} tensors): "
            "fine-tune it by trainers.finetune first"
        )
    return model


def match_classes(
    names: Sequence[str], labels: Sequence[str], by_index: bool = False, model: str = "model", flag: str = ""
) -> list[int]:
    """Where among a model's classes each class of a data set is, by its name.

    Args:
        names: The model's classes, all of the data set's among them.
        labels: The data set's classes, in whatever order.
        by_index: Take both in their order, whatever their names; there must be as many.
        model: What a message calls the model.
        flag: What to pass for that, as a message says.

    Raises:
        ValueError: naming a class that the model does not know, or has twice.
    """
    if by_index:
        if len(names) != len(labels):
            raise ValueError(
                f"{model} has {len(names):,} classes, not the data set's {len(labels):,}: they do not match"
            )
        return list(range(len(labels)))
    hint = f"; if they are the same in the same order, pass {flag}" if flag and len(names) == len(labels) else ""
    strange = sorted(set(labels) - set(names))
    if strange:
        of_them = f"{len(strange):,} of the data set's {len(labels):,} classes"
        raise ValueError(f"{model} does not know {of_them}, such as {strange[0]!r}{suggest(strange[0], names)}{hint}")
    index, counts = {name: position for position, name in enumerate(names)}, Counter(names)
    twice = sorted(label for label in labels if counts[label] > 1)
    if twice:
        count = counts[twice[0]]
        raise ValueError(f"{model} has {count} classes called {twice[0]!r}, which cannot be told apart{hint}")
    return [index[label] for label in labels]


def choose_device(use_cpu: bool = False) -> torch.device:
    """The accelerator, of several processes each its own, or the processor."""
    if use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))
    torch.accelerator.set_device_index(index)  # or helpers of the library would open the first one as well
    return torch.device(torch.accelerator.current_accelerator().type, index)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of libraries, nor bars for what takes a second: what is wrong is said in a line of ours."""
    levels = logging.get_verbosity(), datasets_logging.get_verbosity()
    has_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    datasets_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(levels[0])
        datasets_logging.set_verbosity(levels[1])
        if has_bars:
            logging.enable_progress_bar()


class ReadersKilledError(Exception):
    """A process that reads images is gone."""


@contextmanager
def noticing_killed_readers() -> Iterator[None]:
    """Raises ReadersKilledError for what torch raises, wherever this process is by then."""
    try:
        try:
            yield
        except BaseException:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler may be about to raise once more
            raise
    except (ConnectionError, EOFError, RuntimeError) as error:  # the first two where one dies while it hands over
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise ReadersKilledError(
            "a process that reads images was killed, perhaps for want of memory: "
            "a smaller --batch_size or --num_workers takes less"
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that puts a classifier to work asks for besides its name."""
    group = parser.add_argument_group("model")
    group.add_argument("--revision", default="main", metavar="NAME", help="branch, tag or commit on the Hub (main)")
    group.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="run the Python files that come with the model; read them first",
    )
    group.add_argument(
        "--image_size", "--image-size", type=positive, metavar="N", help="side in pixels; by default the model's own"
    )
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    group.add_argument("--use_cpu", "--use-cpu", action="store_true", help="leave the GPU alone")
    group.add_argument(
        "--batch_size", "--batch-size", type=positive, default=64, metavar="N", help="images at once (64)"
    )
    group.add_argument(
        "--num_workers",
        "--num-workers",
        type=not_negative,
        default=default_workers(),
        metavar="N",
        help="processes that read images; 0 is none besides the main one (%(default)s here)",
    )


def open_classifier(arguments: argparse.Namespace) -> Classifier:
    """As the arguments of `add_arguments` and `arguments.model` say."""
    return Classifier(
        arguments.model,
        arguments.revision,
        arguments.trust_remote_code,
        arguments.image_size,
        arguments.bf16,
        choose_device(arguments.use_cpu),
    )


def default_workers() -> int:
    """A share of the processor's cores for each process of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
