"""Time inference and training steps of our models against transformers and timm, interleaved in one process.

In every round each library makes one step on the same images, with the same weights and its own default attention;
the ratio of a round compares neighbours in time, so that a machine that slows down slows all alike.

Example:
    python tests/benchmarks/speed.py --models ViT-S Swin-T --dtypes float32 bfloat16 --compile no \\
        --batch_size 8 --seconds 30 --output speed.md
"""

import argparse
import copy
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_device, add_output
from benchmarks.environment import describe_environment, format_environment
from benchmarks.peers import (
    ARCHITECTURES,
    attention_of,
    from_transformers,
    load_into_timm,
    logits_of,
    make_images,
    max_difference,
    randomise,
)
from modeling_vit_custom.command_line import positive


MODELS = ("ViT-S", "DeiT-S distilled", "Swin-T", "PVT-T")
MODES = ("inference", "training")
DTYPES = ("float32", "bfloat16", "autocast")
LIBRARIES = ("ours", "transformers", "timm")
MIN_ROUNDS = 3
# More than this between logits of order 1 in fp32 means that two models do not compute the same.
MAX_DIFFERENCE = 1e-3


@dataclass
class Measurement:
    """Times of one library in one row of the table, in seconds; `error` says why there are none."""

    model: str
    mode: str
    dtype: str
    compiled: bool
    library: str
    attention: str
    max_difference: float
    first_step: float | None = None
    times: list[float] = field(default_factory=list)
    error: str | None = None


Step = Callable[[], Tensor]


@dataclass
class Contender:
    """A library's model, how far its logits are from ours, and why it cannot take part, if so."""

    library: str
    attention: str
    model: nn.Module
    max_difference: float = 0.0
    error: str | None = None


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    environment = describe_environment("speed.py", argv, arguments.device)
    rows = list_rows(arguments)
    bar = tqdm(rows, unit="row", disable=arguments.no_progress)
    report = [*header(environment, arguments)]
    print("\n".join(report))
    records = [json.dumps({"environment": environment, "arguments": vars(arguments)}, default=str)]
    model_name, contenders = None, []
    for row in bar:
        bar.set_description(" ".join([*row[:3], "compiled" if row[3] else "eager"]))
        if row[0] != model_name:
            model_name, contenders = row[0], build_contenders(row[0], arguments.image_size)
        measurements = measure_row(row, contenders, arguments)
        report.append(format_row(measurements, arguments.batch_size))
        records += [json.dumps(asdict(measurement)) for measurement in measurements]
        tqdm.write(report[-1], file=sys.stdout)
        # After every row, because a run is long and may be cut short.
        if arguments.output is not None:
            arguments.output.write_text("\n".join(report) + "\n")
            arguments.output.with_suffix(".jsonl").write_text("\n".join(records) + "\n")
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)}")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="bfloat16 has all weights in bf16; autocast "
        "keeps them in fp32 and is for training only (default: all)")  # fmt: skip
    add("--compile", choices=("no", "yes", "both"), default="both", help="use torch.compile (default: both)")
    add("--batch_size", type=positive, default=8, help="images a step (default: 8)")
    add("--image_size", type=positive, default=224, help="side in pixels, a multiple of 32 (default: 224)")
    add("--repeats", type=positive, default=50, help="most rounds of a row (default: 50)")
    add("--seconds", type=float, default=20.0, help=f"time for the rounds of a row, compilation and warm-up aside; at "
        f"least {MIN_ROUNDS} rounds are made where --repeats allows (default: 20)")  # fmt: skip
    add("--warmup", type=positive, default=2, help="steps before the rounds, after the first (default: 2)")
    add_device(parser, default_device)
    add_output(parser, "markdown file to write; all times go beside it as JSON lines")
    add("--no_progress", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    if arguments.image_size % 32:
        parser.error(f"--image_size {arguments.image_size} must be a multiple of 32, the last stage's patches")
    if not list_rows(arguments):
        parser.error("nothing to time: autocast is for --modes training")
    return arguments


def list_rows(arguments: argparse.Namespace) -> list[tuple[str, str, str, bool]]:
    """(model, mode, dtype, compiled) for every row of the table; inference under autocast is not measured."""
    compiled = {"no": [False], "yes": [True], "both": [False, True]}[arguments.compile]
    rows = itertools.product(arguments.models, arguments.modes, arguments.dtypes, compiled)
    return [row for row in rows if row[1] == "training" or row[2] != "autocast"]


# ---------------------------------------------------------------------------------------------------------- measuring


def build_contenders(name: str, image_size: int) -> list[Contender]:
    """Our conversion of transformers' model, that model itself, and timm's with our weights."""
    builds = ARCHITECTURES[name]
    peer = randomise(builds["transformers"](image_size))
    ours = from_transformers(peer)
    images = make_images(1, image_size)
    with torch.inference_mode():
        expected = logits_of(ours, images)
    contenders = [Contender("ours", attention_of(ours), ours), Contender("transformers", attention_of(peer), peer)]
    if "timm" in builds:
        model = builds["timm"](image_size).eval()
        contenders.append(Contender("timm", attention_of(model), model))
    for contender in contenders[1:]:
        try:
            if contender.library == "timm":
                load_into_timm(contender.model, ours)
            with torch.inference_mode():
                contender.max_difference = max_difference(logits_of(contender.model, images), expected)
        except Exception as error:
            contender.error = describe_error(error)
    return contenders


def measure_row(
    row: tuple[str, str, str, bool], contenders: list[Contender], arguments: argparse.Namespace
) -> list[Measurement]:
    """Prepare every library's step, then time them in turn."""
    _, mode, dtype, compiled = row
    images = make_images(arguments.batch_size, arguments.image_size).to(arguments.device)
    labels = torch.arange(arguments.batch_size, device=arguments.device) % 1000
    measurements, steps = [], {}
    for contender in contenders:
        library = contender.library
        measurement = Measurement(*row, library, contender.attention, contender.max_difference, error=contender.error)
        measurements.append(measurement)
        if contender.error is not None:
            continue
        weights_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        model = copy.deepcopy(contender.model).to(arguments.device, weights_dtype)
        make = make_inference_step if mode == "inference" else make_training_step
        step = make(model, images.to(weights_dtype), labels, compiled, dtype == "autocast")
        measurement.first_step = try_step(step, arguments.device, measurement)
        for _ in range(arguments.warmup):
            if measurement.error is None:
                try_step(step, arguments.device, measurement)
        if measurement.error is None:
            steps[library] = step

    by_library = {measurement.library: measurement for measurement in measurements}
    start = time.perf_counter()
    for count in range(arguments.repeats):
        if count >= MIN_ROUNDS and time.perf_counter() - start > arguments.seconds:
            break
        # Another one starts each round, so that no library always follows the same one.
        order = list(steps)
        first = count % max(len(order), 1)
        for library in order[first:] + order[:first]:
            seconds = try_step(steps[library], arguments.device, by_library[library])
            if seconds is None:
                del steps[library]
            else:
                by_library[library].times.append(seconds)

    del steps
    torch.compiler.reset()
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    return measurements


def make_inference_step(model: nn.Module, images: Tensor, labels: Tensor, compiled: bool, autocast: bool) -> Step:
    model.eval()
    forward = torch.compile(model) if compiled else model

    def step() -> Tensor:
        with torch.inference_mode():
            return logits_of(forward, images)

    return step


def make_training_step(model: nn.Module, images: Tensor, labels: Tensor, compiled: bool, autocast: bool) -> Step:
    """Forward, cross-entropy in fp32, backward and an AdamW step, the same for every library."""
    model.train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            logits = logits_of(forward, images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def try_step(step: Step, device: str, measurement: Measurement) -> float | None:
    """Time a step; whatever goes wrong in a library is a result of the comparison, not an end of it."""
    try:
        return time_step(step, device)
    except Exception as error:
        measurement.error = describe_error(error)
        return None


def describe_error(error: Exception) -> str:
    """The kind of error and its message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def time_step(step: Step, device: str) -> float:
    """Seconds that a step takes, on a GPU by its own clock and until it has ended."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


# ---------------------------------------------------------------------------------------------------------- reporting

COLUMNS = (
    "model", "mode", "dtype", "compiled", "**ours / transformers**", "**ours / timm**",
    "ours, images/s", "transformers, images/s", "timm, images/s", "attention: ours, transformers, timm",
    "first step, s: ours, transformers, timm",
)  # fmt: skip


def header(environment: dict[str, str], arguments: argparse.Namespace) -> list[str]:
    return [
        "# Speed",
        "",
        format_environment(environment),
        f"- {arguments.device}, {arguments.batch_size} images of {arguments.image_size} pixels a step",
        "",
        "Ratios are of throughput, ours to theirs: above 1 ours is faster. Every figure is a median with [quartiles], "
        "of a ratio over rounds of one step each. The first step compiles, where compiled. timm has no PVT v1.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| " + " | ".join(["---"] * len(COLUMNS)) + " |",
    ]


def format_row(measurements: list[Measurement], batch_size: int) -> str:
    by_library = {measurement.library: measurement for measurement in measurements}
    present = [by_library.get(library) for library in LIBRARIES]
    ours, *peers = present
    first = [m.first_step if m else None for m in present]
    cells = [
        ours.model,
        ours.mode,
        ours.dtype,
        "yes" if ours.compiled else "no",
        *(format_ratio(ours, peer) for peer in peers),
        *(format_throughput(m, batch_size) for m in present),
        ", ".join(m.attention if m else "-" for m in present),
        ", ".join("-" if seconds is None else f"{seconds:.1f}" for seconds in first),
    ]
    return "| " + " | ".join(cells) + " |"


def format_ratio(ours: Measurement, peer: Measurement | None) -> str:
    if peer is None or not (ours.times and peer.times):
        return "-"
    return format_quartiles([theirs / own for own, theirs in zip(ours.times, peer.times)], 2)


def format_throughput(measurement: Measurement | None, batch_size: int) -> str:
    if measurement is None:
        return "-"
    if measurement.error is not None:
        return "failed: " + measurement.error[:160].replace("|", "\\|")
    text = format_quartiles([batch_size / seconds for seconds in measurement.times], 1)
    if not measurement.max_difference <= MAX_DIFFERENCE:
        text += f" (**not the same model**: logits differ from ours by {measurement.max_difference:.1e})"
    return text


def format_quartiles(values: list[float], digits: int) -> str:
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    sys.exit(main())
