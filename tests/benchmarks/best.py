"""The fastest inference on a CPU that each library can be brought to, with ours in int8 as well.

Ours, transformers and timm on the same images with the same weights in bfloat16: as they are, compiled, and compiled
with frozen weights, with their default attention and with the other one. All take turns. With --data, accuracy of the
int8 and the bfloat16 model on a data set is compared with that in single precision.

Examples:
    python tests/benchmarks/best.py --output best.md
    python tests/benchmarks/best.py --models ViT-B --batch_size 4 --data path/to/cifar10 --output best.md
"""

import argparse
import copy
import sys
import time
import types
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_output, image_side
from benchmarks.environment import describe_environment, format_environment
from benchmarks.labelled import format_change, open_rows
from benchmarks.peers import (
    ARCHITECTURES,
    attention_of,
    load_into_timm,
    logits_of,
    make_images,
    randomise,
    set_attention,
)
from benchmarks.steps import MIN_ROUNDS, Step, describe_error, format_quartiles, rotated, time_step
from model_cards.pages import tabulate
from modeling_vit_custom.command_line import positive, report_user_errors
from modeling_vit_custom.convert import from_transformers, to_int8
from trainers.bootstrap import mean_intervals
from trainers.memory import keep_freed_memory


MODELS = ("ViT-S", "ViT-B", "DeiT-S distilled", "Swin-T", "PVT-T")
KINDS = ("eager", "compiled", "frozen")
ROOT = Path(__file__).resolve().parents[2]
TRAINED = ROOT / "spaces" / "cifar10_vit"
INT8 = "ours, int8"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    report = []

    def add(part: str):
        """After every table, because a run is long and may be cut short."""
        report.append(part)
        print(f"{part}\n", flush=True)
        if arguments.output is not None:
            arguments.output.write_text("\n\n".join(report) + "\n")

    with report_user_errors("best.py"):
        environment = describe_environment("best.py", argv, "cpu")
        accuracy = [measure_accuracy(arguments)] if arguments.data else []
    add(header(environment, arguments))
    for part in accuracy:
        add(part)
    keep_freed_memory()
    for name in arguments.models:
        times, errors = measure(name, arguments)
        add(format_table(name, times, errors, arguments))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)} "
        "(default: all)")  # fmt: skip
    add("--batch_size", type=positive, default=8, help="images at once (default: 8)")
    add("--image_size", type=image_side, default=224, help="side in pixels (default: 224)")
    add("--seconds", type=float, default=30.0, help="time for the rounds of a model (default: 30)")
    add("--data", type=Path, help="folder with train.parquet and test.parquet of CIFAR-10, for accuracy")
    add("--calibration_images", type=positive, default=500, help="of train.parquet (default: 500)")
    add("--max_images", type=positive, help="of test.parquet (default: all)")
    add_output(parser, "markdown file to write")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------- speed


def measure(name: str, arguments: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each round by library and way, and why some have none."""
    images = make_images(arguments.batch_size, arguments.image_size)
    peer = randomise(ARCHITECTURES[name]["transformers"](arguments.image_size))
    ours = from_transformers(peer)
    models = {"ours": ours, "transformers": peer}
    if "timm" in ARCHITECTURES[name]:
        models["timm"] = load_into_timm(ARCHITECTURES[name]["timm"](arguments.image_size).eval(), ours)
    ways = {}
    for library, model in models.items():
        model = copy.deepcopy(model).bfloat16()
        other = "sdpa" if attention_of(model) == "eager" else "eager"
        for attention in (attention_of(model), other):
            twin = set_attention(copy.deepcopy(model), attention)
            if attention_of(twin) == attention:  # transformers' PVT has no choice
                for kind in KINDS:
                    ways[f"{library}, {kind}, {attention}"] = partial(make_step, twin, images.bfloat16(), kind)
    seen = make_images(max(2, arguments.batch_size), arguments.image_size, seed=1)
    ways[INT8] = lambda: make_step(to_int8(ours, [seen]), images, "eager")
    steps, errors = {}, {}
    for way, make in (bar := tqdm(ways.items())):
        bar.set_description(f"{name}: {way}")
        try:
            step = make()
            for _ in range(3):
                step()
            steps[way] = step
        except Exception as error:  # is a result, not an end
            errors[way] = describe_error(error)
    times, start, count = {way: [] for way in steps}, time.perf_counter(), 0
    while count < MIN_ROUNDS or time.perf_counter() - start < arguments.seconds:
        for way in rotated(list(steps), count):
            times[way].append(time_step(steps[way], "cpu"))
        count += 1
    return times, errors


def make_step(model: nn.Module, images: Tensor, kind: str) -> Step:
    def run(images: Tensor) -> Tensor:
        return logits_of(model, images)

    if kind != "eager":
        # What is compiled belongs to a function's code: with code of its own, no other way's is taken for it.
        own = types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
        run = torch.compile(own, fullgraph=True)

    def step() -> Tensor:
        with torch.no_grad(), inductor_config.patch(freezing=kind == "frozen"):
            return run(images)

    return step


def format_table(
    name: str, times: dict[str, list[float]], errors: dict[str, str], arguments: argparse.Namespace
) -> str:
    medians = {way: np.median(seconds) for way, seconds in times.items()}

    def best(*libraries: str) -> str | None:
        ways = [way for way in medians if way.split(",")[0] in libraries and way != INT8]
        return min(ways, key=medians.get, default=None)

    def compare(way: str | None, other: str | None) -> str:
        return ratio(times[other], times[way]) if way in times and other in times else "-"

    ours, theirs = best("ours"), best("transformers", "timm")
    rows = [
        (way, f"{arguments.batch_size / medians[way]:.1f}", compare(way, theirs))
        for way in sorted(medians, key=medians.get)
    ]
    rows += [(way, f"failed: {error[:120]}".replace("\n", " "), "") for way, error in errors.items()]
    summary = f"Ours at its best / theirs at its best (`{theirs}`): **{compare(ours, theirs)}**."
    summary += f" int8 / our best bfloat16 (`{ours}`): **{compare(INT8, ours)}**."
    table = tabulate(("", "images/s", "/ theirs at its best"), rows)
    return f"## {name}\n\n{summary}\n\n{table}"


def ratio(theirs: list[float], ours: list[float]) -> str:
    return format_quartiles([their / our for their, our in zip(theirs, ours)], "{:.2f}".format)


# ---------------------------------------------------------------------------------------------------------- accuracy


def measure_accuracy(arguments: argparse.Namespace) -> str:
    """What the demo's classifier recognises in single precision, bfloat16 and int8, as a table.

    Raises:
        ValueError: if the data are not there.
    """
    processor = AutoImageProcessor.from_pretrained(TRAINED)

    def read(split: str, count: int | None) -> tuple[Tensor, Tensor]:
        rows = open_rows(arguments.data / f"{split}.parquet", count)
        return processor(list(rows["image"]), return_tensors="pt")["pixel_values"], torch.tensor(rows["label"][:])

    model = AutoModelForImageClassification.from_pretrained(TRAINED).float().eval()
    seen, _ = read("train", arguments.calibration_images)
    pixels, labels = read("test", arguments.max_images)
    half = copy.deepcopy(model).bfloat16()
    quantized, right = to_int8(model, seen.split(250)), {}
    ways = {
        "float32": lambda batch: model(batch).logits,
        "bfloat16": lambda batch: half(batch.bfloat16()).logits,
        "int8": lambda batch: quantized(batch).logits,
    }
    with torch.no_grad():
        for way, run in ways.items():
            batches = tqdm(zip(pixels.split(250), labels.split(250)), way, leave=False)
            right[way] = (
                torch.cat([run(batch).argmax(dim=-1) == classes for batch, classes in batches]).double().numpy()
            )
    changes = mean_intervals(np.stack([right[way] - right["float32"] for way in ways], axis=1), 1000, 0)
    rows = [
        (way, f"{right[way].mean():.2%}", "-" if way == "float32" else format_change(change))
        for way, change in zip(ways, changes)
    ]
    return "\n".join(
        [
            "## Accuracy",
            "",
            f"Of {TRAINED.name} on {len(labels):,} images, int8 calibrated on {len(seen)} training images; changes in "
            "percentage points with 95 % intervals over the images.",
            "",
            tabulate(("", "accuracy", "change"), rows),
        ]
    )


def header(environment: dict[str, str], arguments: argparse.Namespace) -> str:
    return f"""# Inference on a CPU at its best

{format_environment(environment)}
- torchao: {metadata.version("torchao")}
- images: {arguments.batch_size} of {arguments.image_size} pixels at once

Ratios are of throughput, a median with [quartiles] over rounds in which all take their turn. Frozen: compiled with
weights that are laid out and folded beforehand (`torch._inductor.config.freezing`)."""


if __name__ == "__main__":
    main()
