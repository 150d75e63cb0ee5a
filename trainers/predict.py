"""Classify images, however many: the most likely classes of each, in the order of the inputs, as JSONL, CSV or parquet.

Finished blocks of rows lie in OUTPUT.parts until all are joined. Killed at any moment, the same command goes on.
"""

import argparse
import hashlib
import os
import shlex
import signal
import sys
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from io import StringIO
from itertools import count, groupby, islice
from pathlib import Path
from typing import TypeVar

import PIL.Image
import pyarrow as pa
import torch
from datasets.utils import tqdm
from safetensors import SafetensorError
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset

from modeling_vit_custom.command_line import Parser, positive, report_user_errors, say
from modeling_vit_custom.interpretability import to_probabilities
from trainers.data import (
    FetchError,
    as_it_comes,
    decode,
    kill_workers_at_exit,
    processor_transform,
    rank_and_world,
    split_by_pixels,
)
from trainers.image_sources import HubImages, LocalImages, Row, open_images, printable
from trainers.inference import (
    Classifier,
    ReadersKilledError,
    add_arguments,
    noticing_killed_readers,
    open_classifier,
    quiet,
)
from trainers.models import find_head
from trainers.row_files import WRITERS, NotWrittenError, Part, Parts, make_schema


PROGRAM = "python -m trainers.predict"
EXAMPLES = f"""\
examples:
  # a folder with all that is below it; one JSON object a line
  {PROGRAM} runs/mine photos --output predictions.jsonl

  # some of them, to a table
  {PROGRAM} runs/mine 'photos/**/*.jpg' more.png --output predictions.csv --top_k 3

  # a data set on the Hub, with the features that the classes are told from, on four GPUs
  torchrun --nproc_per_node 4 -m trainers.predict user/model user/data --split test --features --bf16 \\
    --output predictions.parquet

A broken image is a row with its error. Floats are written so that single precision is read back exactly."""

BLOCK_ROWS = 1024
TOP_K = 5
# Processes that are done wait for the slowest one, however long.
PATIENCE = timedelta(days=30)

T = TypeVar("T")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    again, is_first = argv, int(os.environ.get("RANK", 0)) == 0
    try:
        with stopping_at_sigterm(), quiet():
            with redirect_stderr(sys.stderr if is_first else StringIO()), report_user_errors("predict"):
                arguments = parse_arguments(argv)
                join_processes()
                prediction = agree(lambda: Prediction(arguments))
                finished = prediction.begin()
            again = [argument for argument in argv if argument != "--overwrite"]  # which would start once more
            with noticing_killed_readers():
                prediction.run(finished)
    except ChangedImagesError as error:
        print(f"predict: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except (NotWrittenError, UnreadableError, FetchError, ReadersKilledError, torch.OutOfMemoryError) as error:
        message = f"predict: error: {say(error)}; nothing is lost: settle that and go on by `{format_command(again)}`"
        raise SystemExit(message) from error
    except KeyboardInterrupt as error:
        if is_first:
            print(f"\npredict: interrupted; nothing is lost: go on by `{format_command(again)}`", file=sys.stderr)
        raise SystemExit(143 if isinstance(error, Terminated) else 130) from None
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__, EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="a folder written by save_pretrained, or a Hub id")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="image files, folders, quoted globs, parquet files; or one data set on the Hub",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help=f"its suffix is the format: {', '.join(WRITERS)}"
    )
    parser.add_argument(
        "--top_k", "--top-k", type=positive, metavar="N", help=f"classes of each image ({TOP_K}, or all if fewer)"
    )
    parser.add_argument("--features", action="store_true", help="also what the encoder pools of each image; not in CSV")
    parser.add_argument("--overwrite", action="store_true", help="start again, and replace what is there")
    group = parser.add_argument_group("data sets and parquet files")
    group.add_argument("--dataset_config", "--dataset-config", metavar="NAME", help="of a data set on the Hub")
    group.add_argument("--split", metavar="NAME", help="of a data set on the Hub, if it has several")
    group.add_argument("--image_column", "--image-column", metavar="NAME", help="if there are several")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.output.suffix not in WRITERS:
        raise ValueError(f"--output {str(arguments.output)!r} must end with {', '.join(WRITERS)}")
    if arguments.features and arguments.output.suffix == ".csv":
        raise ValueError("--features does not fit in CSV: give an --output that ends with .jsonl or .parquet")
    return arguments


class Prediction:
    """What one command asks for, checked; on several devices, the same in each process.

    Raises:
        ValueError: if something of it is not there or does not fit.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.parts = Parts(arguments.output)
        self.parts.check_output(arguments.overwrite)
        self.images: LocalImages | HubImages = open_images(arguments)
        self.num_images = self.images.count(arguments.output)
        self.classifier = open_classifier(arguments)
        self.top_k = choose_top_k(arguments.top_k, self.classifier)
        self.features = FeatureHook(self.classifier.model) if arguments.features else None
        check_classifier(self.classifier, arguments.batch_size)
        if self.features:
            self.features.take()
        self.schema = make_schema(arguments.features).with_metadata({"top_k": str(self.top_k)})

    def begin(self) -> dict[int, Part]:
        """Blocks that an earlier run has finished, the same for each process.

        Raises:
            ValueError: if that run was asked for something else.
        """
        self.rank, self.world = rank_and_world()
        # Listed once, before anybody adds to them: what each process takes on depends on what is missing.
        finished = agree(
            lambda: self.parts.begin(self.describe(), self.arguments.overwrite) if self.rank == 0 else None
        )
        outcome = [finished]
        if self.world > 1:
            distributed.broadcast_object_list(outcome)
        return outcome[0]

    def describe(self) -> dict:
        """All that rows depend on."""
        arguments = self.arguments
        names = ("revision", "image_size", "bf16", "features", "dataset_config", "split", "image_column")
        return {
            "model": arguments.model,
            **{f"--{name}": getattr(arguments, name) for name in names},
            "--top_k": self.top_k,
            "images": [printable(given) for given in arguments.images],
            "the commit": self.images.identity,
            "weights and preparation": digest_model(self.classifier),
            "blocks of": BLOCK_ROWS,
        }

    def run(self, finished: dict[int, Part]) -> None:
        """Classifies what is missing and joins all of it.

        Raises:
            ChangedImagesError: if the images are others than they were.
            UnreadableError: if their source fails.
            NotWrittenError: if the disk is full.
        """
        start = time.perf_counter()
        batches = Batches(self.images, finished, self.arguments.batch_size, self.rank, self.world)
        loader = make_loader(batches, self.classifier, self.arguments.num_workers)
        before = sum(part.num_rows for part in finished.values())
        with tqdm(
            total=self.num_images, initial=before, desc="Classifying", unit=" images", disable=self.rank > 0
        ) as progress:
            for number, rows in self.classify(loader, progress):
                self.parts.write(Part(number, len(rows), batches.digests[number]), rows)
                if self.world > 1:  # where the others are
                    progress.update(sum(part.num_rows for part in self.parts.list().values()) - progress.n)
        if self.world > 1:
            distributed.barrier()
        if self.rank == 0:
            self.finish(batches.digests, before, start)

    def classify(self, loader: DataLoader, progress: tqdm) -> Iterator[tuple[int, pa.Table]]:
        """Numbers of blocks and their rows, in order."""
        for block, batches in groupby(loader, key=lambda batch: batch["block"]):
            columns = {name: [] for name in self.schema.names}
            for batch in batches:
                self.add_rows(batch, columns)
                if self.world == 1:
                    progress.update(len(batch["names"]))
            yield block, pa.table(columns, schema=self.schema)

    def add_rows(self, batch: dict, columns: dict[str, list]) -> None:
        """Classifies the images of a batch that can be read, and appends all its rows to the columns."""
        faults = dict(batch["faults"])
        readable = [position for position in range(len(batch["names"])) if position not in faults]
        found = {}
        if readable:
            logits = self.classifier(batch["pixels"])
            features = self.features.take() if self.features else None
            is_finite = logits.isfinite().all(dim=1)
            probabilities, classes = to_probabilities(logits, self.classifier.model.config).topk(self.top_k)
            label_names = self.classifier.label_names
            found["labels"] = [[label_names[index] for index in row] for row in classes.tolist()]
            found["probabilities"] = list(probabilities.cpu().numpy())
            if features is not None:
                is_finite &= features.isfinite().all(dim=1)
                found["features"] = list(features.cpu().numpy())
            faults |= {
                position: "gives the model's output a value that is not finite"
                for position, finite in zip(readable, is_finite.tolist())
                if not finite
            }
        place = {position: index for index, position in enumerate(readable)}
        for position, name in enumerate(batch["names"]):
            columns["row"].append(batch["first_row"] + position)
            columns["image"].append(name)
            columns["error"].append(faults.get(position))
            for key in ("labels", "probabilities", "features"):
                if key in columns:
                    columns[key].append(None if position in faults else found[key][place[position]])

    def finish(self, digests: list[str], before: int, start: float) -> None:
        """Joins the parts, and says in one line what came of it."""
        written = self.parts.list()
        if [part.digest for part in written.values()] != digests:
            raise ChangedImagesError()
        total, broken, first = sum(part.num_rows for part in written.values()), 0, ""
        with tqdm(total=total, desc="Joining", unit=" rows", leave=False) as progress:

            def watch(rows: pa.Table) -> None:
                nonlocal broken, first
                faulty = rows.filter(rows["error"].is_valid())
                if len(faulty) and not broken:
                    row = faulty.slice(0, 1).to_pylist()[0]
                    first = f" (the first, {row['image'] or 'row ' + str(row['row'])}, {row['error']})"
                broken += len(faulty)
                progress.update(len(rows))

            self.parts.join(self.schema, watch)
        seconds = time.perf_counter() - start
        there = f", {before:,} of them from before" if before else ""
        print(
            f"{self.arguments.output}: {total:,} row{'s' * (total != 1)}{there}; "
            f"{broken:,} broken image{'s' * (broken != 1)}{first}; "
            f"{seconds:.1f} s, {(total - before) / seconds:,.0f} images/s"
        )
        if broken == total:
            raise SystemExit("predict: error: no image could be classified")


class ChangedImagesError(ValueError):
    """The images are not those that there were."""

    def __init__(self):
        super().__init__(
            "the images are not those that this output was begun with, some have come, gone or got another name: "
            "--overwrite starts again"
        )


class UnreadableError(Exception):
    """A disk or a network does not give the images."""


class Batches:
    """What the workers are asked for: rows of one block each, those of finished blocks and other processes left out.

    Attributes:
        digests: Of the keys of all blocks read so far, whoever classifies them.
    """

    def __init__(
        self, images: LocalImages | HubImages, finished: dict[int, Part], batch_size: int, rank: int, world: int
    ):
        self.images, self.finished, self.batch_size = images, finished, batch_size
        self.rank, self.world = rank, world
        self.in_order, self.digests = sorted(finished), []

    def is_mine(self, block: int) -> bool:
        """Of the missing blocks, the processes take turns."""
        if block in self.finished:
            return False
        missing_before = block - bisect_left(self.in_order, block)
        return missing_before % self.world == self.rank

    def __iter__(self) -> Iterator[list[tuple[int, int, Row]]]:
        """(block, number, row) of up to `batch_size` consecutive rows.

        Raises:
            ChangedImagesError: if a finished block is of other images.
            UnreadableError: if the source of the images fails.
        """
        self.digests, mine = [], {}

        def is_needed(number: int) -> bool:
            block = number // BLOCK_ROWS
            if block not in mine:
                mine[block] = self.is_mine(block)
            return mine[block]

        rows = enumerate(self.read(is_needed))
        for block in count():
            of_block, digest, size = islice(rows, BLOCK_ROWS), hashlib.blake2b(digest_size=8), 0
            while batch := list(islice(of_block, self.batch_size)):
                size += len(batch)
                for _, row in batch:
                    digest.update(row.key.encode() + b"\0")
                if size == BLOCK_ROWS:
                    self.close(block, digest)
                if is_needed(block * BLOCK_ROWS):
                    yield [(block, number, row) for number, row in batch]
            if 0 < size < BLOCK_ROWS:
                self.close(block, digest)
            if size < BLOCK_ROWS:
                return

    def read(self, is_needed: Callable[[int], bool]) -> Iterator[Row]:
        try:
            yield from self.images.read(is_needed)
        except Exception as error:  # of disks, networks and formats
            raise UnreadableError(f"the images cannot be read on: {error}") from error

    def close(self, block: int, digest) -> None:
        self.digests.append(digest.hexdigest())
        if block in self.finished and self.finished[block].digest != self.digests[block]:
            raise ChangedImagesError()


class ImageReader(Dataset):
    """Decodes and prepares the rows of a batch, in the processes of a data loader, which are given the rows."""

    def __init__(self, transform: Callable[[list[PIL.Image.Image]], Tensor]):
        self.transform = transform

    def __getitems__(self, batch: list[tuple[int, int, Row]]) -> dict:
        """Numbers and names of rows, pixels (B, C, H, W) of the images that can be read, and what ails the others."""
        faults, pixels, waiting = {}, [], []  # positions of images that are decoded and not prepared

        def read() -> Iterator[PIL.Image.Image]:
            for position, (_, _, row) in enumerate(batch):
                try:
                    image = decode(row.encoded)
                except ValueError as error:
                    faults[position] = printable(str(error))
                    continue
                waiting.append(position)
                yield image

        for images in split_by_pixels(read()):
            pixels += self.prepare(dict(zip(waiting, images)), faults)
            waiting.clear()
        block, first_row, _ = batch[0]
        return {
            "block": block,
            "first_row": first_row,
            "names": [row.name for _, _, row in batch],
            "faults": list(faults.items()),
            "pixels": torch.cat(pixels) if pixels else None,
        }

    def prepare(self, images: dict[int, PIL.Image.Image], faults: dict[int, str]) -> list[Tensor]:
        """One image that a processor cannot bear, such as a line of a million pixels, must not take others with it."""
        if not images:
            return []
        try:
            return [self.transform(list(images.values()))]
        except Exception as error:  # processors fail in many ways
            if len(images) > 1:
                return [pixels for item in images.items() for pixels in self.prepare(dict([item]), faults)]
            faults[next(iter(images))] = printable(f"cannot be prepared ({' '.join(str(error).split())})")
            return []


def make_loader(batches: Batches, classifier: Classifier, num_workers: int) -> DataLoader:
    """What `ImageReader` makes of the batches, in their order, a few of them ahead."""
    kill_workers_at_exit()
    return DataLoader(
        ImageReader(processor_transform(classifier.processor)),
        batch_sampler=batches,
        collate_fn=as_it_comes,
        num_workers=num_workers,
        pin_memory=classifier.device.type == "cuda",
        worker_init_fn=prepare_worker,
    )


def prepare_worker(number: int) -> None:
    for sign in (signal.SIGINT, signal.SIGTERM):  # they may reach all processes; the main one ends the others
        signal.signal(sign, signal.SIG_IGN)
    warnings.simplefilter("ignore")


class FeatureHook:
    """Keeps what the head of a classifier is given.

    Raises:
        ValueError: if the model does not tell what its head is.
    """

    def __init__(self, model: nn.Module):
        self.model_name, self.features = type(model).__name__, None
        try:
            find_head(model).register_forward_pre_hook(self._keep)
        except ValueError as error:
            raise ValueError(f"--features: {error}") from error

    def _keep(self, head: nn.Module, inputs: tuple) -> None:
        self.features = inputs[0]

    def take(self) -> Tensor:
        """Features (B, D) of the images classified last, in single precision.

        Raises:
            ValueError: if they are not one vector for each image.
        """
        features, self.features = self.features, None
        if features is None or features.flatten(1).shape[1] != features.shape[1]:
            raise ValueError(f"--features: the head of a {self.model_name} is not given one vector for each image")
        return features.flatten(1).float()


def choose_top_k(top_k: int | None, classifier: Classifier) -> int:
    """Raises ValueError if there are not so many classes."""
    num_classes = len(classifier.label_names)
    if top_k is not None and top_k > num_classes:
        raise ValueError(f"--top_k {top_k} is more than the {num_classes} classes of {classifier.name!r}")
    return top_k or min(TOP_K, num_classes)


def check_classifier(classifier: Classifier, batch_size: int) -> None:
    """Raises ValueError or RuntimeError for a model that cannot do what is asked for, before a million images fail."""
    classifier.check_size()
    if classifier.model.config.problem_type == "regression":
        raise ValueError(f"{classifier.name!r} is a regression model: it tells no probabilities")
    wide, high = (classifier.prepare([PIL.Image.new("RGB", size)]) for size in ((80, 60), (60, 80)))
    if wide.shape != high.shape and batch_size > 1:
        raise ValueError(
            f"the image processor of {classifier.name!r} makes images of several sizes, which fit in no batch: "
            "pass --batch_size 1"
        )
    classifier(wide)


def digest_model(classifier: Classifier) -> str:
    """Tells models apart by what they are, whatever the folder or the branch on the Hub is called."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in classifier.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = classifier.model.config.to_dict()
    for of_the_folder in ("_name_or_path", "transformers_version"):
        config.pop(of_the_folder, None)
    digest.update(repr((sorted(config.items()), classifier.processor.to_dict())).encode())
    return digest.hexdigest()


def join_processes() -> None:
    """Waits for all processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        distributed.init_process_group("gloo", timeout=PATIENCE)


def agree(work: Callable[[], T]) -> T:
    """What this process comes to, if all of them come to something.

    Raises:
        ValueError: what ended the first of those that failed, in each of them.
    """
    result, faults = None, [None]
    try:
        result = work()
    except (NotWrittenError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        if rank_and_world()[1] == 1:
            raise
        faults = [str(error)]
    if distributed.is_initialized():
        fault, faults = faults[0], [None] * rank_and_world()[1]
        distributed.all_gather_object(faults, fault)
    for fault in faults:
        if fault is not None:
            raise ValueError(fault)
    return result


def format_command(argv: list[str]) -> str:
    """The command line that was typed, or one that does the same."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launcher = f"torchrun --nproc_per_node {processes} -m trainers.predict" if processes > 1 else PROGRAM
    return printable(f"{launcher} {shlex.join(argv)}")


class Terminated(KeyboardInterrupt):
    """SIGTERM: the end of a job's time, or of a machine's."""


@contextmanager
def stopping_at_sigterm() -> Iterator[None]:
    def stop(number, frame):
        raise Terminated

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


if __name__ == "__main__":
    main()
