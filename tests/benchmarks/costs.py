"""What a step costs with less work in it, and how time grows with image size, depth, width and batch.

Savings are ratios of time to the plain step of the same encoder: of training (forward, cross-entropy in fp32, backward,
fused AdamW), or inference (a forward pass without gradients). Curves time both. All steps of a table take
turns in one process: every round makes each of them once, and another one begins each round, so that a machine that
slows down slows all alike.

Example:
    python tests/benchmarks/costs.py --parts savings --models vit_small_patch16_224 --output savings.md
    python tests/benchmarks/costs.py --parts image_size batch_size --curve_batch_size 4 --seconds 30 --output costs.md
"""

import argparse
import gc
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import PreTrainedModel


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_device, add_output
from benchmarks.environment import describe_environment, format_environment
from benchmarks.steps import (
    MIN_ROUNDS,
    Step,
    describe_error,
    format_number,
    format_quartiles,
    make_training_step,
    measure_rise,
    rotated,
    time_step,
)
from model_cards.figures import GROUP_COLORS
from model_cards.pages import tabulate
from modeling_vit_custom import (
    ViTCustomConfig,
    ViTCustomForImageClassification,
    ViTCustomForPreTraining,
    list_presets,
    preset_config,
)
from modeling_vit_custom.command_line import positive, report_user_errors
from modeling_vit_custom.presets import small_decoder
from trainers.memory import keep_freed_memory


MODELS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "pvt_tiny_224")
MODES = ("inference", "training")
MODE_NAMES = {"inference": "inference", "training": "training step"}
DTYPES = ("float32", "bfloat16", "autocast")
CURVES = ("image_size", "depth", "width", "batch_size")
SAVINGS = ("savings", "inference_savings")
PARTS = (*SAVINGS, *CURVES)
# On a device: images a step of savings and of curves, and the dtype that runs there use.
DEFAULTS = {"cpu": (8, 2, "float32"), "cuda": (128, 32, "autocast")}
SMALLER = 160 / 224  # side of a smaller image
# Patches merged in each block, of https://arxiv.org/abs/2210.09461, table 4, that of ViT-S among them.
MERGED = (8, 13, 16)
FASTER = (13, 16)  # of these, what is to be 1.5 times as fast


@dataclass
class Case:
    """A step to time, and what came of it.

    Attributes:
        part: One of `PARTS`.
        model: Preset.
        name: What is saved; of a curve, empty.
        value: Where on its curve the step is; of savings, 0.
        fields: Of the preset's configuration, replaced.
        image_size: Side in pixels of the images, if it is not that of the configuration.
        is_masked: Whether the model is a masked autoencoder, with a loss of its own.
        recomputes: Whether activations are computed again for the backward pass (gradient checkpointing).
        goal: The time should be at most this share of the plain step's.
        flops: Additions and multiplications of an image's forward pass.
        memory: Bytes by which a step raises what is taken, at most; None where the system does not tell.
        times: Seconds of each round.
        error: Why there are none.
    """

    part: str
    model: str
    dtype: str
    batch_size: int
    mode: str = "training"
    name: str = ""
    value: int = 0
    fields: dict = field(default_factory=dict)
    image_size: int | None = None
    is_masked: bool = False
    recomputes: bool = False
    goal: float | None = None
    flops: float | None = None
    memory: int | None = None
    times: list[float] = field(default_factory=list)
    error: str | None = None

    def build(self, **more) -> PreTrainedModel:
        """The model with random weights, and with more of its configuration replaced."""
        head = ViTCustomForPreTraining if self.is_masked else ViTCustomForImageClassification
        model = head(preset_config(self.model, **self.fields, **more)).train(self.mode == "training")
        if self.recomputes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of a new name, which older versions do not know
                model.gradient_checkpointing_enable()
        return model

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, C, H, W) of the images."""
        config = preset_config(self.model, **self.fields)
        size = config.native_size if self.image_size is None else (self.image_size, self.image_size)
        return self.batch_size, config.num_channels, *size


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    environment = describe_environment("costs.py", argv, arguments.device)
    with report_user_errors("costs.py"):
        tables = list_tables(arguments)
    report, measured = [header(environment, arguments)], []
    print(report[0])
    keep_freed_memory()  # or a step would pay for the pages that another one gave back
    for part, dtype, cases in tables:
        measure(cases, arguments, f"{part} {dtype}")
        measured += cases
        report.append(format_table(part, dtype, cases))
        print(f"\n{report[-1]}", flush=True)
        # After every table, because a run is long and may be cut short.
        if arguments.output is not None:
            write(arguments, environment, report, measured)


def list_tables(arguments: argparse.Namespace) -> list[tuple[str, str, list[Case]]]:
    """Part, dtype and rows of every table, with what each row computes.

    Raises:
        ValueError: if a model cannot have the shape that was asked for.
    """
    pairs = itertools.product(arguments.parts, arguments.dtypes)
    tables = [(part, dtype, list_cases(part, dtype, arguments)) for part, dtype in pairs]
    for _, _, cases in tables:
        for case in cases:
            case.flops = count_flops(case)
    return tables


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"savings, or curves by what they go along: {', '.join(PARTS)} (default: all)")  # fmt: skip
    add("--models", nargs="+", choices=list_presets(), default=list(MODELS), metavar="PRESET", help="of the curves "
        f"along image and batch size; other parts are of the first (default: {', '.join(MODELS)})")  # fmt: skip
    add("--dtypes", nargs="+", choices=DTYPES, help="bfloat16 has all weights in bf16, autocast keeps them in fp32 "
        "(default: float32 on a CPU, autocast on a GPU)")  # fmt: skip
    add("--batch_size", type=positive, help="images a step of savings (default: 8 on a CPU, 128 on a GPU)")
    add("--curve_batch_size", type=positive, help="the same of curves (default: 2 on a CPU, 32 on a GPU)")
    add("--image_sizes", nargs="+", type=positive, default=[224, 448, 672, 896], metavar="N",
        help="sides in pixels (default: 224 448 672 896, which Swin's windows divide)")  # fmt: skip
    add("--depths", nargs="+", type=positive, default=[3, 6, 12, 24], metavar="N", help="default: 3 6 12 24")
    add("--widths", nargs="+", type=positive, default=[192, 384, 576, 768], metavar="N",
        help="with heads as wide as the preset's (default: 192 384 576 768)")  # fmt: skip
    add("--batch_sizes", nargs="+", type=positive, default=[1, 4, 16, 64], metavar="N", help="default: 1 4 16 64")
    add("--repeats", type=positive, default=50, help="most rounds of a table (default: 50)")
    add("--seconds", type=float, default=10.0, help="time for the rounds, for each row of a table; at least "
        f"{MIN_ROUNDS} rounds are made where --repeats allows (default: 10)")  # fmt: skip
    add("--warmup", type=positive, default=1, help="steps of each row before that (default: 1)")
    add_device(parser, default_device)
    add_output(parser, "markdown file to write; all times go beside it as JSON lines, curves as a picture")
    add("--no_progress", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    batch_size, curve_batch_size, dtype = DEFAULTS[arguments.device]
    arguments.batch_size = arguments.batch_size or batch_size
    arguments.curve_batch_size = arguments.curve_batch_size or curve_batch_size
    arguments.dtypes = arguments.dtypes or [dtype]
    config = preset_config(arguments.models[0])
    for part in {"depth", "width"} & {*arguments.parts}:
        if not config.is_plain:
            parser.error(f"--parts {part} needs a plain ViT as the first of --models, not {arguments.models[0]}")
    head_width = config.stages[0].hidden_size // config.stages[0].num_attention_heads
    for width in arguments.widths if "width" in arguments.parts else ():
        if width % head_width:
            parser.error(f"--widths {width} must be a multiple of {head_width}, the width of a head")
    return arguments


# ------------------------------------------------------------------------------------------------------------- cases


def list_cases(part: str, dtype: str, arguments: argparse.Namespace) -> list[Case]:
    """The rows of a table; of savings, the plain step first."""
    if part in SAVINGS:
        list_steps = {"savings": list_savings, "inference_savings": list_inference_savings}[part]
        return list_steps(arguments.models[0], dtype, arguments.batch_size)
    first, batch_size = arguments.models[0], arguments.curve_batch_size
    case = partial(Case, part, dtype=dtype)
    cases = {
        "image_size": lambda mode: [
            case(model, value=size, fields={"image_size": size}, batch_size=batch_size, mode=mode)
            for model in arguments.models
            for size in arguments.image_sizes
        ],
        "depth": lambda mode: [
            case(first, value=depth, fields={"num_hidden_layers": depth}, batch_size=batch_size, mode=mode)
            for depth in arguments.depths
        ],
        "width": lambda mode: [
            case(first, value=width, fields=widened(first, width), batch_size=batch_size, mode=mode)
            for width in arguments.widths
        ],
        "batch_size": lambda mode: [
            case(model, value=size, batch_size=size, mode=mode)
            for model in arguments.models
            for size in arguments.batch_sizes
        ],
    }
    return [each for mode in MODES for each in cases[part](mode)]


def list_savings(model: str, dtype: str, batch_size: int) -> list[Case]:
    """The plain training step, and those with less work; only a plain ViT can leave patches out."""
    case, config = partial(Case, "savings", model, dtype, batch_size), preset_config(model)
    smaller = shrink(model)
    drop_path = {"drop_path_rate": 0.4, "drop_path_schedule": "constant"}
    cases = [
        case(name="plain step"),
        case(name="drop path 0.4 in every block", fields=drop_path, goal=0.75),
        case(name=f"images of {smaller} pixels", image_size=smaller),
        case(name="gradient checkpointing", recomputes=True),
    ]
    if config.is_plain:
        masked = {"mask_ratio": 0.75}
        paper = ViTCustomConfig()
        small = small_decoder(config.hidden_size)
        decoders = {"the paper's decoder": {name: getattr(paper, name) for name in small}, "small decoder": small}
        cases.insert(2, case(name="patch dropout 0.5", fields={"patch_dropout": 0.5}, goal=0.6))
        cases[3:3] = [
            case(name=f"masked autoencoder 0.75, {decoder}", fields=masked | fields, is_masked=True, goal=0.4)
            for decoder, fields in decoders.items()
        ]
        cases[5:5] = list_merging(case)
    return cases


def list_inference_savings(model: str, dtype: str, batch_size: int) -> list[Case]:
    """Plain inference, and that with less work; only a plain ViT can merge patches."""
    case, smaller = partial(Case, "inference_savings", model, dtype, batch_size, "inference"), shrink(model)
    merging = list_merging(case) if preset_config(model).is_plain else []
    return [case(name="plain inference"), *merging, case(name=f"images of {smaller} pixels", image_size=smaller)]


def list_merging(case: Callable[..., Case]) -> list[Case]:
    goals = dict.fromkeys(MERGED) | dict.fromkeys(FASTER, 1 / 1.5)
    return [
        case(name=f"token merging, {count} a block", fields={"token_merging": count}, goal=goal)
        for count, goal in goals.items()
    ]


def shrink(model: str) -> int:
    """The side in pixels of smaller images, in whole patches."""
    config = preset_config(model)
    stride = math.prod(stage.patch_size for stage in config.stages)
    return stride * round(SMALLER * min(config.native_size) / stride)


def widened(model: str, width: int) -> dict:
    """Fields of a plain preset of another width: as many more heads, an MLP as many times as wide."""
    [stage] = preset_config(model).stages
    return {
        "hidden_size": width,
        "num_attention_heads": width * stage.num_attention_heads // stage.hidden_size,
        "intermediate_size": width * stage.intermediate_size // stage.hidden_size,
    }


# --------------------------------------------------------------------------------------------------------- measuring


def measure(cases: Sequence[Case], arguments: argparse.Namespace, title: str) -> None:
    """Fill in what came of the cases of a table, which take turns."""
    steps = {}
    for index, case in enumerate(tqdm(cases, f"{title}, warm-up", leave=False, disable=arguments.no_progress)):
        try:
            steps[index] = prepare(case, arguments.device, arguments.warmup)
        except torch.OutOfMemoryError as error:
            case.error = describe_error(error)
    start, rounds = time.perf_counter(), range(arguments.repeats)
    for count in tqdm(rounds, f"{title}, rounds", unit="round", leave=False, disable=arguments.no_progress):
        if count >= MIN_ROUNDS and time.perf_counter() - start > arguments.seconds * len(steps):
            break
        # Another one starts each round, so that none always follows the same one.
        for index in rotated(list(steps), count):
            try:
                cases[index].times.append(time_step(steps[index], arguments.device))
            except torch.OutOfMemoryError as error:
                cases[index].error = describe_error(error)
                del steps[index]
    del steps
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()


def count_flops(case: Case) -> float:
    """Additions and multiplications of an image's forward pass, in the mode of the case."""
    # Without memory or arithmetic, and by eager attention, whose products are all seen.
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        case.build(attn_implementation="eager")(torch.zeros(case.shape))
    return counter.get_total_flops() / case.batch_size


def prepare(case: Case, device: str, warmup: int) -> Step:
    """A warm step; the peak of memory of one more is noted."""
    torch.manual_seed(0)
    weights = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    model, images = case.build().to(device, weights), torch.randn(case.shape).to(device, weights)
    step = make_step(model, images, case.dtype)
    for _ in range(warmup):
        step()
    case.memory = measure_rise(step, device)
    return step


def make_step(model: PreTrainedModel, images: Tensor, dtype: str) -> Step:
    """Inference of the images (B, C, H, W), or in training mode forward, loss in fp32, backward and fused AdamW.

    The loss is the cross-entropy of a classifier or a masked autoencoder's own.
    """
    autocast = partial(torch.autocast, images.device.type, torch.bfloat16, enabled=dtype == "autocast")

    def infer() -> Tensor:
        with torch.inference_mode(), autocast():
            return model(images).logits

    if not model.training:
        return infer
    labels = torch.arange(len(images), device=images.device) % max(model.config.num_labels, 1)

    def compute_loss() -> Tensor:
        with autocast():
            output = model(images)
        return output.loss if output.loss is not None else F.cross_entropy(output.logits.float(), labels)

    return make_training_step(model.parameters(), compute_loss)


# --------------------------------------------------------------------------------------------------------- reporting


def header(environment: dict[str, str], arguments: argparse.Namespace) -> str:
    return f"""# Costs

{format_environment(environment)}
- device: {arguments.device}

Every time is a median with [quartiles] over rounds, and every ratio of times a median of the rounds' ratios. FLOPs, a
multiplication and an addition being two, are those of the forward pass: gradient checkpointing makes it once more in
the backward pass. Memory is what a step takes at most beside weights and the optimizer's moments."""


def format_table(part: str, dtype: str, cases: Sequence[Case]) -> str:
    title, columns, rows = (
        (
            f"Savings of {cases[0].model}",
            (
                MODE_NAMES[cases[0].mode], "**time / plain**", "goal", "FLOPs / plain", "memory / plain", "ms a step",
                "GFLOPs an image", "memory, MiB",
            ),
            [format_saving(case, cases[0]) for case in cases],
        )
        if part in SAVINGS
        else (
            f"By {name_axis(part)}",
            (
                "model", name_axis(part), "patches at first", "mode", "**images/s**", "ms an image",
                "GFLOPs an image", "memory, MiB",
            ),
            [format_point(case) for case in cases],
        )
    )  # fmt: skip
    if part != "batch_size":
        title += f", {cases[0].batch_size} images a step"
    return f"## {title}, {dtype}\n\n{tabulate(columns, rows)}"


def name_axis(part: str) -> str:
    return part.replace("_", " ")


def format_saving(case: Case, plain: Case) -> list[str]:
    ratios = [own / theirs for own, theirs in zip(case.times, plain.times)]
    goal = "-" if case.goal is None else f"at most {case.goal:.2g}"
    if case.goal is not None and ratios:
        goal += ": met" if np.median(ratios) <= case.goal else ": missed"
    return [
        case.name,
        format_error(case) or (format_quartiles(ratios, "{:.2f}".format) if ratios else "-"),
        goal,
        f"{case.flops / plain.flops:.2f}",
        f"{case.memory / plain.memory:.2f}" if case.memory and plain.memory else "-",
        format_quartiles([1000 * seconds for seconds in case.times]),
        format_number(case.flops / 1e9),
        format_memory(case),
    ]


def format_point(case: Case) -> list[str]:
    rows, columns = preset_config(case.model, **case.fields).stages[0].grid_size
    return [
        case.model,
        f"{case.value:,}",
        f"{rows * columns:,}",
        case.mode,
        format_error(case) or format_quartiles([case.batch_size / seconds for seconds in case.times]),
        format_quartiles([1000 * seconds / case.batch_size for seconds in case.times]),
        format_number(case.flops / 1e9),
        format_memory(case),
    ]


def format_error(case: Case) -> str:
    return "" if case.error is None else "failed: " + case.error[:160].replace("|", "\\|")


def format_memory(case: Case) -> str:
    return "-" if case.memory is None else f"{case.memory / 2**20:,.0f}"


def write(
    arguments: argparse.Namespace, environment: dict[str, str], report: Sequence[str], measured: Sequence[Case]
) -> None:
    """The tables, every time beside them, and a picture of the curves if there are any."""
    records = [{"environment": environment, "arguments": vars(arguments)}, *map(asdict, measured)]
    lines = (json.dumps(record, default=str) for record in records)
    arguments.output.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    curves, picture = [case for case in measured if case.part in CURVES and case.times], []
    if curves:
        file = arguments.output.with_suffix(".png")
        plot_curves(curves).savefig(file, dpi=150)
        picture = [f"![Time an image]({file.name})"]
    arguments.output.write_text("\n\n".join([*report, *picture]) + "\n", encoding="utf-8")


def plot_curves(cases: Sequence[Case]) -> Figure:
    """Draws time an image against what each curve goes along, a panel each and a row of them for each dtype.

    Dots are medians, bars quartiles; training is a solid line, inference a dashed one. All axes are logarithmic.
    """
    parts, dtypes, models = (
        list(dict.fromkeys(getattr(case, name) for case in cases)) for name in ("part", "dtype", "model")
    )
    colors = {model: GROUP_COLORS[index % len(GROUP_COLORS)] for index, model in enumerate(models)}
    figure = Figure(figsize=(2.9 * len(parts) + 0.9, 3.0 * len(dtypes) + 0.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    panels = figure.subplots(len(dtypes), len(parts), sharex="col", sharey="row", squeeze=False)
    for row, dtype in zip(panels, dtypes):
        for panel, part in zip(row, parts):
            shown = [case for case in cases if (case.part, case.dtype) == (part, dtype)]
            for model in models:
                for mode in MODES:
                    curve = [case for case in shown if (case.model, case.mode) == (model, mode)]
                    draw_curve(panel, sorted(curve, key=lambda case: case.value), colors[model], mode)
            finish_panel(panel, sorted({case.value for case in cases if case.part == part}))
        row[0].set_ylabel(f"ms an image, {dtype}")
    for panel, part in zip(panels[-1], parts):
        panel.set_xlabel(name_axis(part))
    lines = [Line2D([], [], color=colors[model], linewidth=1.6, label=model) for model in models]
    lines += [draw_style(mode) for mode in reversed(MODES)]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 2 * len(parts)), frameon=False)
    return figure


STYLES = {"training": {"linestyle": "-"}, "inference": {"linestyle": "--", "markerfacecolor": "white"}}


def draw_style(mode: str) -> Line2D:
    return Line2D([], [], color="0.3", marker="o", markersize=4, label=mode, **STYLES[mode])


def draw_curve(panel: Axes, curve: Sequence[Case], color: str, mode: str) -> None:
    if not curve:
        return
    times = np.array([np.percentile(case.times, [25, 50, 75]) / case.batch_size for case in curve]) * 1000
    low, median, high = times.T
    panel.errorbar(
        [case.value for case in curve], median, [median - low, high - median], color=color, marker="o", markersize=4,
        linewidth=1.4, elinewidth=1, **STYLES[mode],
    )  # fmt: skip


def finish_panel(panel: Axes, values: Sequence[int]) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(values, [str(value) for value in values])
    panel.xaxis.set_minor_locator(NullLocator())
    # Enough ticks where the times span less than a factor of ten.
    panel.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="0.92")
    panel.set_axisbelow(True)


if __name__ == "__main__":
    main()
