"""Time inference and training steps of our models against transformers and timm, interleaved in one process.

In every round each library makes one step on the same images, with the same weights and its own default attention;
the ratio of a round compares neighbours in time, so that a machine that slows down slows all alike.

With --output speed.md all figures go into speed.jsonl as well, row by row. Rows that it holds are not measured again: a
run that was cut goes on by the same command, and several runs make one table.

Examples:
    python tests/benchmarks/speed.py --output speed.md
    python tests/benchmarks/speed.py --models ViT-S Swin-T --workloads inference:224:8 training:640:2 \\
        --dtypes float32 bfloat16 --compile no --seconds 30 --output speed.md
    python tests/benchmarks/speed.py --report --output speed.md
"""

import argparse
import copy
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_device, add_output, image_side
from benchmarks.environment import (
    Environment,
    check_comparable,
    describe_environment,
    format_environment,
    merge_environments,
)
from benchmarks.peers import (
    ARCHITECTURES,
    NEAREST_IN_TIMM,
    attention_of,
    from_transformers,
    load_into_timm,
    logits_of,
    make_images,
    max_difference,
    randomise,
    set_attention,
)
from benchmarks.steps import MIN_ROUNDS, Step, describe_error, make_training_step, measure_rise, rotated, time_step
from model_cards.figures import GROUP_COLORS
from model_cards.pages import tabulate
from modeling_vit_custom.command_line import positive, report_user_errors
from trainers.memory import keep_freed_memory
from trainers.pace import STEP_COST, measure_matrix_rate


MODELS = ("ViT-S", "ViT-B", "DeiT-S distilled", "Swin-T", "PVT-T", "ViT-32px")
SMALL_MODEL = "ViT-32px"
# Images below this side are for the small model, all others for the rest.
SMALL_SIDE = 64
MODES = {"inference": "Inference", "training": "Training step"}
DTYPES = ("float32", "bfloat16", "autocast")
PEERS = ("transformers", "timm")
LIBRARIES = ("ours", *PEERS)
# MODE:IMAGE_SIZE:BATCH_SIZE
WORKLOADS = {
    "cpu": (
        "inference:224:1", "inference:224:8", "inference:640:1", "training:224:8", "training:640:2",
        "inference:32:1", "inference:32:256", "training:32:256",
    ),
    "cuda": (
        "inference:224:1", "inference:224:256", "inference:640:8", "training:224:128", "training:640:8",
        "inference:32:1", "inference:32:256", "training:32:256",
    ),
}  # fmt: skip
PEAK_STEPS = 3
# More than this between logits of order 1 in fp32 means that two models do not compute the same.
MAX_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Row:
    """One line of a table: what every library does."""

    model: str
    mode: str
    image_size: int  # side in pixels
    batch_size: int
    dtype: str
    compiled: bool

    def __post_init__(self):
        if self.model not in MODELS or self.mode not in MODES or self.dtype not in DTYPES:
            raise ValueError(f"{self.model}, {self.mode}, {self.dtype}: not of this benchmark")

    def __str__(self) -> str:
        kind = "compiled" if self.compiled else "eager"
        return f"{self.model} {self.mode} {self.image_size} x {self.batch_size} {self.dtype} {kind}"

    @property
    def section(self) -> str:
        return f"{MODES[self.mode]}, {'compiled' if self.compiled else 'eager'}"

    @property
    def place(self) -> tuple:
        """Where in the tables it stands."""
        mode, dtype = list(MODES).index(self.mode), DTYPES.index(self.dtype)
        return mode, self.compiled, MODELS.index(self.model), self.image_size, self.batch_size, dtype


@dataclass
class Measurement:
    """One library's figures of a row; `error` says why there are none, `note` why it does not compute the same.

    Attributes:
        flops: Additions and multiplications of a step.
        max_difference: Of logits, to ours; none of another model.
        first_step: Seconds.
        times: Seconds of a step in each round.
        peak_mb: What a step takes, in millions of bytes; none where the system does not tell.
    """

    attention: str
    flops: int
    max_difference: float | None
    note: str
    error: str | None
    first_step: float | None = None
    times: list[float] = field(default_factory=list)
    peak_mb: float | None = None


@dataclass
class Record:
    """A row with its figures, by library: one line of the .jsonl.

    Attributes:
        matrix_rates: Additions and multiplications a second in a product of large matrices of the row's dtype, before
            the row and after it.
    """

    row: Row
    environment: Environment
    matrix_rates: list[float]
    measurements: dict[str, Measurement]


@dataclass
class Contender:
    """A library's model; `flops` are of one image's forward pass, the rest is as in `Measurement`."""

    library: str
    model: nn.Module
    flops: int
    max_difference: float | None = 0.0
    note: str = ""
    error: str | None = None


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    file = arguments.output and arguments.output.with_suffix(".jsonl")
    with report_user_errors("speed.py"):
        records = read_records(file) if file else []
        if arguments.report and not records:
            raise ValueError(f"{file}: there are no rows to report")
        if records and not arguments.report:
            check_comparable(records[-1].environment, describe_environment("speed.py", argv, arguments.device))
    if not arguments.report:
        measure(records, file, arguments, argv)
    report = format_report(records, arguments.output)
    print(report)
    if arguments.output is not None:
        arguments.output.write_text(report + "\n")
        plot_ratios(records).savefig(arguments.output.with_suffix(".png"), dpi=110)
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)} "
        f"(default: all); images below {SMALL_SIDE} pixels are for {SMALL_MODEL}, all others for the rest")  # fmt: skip
    add("--workloads", nargs="+", type=workload, metavar="MODE:IMAGE_SIZE:BATCH_SIZE", help="inference or training, "
        "side of the images in pixels, images a step, such as inference:224:8 training:640:2 (default on cpu: "
        f"{' '.join(WORKLOADS['cpu'])}; on cuda: {' '.join(WORKLOADS['cuda'])})")  # fmt: skip
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="bfloat16 has all weights in bf16; autocast "
        "keeps them in fp32 and is for training only (default: all)")  # fmt: skip
    add("--compile", choices=("no", "yes", "both"), default="both", help="use torch.compile (default: both)")
    add("--repeats", type=positive, default=100, help="most rounds of a row (default: 100)")
    add("--seconds", type=float, default=20.0, help=f"time for the rounds of a row, compilation and warm-up aside; at "
        f"least {MIN_ROUNDS} rounds are made where --repeats allows (default: 20)")  # fmt: skip
    add("--warmup", type=positive, default=2, help="steps before the rounds, after the first (default: 2)")
    add_device(parser, default_device)
    add_output(parser, "markdown file to write; beside it all figures as .jsonl, and the ratios as .png")
    add("--report", action="store_true", help="measure nothing: write the table of the .jsonl beside --output")
    add("--no_progress", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    if arguments.workloads is None:
        arguments.workloads = [workload(text) for text in WORKLOADS[arguments.device]]
    if arguments.report and arguments.output is None:
        parser.error("--report is for a table that there is: name it with --output")
    if not list_rows(arguments):
        parser.error(
            f"nothing to time: images below {SMALL_SIDE} pixels are for {SMALL_MODEL}, all others for the rest, and "
            f"autocast is for training; --models {', '.join(arguments.models)}, --workloads "
            f"{' '.join(':'.join(map(str, each)) for each in arguments.workloads)}, --dtypes "
            f"{' '.join(arguments.dtypes)}"
        )
    return arguments


def workload(text: str) -> tuple[str, int, int]:
    """(mode, image size, batch size), for argparse."""
    mode, *numbers = text.split(":")
    if mode not in MODES or len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be MODE:IMAGE_SIZE:BATCH_SIZE, MODE of {', '.join(MODES)}")
    try:
        image_size, batch_size = map(positive, numbers)
        if image_size >= SMALL_SIDE:
            image_side(numbers[0])
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if image_size < SMALL_SIDE and image_size % 4:
        raise argparse.ArgumentTypeError(f"{text!r}: the image size {image_size} must be a multiple of 4")
    return mode, image_size, batch_size


def list_rows(arguments: argparse.Namespace) -> list[Row]:
    """Every row once; those of a model and an image size, for which models are built, follow each other."""
    compiled = {"no": [False], "yes": [True], "both": [False, True]}[arguments.compile]
    combinations = itertools.product(arguments.models, arguments.workloads, arguments.dtypes, compiled)
    rows = dict.fromkeys(Row(model, *shape, dtype, compiled) for model, shape, dtype, compiled in combinations)
    fitting = [
        row
        for row in rows
        if (row.image_size < SMALL_SIDE) == (row.model == SMALL_MODEL)
        and (row.mode == "training" or row.dtype != "autocast")
    ]
    return sorted(fitting, key=lambda row: (MODELS.index(row.model), row.image_size, row.place))


def read_records(file: Path) -> list[Record]:
    """What was measured before, if anything.

    Raises:
        ValueError: if a line is not of this benchmark.
    """
    records = []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], start=1):
        try:
            values = json.loads(line)
            measurements = {library: Measurement(**each) for library, each in values.pop("measurements").items()}
            records.append(Record(Row(**values.pop("row")), measurements=measurements, **values))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}, line {number} is no row of this benchmark: remove it") from error
    return records


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(records: list[Record], file: Path | None, arguments: argparse.Namespace, argv: list[str]) -> None:
    """Add the rows that are missing, to the file as well, one by one: a run is long and may be cut short."""
    keep_freed_memory()  # or a library would pay for the pages that another one gave back
    known = {record.row for record in records}
    bar = tqdm([row for row in list_rows(arguments) if row not in known], unit="row", disable=arguments.no_progress)
    built, contenders = None, []
    for row in bar:
        bar.set_description(str(row))
        if built != (row.model, row.image_size):
            built, contenders = (row.model, row.image_size), build_contenders(row.model, row.image_size)
        record = measure_row(row, contenders, arguments, argv)
        records.append(record)
        if file is not None:
            with file.open("a") as lines:
                lines.write(json.dumps(asdict(record)) + "\n")
        ratios = "; ".join(f"ours / {library} {format_ratio(record, library)}" for library in PEERS)
        tqdm.write(f"{row}: {ratios}", file=sys.stderr)
        torch.compiler.reset()
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


def build_contenders(name: str, image_size: int) -> list[Contender]:
    """Our conversion of transformers' model, that model itself, and timm's with our weights."""
    builds = ARCHITECTURES[name]
    peer = randomise(builds["transformers"](image_size))
    ours = from_transformers(peer)
    images = make_images(1, image_size)
    with torch.inference_mode():
        expected = logits_of(ours, images)
    flops = count_flops(peer, image_size)
    contenders = [Contender("ours", ours, flops), Contender("transformers", peer, flops)]
    if name not in NEAREST_IN_TIMM:
        contenders.append(Contender("timm", builds["timm"](image_size).eval(), flops))
    for contender in contenders[1:]:
        with errors_into(contender):
            if contender.library == "timm":
                load_into_timm(contender.model, ours)
            with torch.inference_mode():
                contender.max_difference = max_difference(logits_of(contender.model, images), expected)
        if contender.error is not None:
            continue
        if pads_windows(ours) and math.isfinite(contender.max_difference):
            contender.note = "pads differently"
        elif not contender.max_difference <= MAX_DIFFERENCE:
            contender.note = f"**not the same model**: logits differ from ours by {contender.max_difference:.1e}"
    if name in NEAREST_IN_TIMM:
        model = timm.create_model(NEAREST_IN_TIMM[name]).eval()
        contenders.append(Contender("timm", model, count_flops(model, image_size), None, f"`{NEAREST_IN_TIMM[name]}`"))
    return contenders


def pads_windows(ours: nn.Module) -> bool:
    """Whether windows do not fill a stage's grid: ours mask the padding out, those of others attend to it."""
    stages = [stage for stage in ours.config.stages if stage.window_size]
    return any(side % stage.window_size for stage in stages for side in stage.grid_size)


def count_flops(model: nn.Module, image_size: int) -> int:
    """Additions and multiplications of one image's forward pass, by eager attention, whose products are all seen."""
    twin = set_attention(copy.deepcopy(model).to("meta"), "eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits_of(twin, torch.zeros(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops()


def measure_row(row: Row, contenders: list[Contender], arguments: argparse.Namespace, argv: list[str]) -> Record:
    """Prepare every library's step, time them in turn, then see what memory each takes."""
    device = torch.device(arguments.device)
    product_dtype = torch.float32 if row.dtype == "float32" else torch.bfloat16
    environment = describe_environment("speed.py", argv, arguments.device)
    matrix_rate = measure_matrix_rate(device, product_dtype)
    images = make_images(row.batch_size, row.image_size).to(device)
    labels = torch.arange(row.batch_size, device=device) % contenders[0].model.config.num_labels
    passes = row.batch_size * (STEP_COST if row.mode == "training" else 1)
    measurements, steps = {}, {}
    for contender in contenders:
        attention, flops = attention_of(contender.model), passes * contender.flops
        measurement = Measurement(attention, flops, contender.max_difference, contender.note, contender.error)
        measurements[contender.library] = measurement
        if contender.error is not None:
            continue
        with errors_into(measurement):
            step = make_step(contender.model, row, images, labels)
            measurement.first_step = time_step(step, arguments.device)
            for _ in range(arguments.warmup):
                step()
            steps[contender.library] = step
    time_rounds(steps, measurements, arguments)
    # Behind the rounds, because memory is given back to the system for it, which slows the next step down.
    for library, step in steps.items():
        with errors_into(measurements[library]):
            measurements[library].peak_mb = measure_peak(step, arguments.device)
    matrix_rates = [matrix_rate, measure_matrix_rate(device, product_dtype)]
    return Record(row, environment, matrix_rates, measurements)


def time_rounds(steps: dict[str, Step], measurements: dict[str, Measurement], arguments: argparse.Namespace) -> None:
    """One step of every library in each round; a library that fails leaves."""
    start = time.perf_counter()
    for count in range(arguments.repeats):
        if count >= MIN_ROUNDS and time.perf_counter() - start > arguments.seconds:
            break
        for library in rotated(list(steps), count):
            with errors_into(measurements[library]):
                measurements[library].times.append(time_step(steps[library], arguments.device))
            if measurements[library].error is not None:
                del steps[library]


@contextmanager
def errors_into(target: Contender | Measurement) -> Iterator[None]:
    """Whatever goes wrong in a library is a result of the comparison, not an end of it."""
    try:
        yield
    except Exception as error:
        target.error = describe_error(error)


def make_step(model: nn.Module, row: Row, images: Tensor, labels: Tensor) -> Step:
    """What is timed, on a copy of the model."""
    dtype = torch.bfloat16 if row.dtype == "bfloat16" else torch.float32
    model, images = copy.deepcopy(model).to(images.device, dtype), images.to(dtype)
    if row.mode == "inference":
        return make_inference_step(model, images, row.compiled)
    compute_loss = make_loss(model, images, labels, row.compiled, row.dtype == "autocast")
    return make_training_step(model.parameters(), compute_loss)


def make_inference_step(model: nn.Module, images: Tensor, compiled: bool) -> Step:
    model.eval()
    forward = torch.compile(model) if compiled else model

    def step() -> Tensor:
        with torch.inference_mode():
            return logits_of(forward, images)

    return step


def make_loss(model: nn.Module, images: Tensor, labels: Tensor, compiled: bool, autocast: bool) -> Step:
    """The cross-entropy of a forward pass in training mode, in fp32."""
    model.train()
    forward = torch.compile(model) if compiled else model

    def compute_loss() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            logits = logits_of(forward, images)
        return F.cross_entropy(logits.float(), labels)

    return compute_loss


def measure_peak(step: Step, device: str) -> float | None:
    """`measure_rise` in MB (10^6 bytes): the median of a few steps."""
    rises = [measure_rise(step, device) for _ in range(PEAK_STEPS)]
    return None if None in rises else median_of(rises) / 1e6


# ---------------------------------------------------------------------------------------------------------- reporting

RATIO_TICKS = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)
NOTED_ALPHA = 0.4
COLUMNS = (
    "model", "side x images", "dtype", "**ours / transformers**", "**ours / timm**", "images/s", "MFU, %", "peak, MB",
    "attention",
)  # fmt: skip
LEGEND = f"""\
Ratios are of throughput, ours to theirs: above 1 ours is faster; medians with [quartiles] over rounds, in each of which
every library makes one step. Other cells are ours / transformers / timm:

- images/s: medians.
- MFU, model FLOPs utilisation: additions and multiplications of transformers' model with eager attention, in a training
  step {STEP_COST} times, as a share of what a product of large matrices reaches in the same dtype (autocast: bfloat16).
- peak: by how much a step raises memory above weights, the optimizer's state and images.
- `pvt_v2_b1`: another model, with an MFU of its own; timm has no PVT v1.
- pads differently: windows do not fill the grid; ours mask the padding out, those of others attend to it."""


def format_report(records: list[Record], output: Path | None) -> str:
    """Markdown: where and when, then a table for each mode, eager and compiled."""
    by_date = sorted(records, key=lambda record: record.environment["date"])
    environment = merge_environments([record.environment for record in by_date])
    environment["product of large matrices"] = format_matrix_rates(by_date)
    parts = ["# Speed", format_environment(environment), LEGEND]
    if output is not None:
        parts.append(f"![Ratios of throughput]({output.with_suffix('.png').name})")
    by_place = sorted(records, key=lambda record: record.row.place)
    for title, section in itertools.groupby(by_place, key=lambda record: record.row.section):
        parts += [f"## {title}", *format_section(list(section))]
    return "\n\n".join(parts)


def format_matrix_rates(by_date: list[Record]) -> str:
    texts = []
    for is_single, dtype in ((True, "float32"), (False, "bfloat16")):
        rates = [record.matrix_rates for record in by_date if (record.row.dtype == "float32") == is_single]
        if rates:
            first, last = rates[0][0] / 1e12, rates[-1][1] / 1e12
            texts.append(f"{dtype} {first:.3g} TFLOP/s at the start, {last:.3g} at the end")
    return "; ".join(texts)


def format_section(records: list[Record]) -> list[str]:
    parts = [tabulate(COLUMNS, list(map(format_row, records)))]
    if records[0].row.compiled:
        firsts = []
        for library in LIBRARIES:
            seconds = [record.measurements[library].first_step for record in records]
            seconds = [each for each in seconds if each is not None]
            firsts.append(f"{library} {median_of(seconds):.1f} s" if seconds else f"{library} -")
        parts.append(f"First steps, which compile, medians over rows: {', '.join(firsts)}.")
    return parts


def format_row(record: Record) -> tuple[str, ...]:
    """The cells of `COLUMNS`."""
    row, present = record.row, [record.measurements[library] for library in LIBRARIES]

    def cell(figure: Callable[[Measurement], float | None]) -> str:
        return " / ".join(format_figure(None if each.error else figure(each)) for each in present)

    return (
        row.model,
        f"{row.image_size} x {row.batch_size}",
        row.dtype,
        *(format_ratio(record, library) for library in PEERS),
        cell(lambda measurement: row.batch_size / median_of(measurement.times)),
        cell(lambda measurement: 100 * measurement.flops / median_of(measurement.times) / max(record.matrix_rates)),
        cell(lambda measurement: measurement.peak_mb),
        " / ".join(measurement.attention for measurement in present),
    )


def format_figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def format_ratio(record: Record, library: str) -> str:
    of_both = {name: record.measurements[name] for name in ("ours", library)}
    failures = [f"{name} failed: {each.error[:160]}" for name, each in of_both.items() if each.error]
    if failures:
        return "; ".join(failures).replace("|", "\\|")
    low, median, high = ratio_quartiles(record, library)
    return f"{median:.2f} [{low:.2f}, {high:.2f}] {of_both[library].note}".strip()


def ratio_quartiles(record: Record, library: str) -> list[float]:
    """Quartiles over rounds of the ratio of throughput, ours to a library's; NaN where one of them failed."""
    ours, theirs = record.measurements["ours"], record.measurements[library]
    if ours.error or theirs.error:
        return [math.nan] * 3
    ratios = torch.tensor(theirs.times, dtype=torch.float64) / torch.tensor(ours.times, dtype=torch.float64)
    return ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()


def median_of(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def plot_ratios(records: list[Record]) -> Figure:
    """A bar from 1 to the ratio of throughput for every row, eager and compiled, with its quartiles."""
    lines = {replace(record.row, compiled=False) for record in records}
    labels, heights = [], {}
    lines = sorted(lines, key=lambda line: (MODELS.index(line.model), line.place))
    for model, group in itertools.groupby(lines, key=lambda line: line.model):
        labels.append(model)
        for line in group:
            heights[line] = len(labels)
            labels.append(f"{line.mode} {line.image_size} x {line.batch_size}, {line.dtype}")

    figure = Figure(figsize=(11, 1.6 + 0.22 * len(labels)), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    panels = figure.subplots(1, len(PEERS), sharex=True, sharey=True)
    for library, panel in zip(PEERS, panels):
        draw_bars(panel, library, records, heights)
        panel.set_title(f"ours / {library}", loc="left", fontweight="bold", fontsize=11)
        panel.axvline(1, color="black", linewidth=1)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    # Both axes are shared.
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    panel.set_xlim(min(low, 0.8), max(high, 1.25))
    panel.xaxis.set_major_locator(FixedLocator(RATIO_TICKS))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _position: f"{ratio:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_ylim(len(labels) - 0.4, -0.6)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    for tick, label in zip(panels[0].get_yticklabels(), labels):
        if label in MODELS:
            tick.set(fontweight="bold", fontsize=9)
    kinds = sorted({record.row.compiled for record in records})
    handles = [Patch(color=GROUP_COLORS[kind], label="compiled" if kind else "eager") for kind in kinds]
    handles.append(Patch(color="0.5", alpha=NOTED_ALPHA, label="pale: another model, or pads differently"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("ratio of throughput: right of 1 ours is faster; black: quartiles over rounds", fontsize=9)
    return figure


def draw_bars(panel: Axes, library: str, records: list[Record], heights: dict[Row, int]) -> None:
    """One panel's ratios; the bars of a row stand below and above the height of its label."""
    for record in records:
        low, median, high = ratio_quartiles(record, library)
        height = heights[replace(record.row, compiled=False)] + (0.2 if record.row.compiled else -0.2)
        alpha = NOTED_ALPHA if record.measurements[library].note else 1.0
        panel.barh(height, median - 1, left=1, height=0.38, color=GROUP_COLORS[record.row.compiled], alpha=alpha)
        panel.plot([low, high], [height, height], color="black", linewidth=0.8)


if __name__ == "__main__":
    sys.exit(main())
