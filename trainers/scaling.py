"""Train a grid of models, sizes, shares of the data and seeds, and find how error falls and where families break even.

Every cell of the grid is a run of trainers.finetune in a process of its own; finished ones are kept, so that the same
command goes on where it was stopped, and one with more models, shares or seeds adds to the grid. Writes a page
(report.md) with its figures, and all numbers (scaling.json).
"""

import fcntl
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from model_cards.environment import describe_hardware
from model_cards.facts import RUN, TrainingRun, list_origins, read_run
from model_cards.scaling import FACTS, FILES, REPORT, write_study
from modeling_vit_custom import preset_config
from modeling_vit_custom.command_line import report_user_errors
from trainers.arguments import (
    COMMON_GROUPS,
    AugmentationArguments,
    DataArguments,
    LossArguments,
    ModelArguments,
    ScalingArguments,
    ScalingTrainingArguments,
    TrainingArguments,
    check_writable,
    find_difference,
    parse_arguments,
    plain_recipe,
    read_recipe,
    suggest,
    to_argv,
)
from trainers.classification import check_given
from trainers.cnns import cnn_config, list_cnns
from trainers.data import TRAIN, label_names, load_splits, thin_out
from trainers.hub import RECIPE
from trainers.models import is_preset, list_named, make_model, open_processor, parse_overrides, read_processor
from trainers.pace import STEP_COST, count_flops, describe_seconds
from trainers.run_facts import format_command
from trainers.runs import hide_progress_bars
from trainers.scaling_laws import Result, analyse
from trainers.vit_trainer import check_optimization


PROGRAM = "python -m trainers.scaling"
CELLS, LOGS, TIMINGS = "cells", "logs", "timings.json"
# What the grid decides for each of its cells.
OWN_FIELDS = ("train_fraction", "seed", "split_seed", "max_steps")
# With these a cell's cost would not follow from its images.
REFUSED = {
    "streaming": False,
    "initial_image_size": None,
    "teacher": None,
    "push_to_hub": False,
    "overwrite": False,
    "resume_from_checkpoint": None,
    "load_best_model_at_end": False,
    "eval_strategy": "no",
}
# Of every cell, unless something else was asked for.
DEFAULTS = {"card_images": 0, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 0.25}
START_SECONDS = 25.0  # of a process and its data
POLL_SECONDS = 0.5
TIMED_STEPS = 3
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"

EXAMPLES = f"""\
  # what it would train and how long that would take
  {PROGRAM} --dataset path/to/images --models vit_small_patch16_224 resnet18_224 \\
      --learning_rate 1e-3 --warmup_steps 0.1 --dry_run

  # three widths of a ViT and a CNN on five shares of CIFAR-10, two seeds each, as far as two hours allow
  {PROGRAM} --recipe cifar10_scaling --max_minutes 120 --output_dir runs/scaling

  # fields of a preset replaced
  {PROGRAM} --dataset digits --models vit_nano_patch2_8:num_hidden_layers=2,pooling=mean resnet_nano_64 \\
      --fractions 0.1 0.2 0.4 0.7 1 --num_train_epochs 20"""


@dataclass(frozen=True)
class Size:
    """A model of the grid at one width.

    Attributes:
        family: The model as it was asked for, `PRESET[:FIELD=VALUE,...]`.
        width: Its share of the preset's.
        model: The preset.
        overrides: Fields of its configuration, `NAME=VALUE`.
        parameters: How many.
        flops: Additions and multiplications of an image's forward pass.
        seconds: Of a training step, for each image.
    """

    family: str
    width: float
    model: str
    overrides: tuple[str, ...]
    parameters: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Cell:
    """A run of the grid.

    Attributes:
        size: What is trained.
        fraction: Share of the training images.
        seed: Of everything that is drawn.
        steps: Steps of training.
        is_prolonged: Whether these are more than its epochs have.
        sights: Images of all these steps.
        evaluated: Images that are evaluated on at the end.
    """

    size: Size
    fraction: float
    seed: int
    steps: int
    is_prolonged: bool
    sights: int
    evaluated: int

    @property
    def name(self) -> str:
        """Of its folder."""
        model = re.sub(r"[^\w.=,-]+", "-", self.size.family)
        return f"{model}-w{self.size.width:g}-f{self.fraction:g}-s{self.seed}"

    @property
    def compute(self) -> float:
        """Additions and multiplications of training."""
        return float(STEP_COST * self.size.flops * self.sights)

    @property
    def seconds(self) -> float:
        """What it is estimated to take."""
        return START_SECONDS + self.size.seconds * (self.sights + self.evaluated / STEP_COST)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with report_user_errors("scaling"):
        command = read_command(argv)
        grid, folder = command.grid, Path(command.training.output_dir)
        check_writable(folder, "output_dir")
        is_begun = any((folder / name).exists() for name in (FACTS, CELLS))
        others = [] if is_begun else [name for name in FILES if (folder / name).exists()]
        if others:
            raise ValueError(f"output_dir {str(folder)!r} holds a {others[0]!r} of something else: give another")
        cells = plan(command, folder)
        done = {cell.name for cell in cells if is_done(folder, cell, command)}
        chosen = choose(cells, done, grid.max_minutes, grid.max_flops, command.num_devices)
    print(describe_plan(cells, chosen, done, command.num_devices))
    if grid.dry_run:
        return
    keep_timings(cells, folder, command)
    failed = run([cell for cell in chosen if cell.name not in done], folder, command)
    finished = [cell for cell in chosen if cell.name in done or is_done(folder, cell, command)]
    if not finished:
        raise SystemExit(f"scaling: error: no run has finished: see {folder / LOGS}")
    write_study(folder, describe_study(finished, len(chosen), folder, command))
    print(f"\nReport of {len(finished)} runs: {folder / REPORT}")
    if failed:
        raise SystemExit(f"scaling: error: not all runs have finished: {', '.join(failed)}: see {folder / LOGS}")


# -------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Command:
    """What was asked for; see `TrainingCommand`.

    Attributes:
        num_devices: GPUs or threads of the processor that cells have to themselves, as many as there are jobs at most.
    """

    argv: Sequence[str]
    grid: ScalingArguments
    data: DataArguments
    loss: LossArguments
    training: TrainingArguments
    given: dict
    num_devices: int

    @property
    def num_threads(self) -> int:
        """Of each cell on a processor."""
        return max(1, torch.get_num_threads() // self.grid.jobs)


def read_command(argv: Sequence[str]) -> Command:
    """Raises ValueError for what does not fit a grid."""
    groups = [ScalingArguments, DataArguments, AugmentationArguments, LossArguments, ScalingTrainingArguments]
    grid, data, _, loss, training, given = parse_arguments(groups, argv, PROGRAM, __doc__, EXAMPLES)
    for name in OWN_FIELDS:
        if name in given:
            raise ValueError(f"--{name} is what the grid varies: leave it out")
    asked = vars(training) | vars(data) | vars(loss) | DEFAULTS | given
    for name, usual in REFUSED.items():
        if asked[name] != usual:
            raise ValueError(f"--{name} {asked[name]} does not go with a grid: leave it out")
    places = count_places(training.device.type)
    grid.jobs = grid.jobs or (places if training.device.type == "cuda" else 1)
    command = Command(argv, grid, data, loss, training, given, min(grid.jobs, places))
    check_given(command)
    return command


def count_places(device: str) -> int:
    """How many runs there is room for side by side: one on each GPU, or on each thread of a processor."""
    if device == "cuda":
        return torch.cuda.device_count()
    return torch.get_num_threads() if device == "cpu" else 1


def plan(command: Command, folder: Path) -> list[Cell]:
    """All cells of the grid with what they would cost: those of the first seed first, the cheapest before the others.

    Raises:
        ValueError: for a model that there is not, or a share of too few images or of as many as another one.
    """
    grid, training = command.grid, command.training
    hide_progress_bars(training)
    splits = load_splits(replace(command.data, train_imbalance=1.0), training.seed)
    evaluated = sum(len(split) for name, split in splits.items() if name != TRAIN)
    batch, counts = training.images_per_step, {}
    for fraction in grid.fractions:
        images = len(thin_out(splits, replace(command.data, train_fraction=fraction))[TRAIN])
        if images < batch:
            raise ValueError(
                f"--fractions {fraction:g} leaves {images} images, less than the {batch} of a step: choose a larger "
                "share or a smaller --per_device_train_batch_size"
            )
        same = [other for other, count in counts.items() if count == images]
        if same:
            raise ValueError(
                f"--fractions {same[0]:g} and {fraction:g} leave the same {images} images, as each class keeps whole "
                "ones: leave one out"
            )
        counts[fraction] = images
    sizes = measure_sizes(command, label_names(splits), folder)
    cells = []
    for seed, size, (fraction, images) in itertools.product(grid.seeds, sizes, counts.items()):
        steps_of_epoch = math.ceil(images / batch)
        steps = math.ceil(training.num_train_epochs * steps_of_epoch)
        is_prolonged, steps = steps < grid.min_steps, max(steps, grid.min_steps)
        sights = round(steps * images / steps_of_epoch)  # the last step of an epoch has fewer
        cells.append(Cell(size, fraction, seed, steps, is_prolonged, sights, evaluated))
    return sorted(cells, key=lambda cell: (grid.seeds.index(cell.seed), cell.compute))


def measure_sizes(command: Command, labels: Sequence[str], folder: Path) -> list[Size]:
    """The models of the grid, each timed for a few steps; what an earlier call measured here is not measured again."""
    training, known = command.training, read_timings(folder)
    wanted = []
    for family, width in itertools.product(command.grid.models, command.grid.widths):
        name, overrides = read_family(family)
        arguments = ModelArguments(name, config_overrides=to_overrides(scale_width(name, width, overrides)))
        open_processor(arguments)  # builds the configuration, which may be wrong, before anything takes its time
        wanted.append((family, width, arguments))
    sizes = []
    for family, width, arguments in tqdm(wanted, "Timing models", leave=False, disable=training.disable_tqdm):
        facts = known.get(timing_key(family, width, command))
        if facts is None:
            model, processor = make_model(arguments, labels)
            check_optimization(model, training)
            size, _, _ = read_processor(processor)
            seconds = time_training(model, size, training, command.num_threads)
            facts = {"parameters": model.num_parameters(), "flops": count_flops(model, size), "seconds": seconds}
            del model
            torch.cuda.empty_cache()  # for the cells
        sizes.append(Size(family, width, arguments.model, tuple(arguments.config_overrides), **facts))
    return sizes


def timing_key(family: str, width: float, command: Command) -> str:
    """What a timing depends on."""
    training = command.training
    where = describe_hardware(training.device) + (", bf16" if training.bf16 else "")
    share = f", {command.grid.jobs} jobs" if command.grid.jobs > 1 else ""
    return f"{family} x {width:g}, {training.train_batch_size} images on {where}{share}"


def read_timings(folder: Path) -> dict[str, dict]:
    """What `keep_timings` wrote; nothing if there is none, or it is broken."""
    try:
        return json.loads((folder / TIMINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def keep_timings(cells: Sequence[Cell], folder: Path, command: Command) -> None:
    """For the next call, which would else plan otherwise."""
    known = read_timings(folder)
    for size in {cell.size for cell in cells}:
        facts = {name: getattr(size, name) for name in ("parameters", "flops", "seconds")}
        known[timing_key(size.family, size.width, command)] = facts
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TIMINGS).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def read_family(text: str) -> tuple[str, dict]:
    """`vit_nano_patch4_32:num_hidden_layers=6,pooling=mean` -> the preset and fields of its configuration.

    Raises:
        ValueError: if there is no such preset.
    """
    name, _, fields = text.partition(":")
    if not is_preset(name):
        near = suggest(name, list_named())
        raise ValueError(f"--models {text!r}: {name!r} is no preset, as list_presets() and list_cnns() name them{near}")
    # Commas of lists divide nothing.
    return name, parse_overrides([each for each in re.split(r",(?![^\[]*\])", fields) if each])


def to_overrides(fields: Mapping) -> list[str]:
    """The inverse of `trainers.models.parse_overrides`."""
    return [f"{name}={json.dumps(value)}" for name, value in fields.items()]


def scale_width(model: str, width: float, overrides: dict) -> dict:
    """Fields of a preset whose stages are all `width` times as wide, with as many times the heads and as wide MLPs."""
    if width == 1:
        return overrides
    if model in list_cnns():
        config = cnn_config(model, **overrides)
        stages = [max(1, round(width * each)) for each in config.hidden_sizes]
        return overrides | {"embedding_size": max(1, round(width * config.embedding_size)), "hidden_sizes": stages}
    stages = preset_config(model, **overrides).stages
    heads = [max(1, round(width * stage.num_attention_heads)) for stage in stages]
    widths = [count * max(1, round(width * stage.hidden_size / count)) for count, stage in zip(heads, stages)]
    mlps = [round(each * stage.intermediate_size / stage.hidden_size) for each, stage in zip(widths, stages)]
    if len(stages) == 1:
        return overrides | {"hidden_size": widths[0], "num_attention_heads": heads[0], "intermediate_size": mlps[0]}
    return overrides | {"hidden_sizes": widths, "num_attention_heads": heads, "intermediate_size": mlps}


def time_training(
    model: PreTrainedModel, size: tuple[int, int], training: TrainingArguments, num_threads: int
) -> float:
    """Seconds of a forward and a backward pass for each image of a step, as they are where they will be.

    Args:
        model: What is trained.
        size: Height and width of its images.
        training: Names the device and the number of images.
        num_threads: Of a processor.
    """
    device, all_threads = training.device, torch.get_num_threads()
    images = torch.randn(training.train_batch_size, model.config.num_channels, *size, device=device)
    labels = torch.arange(len(images), device=device) % model.config.num_labels
    model = model.to(device).train()
    seconds = []
    torch.set_num_threads(num_threads)
    try:
        for _ in range(1 + TIMED_STEPS):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=training.bf16):
                loss = F.cross_entropy(model(images).logits.float(), labels)
            loss.backward()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds.append(time.perf_counter() - start)
            model.zero_grad()
    finally:
        torch.set_num_threads(all_threads)
    return float(np.median(seconds[1:])) / len(images)


def choose(
    cells: Sequence[Cell],
    done: Collection[str],
    max_minutes: float | None,
    max_flops: float | None,
    num_devices: int,
) -> list[Cell]:
    """The cells that fit into a budget, in their order; one that does not fit leaves room for cheaper ones.

    Those that are done, by their names, have taken their part of the budget, and are there whatever it is.

    Raises:
        ValueError: if there is none.
    """
    chosen = [cell for cell in cells if cell.name in done]
    seconds = sum(cell.seconds for cell in chosen) / num_devices
    flops = sum(cell.compute for cell in chosen)
    for cell in (cell for cell in cells if cell.name not in done):
        later = (seconds + cell.seconds / num_devices, flops + cell.compute)
        if later[0] <= 60 * (max_minutes or math.inf) and later[1] <= (max_flops or math.inf):
            chosen.append(cell)
            seconds, flops = later
    if not chosen:
        cheapest = min(cells, key=lambda cell: cell.compute)
        raise ValueError(
            f"the budget allows none of {len(cells)} runs: the cheapest takes about "
            f"{describe_seconds(cheapest.seconds)} and {cheapest.compute:.2g} FLOPs"
        )
    return sorted(chosen, key=cells.index)


def describe_plan(cells: Sequence[Cell], chosen: Sequence[Cell], done: Collection[str], num_devices: int) -> str:
    """What is about to be trained, a line each size and one of all."""
    lines = []
    for size in dict.fromkeys(cell.size for cell in cells):
        of_size = [cell for cell in chosen if cell.size == size]
        total = sum(cell.seconds for cell in of_size)
        lines.append(
            f"{size.family} x {size.width:g}: {size.parameters:,} parameters, {size.flops / 1e9:.3g} GFLOPs an image, "
            f"{1 / size.seconds:,.0f} images/s; {len(of_size)} runs, about {describe_seconds(total)}"
        )
    left = [cell for cell in chosen if cell.name not in done]
    flops = sum(cell.compute for cell in chosen)
    text = f"{len(chosen)} of {len(cells)} runs, {flops:.2g} FLOPs"
    if len(chosen) < len(cells):
        text += f"; {len(cells) - len(chosen)} are left out by the budget"
    seconds = sum(cell.seconds for cell in left) / num_devices
    text += f". {len(left)} are to be trained, in about {describe_seconds(seconds)}"
    return "\n".join([*lines, text])


# --------------------------------------------------------------------------------------------------------------- run


def cell_argv(cell: Cell, folder: Path, command: Command) -> list[str]:
    """The command line of trainers.finetune."""
    own = {each.name for each in fields(ScalingArguments)}
    given = DEFAULTS | {name: value for name, value in command.given.items() if name not in own}
    of_cell = {
        "model": cell.size.model,
        "config_overrides": list(cell.size.overrides),
        "train_fraction": cell.fraction,
        "seed": cell.seed,
        "split_seed": cell.seed,
        "output_dir": str(folder / CELLS / cell.name),
    }
    if cell.is_prolonged:
        of_cell["max_steps"] = cell.steps
    return to_argv(plain_recipe(given) | of_cell)


def is_done(folder: Path, cell: Cell, command: Command) -> bool:
    """Whether a cell was trained to its end.

    Raises:
        ValueError: if it was trained otherwise than it would be now, or what it left is broken.
    """
    path = folder / CELLS / cell.name
    if not (path / RUN).exists():
        return False
    read_run(path)
    groups = [*COMMON_GROUPS, TrainingArguments]
    asked = plain_recipe(parse_arguments(groups, cell_argv(cell, folder, command), PROGRAM, __doc__, EXAMPLES)[-1])
    trained = read_recipe(str(path / RECIPE))
    name = find_difference(asked, trained)
    if name is not None:
        raise ValueError(
            f"{str(path)!r} was trained with --{name} {trained.get(name)}, and now there is {asked.get(name)}: "
            "give another output_dir"
        )
    return True


def run(cells: Sequence[Cell], folder: Path, command: Command) -> list[str]:
    """Trains cells, as many at once as `jobs`; returns the names of those that failed."""
    waiting, running, failed, late, free = list(cells), {}, [], [], list(range(command.grid.jobs))
    begun = {cell.name for cell in cells if (folder / CELLS / cell.name).exists()}
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    began, estimated, taken = time.monotonic(), 0.0, 0.0
    total = math.ceil(sum(cell.seconds for cell in cells))
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tqdm(total=total, bar_format=BAR, disable=command.training.disable_tqdm) as bar:
            while waiting or running:
                while waiting and free:
                    cell = waiting.pop(0)
                    # What was taken for an estimated second so far tells of the next ones.
                    later = cell.seconds * (taken / estimated if estimated else 1)
                    if time.monotonic() - began + later > 60 * (command.grid.max_minutes or math.inf):
                        late.append(cell.name)
                        continue
                    place = free.pop(0)
                    running[start(cell, folder, command, place)] = (cell, place, time.monotonic())
                    bar.set_description(f"{len(cells) - len(waiting)} of {len(cells)}: {cell.name}")
                for process in [each for each in running if each.poll() is not None]:
                    cell, place, start_time = running.pop(process)
                    free.append(place)
                    bar.update(cell.seconds)
                    if process.returncode == 0 and cell.name not in begun:
                        estimated, taken = estimated + cell.seconds, taken + time.monotonic() - start_time
                    if process.returncode:
                        failed.append(cell.name)
                        bar.write(f"{cell.name} failed: {read_end(folder / LOGS / f'{cell.name}.txt', process)}")
                bar.refresh()
                time.sleep(POLL_SECONDS if running else 0)
    except KeyboardInterrupt:
        print("\nscaling: interrupted: the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        try:
            end(running)
        finally:
            signal.signal(signal.SIGTERM, previous)
    if late:
        print(f"No time was left for {len(late)} runs: the same command goes on with them")
    return failed


def end(processes: Collection[subprocess.Popen]) -> None:
    """Ends runs, each of which saves a checkpoint first, from which it goes on.

    Raises:
        SystemExit: at Ctrl-C, if it does not wait for them any longer.
    """
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        print("\nscaling: not waited for: what was trained saves its checkpoint and ends", file=sys.stderr)
        raise SystemExit(130) from None


def read_end(file: Path, process: subprocess.Popen) -> str:
    """Why a process ended: the last line of its log, or the signal."""
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    *_, last = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return last.strip()


def start(cell: Cell, folder: Path, command: Command, place: int) -> subprocess.Popen:
    """A process of trainers.finetune on a device of its own or a share of the processor; what it says goes to a log.

    Raises:
        SystemExit: if one of an earlier call, which was killed, still trains the cell.
    """
    environment = dict(os.environ)
    if command.training.device.type == "cuda":
        visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
        devices = visible or [str(index) for index in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    elif command.grid.jobs > 1:
        environment["OMP_NUM_THREADS"] = str(command.num_threads)
    argv = [sys.executable, "-m", "trainers.finetune", *cell_argv(cell, folder, command)]
    with (folder / LOGS / f"{cell.name}.txt").open("a", encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by the process as long as it has the log open
        except BlockingIOError:
            raise SystemExit(
                f"scaling: error: {cell.name} is still trained by a process of an earlier call: wait, or end it"
            ) from None
        log.truncate(0)
        log.write(shlex.join(argv[1:]) + "\n")
        log.flush()
        # In a session of its own, so that Ctrl-C reaches it as the notice that it saves a checkpoint after.
        return subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


# ------------------------------------------------------------------------------------------------------------- study


def describe_study(finished: Sequence[Cell], num_chosen: int, folder: Path, command: Command) -> dict:
    """All that the page says of the cells that are finished, of so many that the budget allows."""
    runs = [read_run(folder / CELLS / cell.name) for cell in finished]
    # Shares that other seeds draw may have an image more: for one place in the laws, the first one's are counted.
    of_share = {cell.fraction: run for cell, run in reversed(list(zip(finished, runs)))}
    results = [to_result(cell, run, of_share[cell.fraction]) for cell, run in zip(finished, runs)]
    grid, first = command.grid, runs[0]
    evaluated = first.split_sizes[first.evaluation_split]
    return {
        "command": format_command("scaling", command.argv),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "origin": list_origins(runs),
        "jobs": grid.jobs,
        "dataset": first.dataset_title or first.dataset or first.dataset_folder,
        "evaluation_split": first.evaluation_split,
        "held_out": first.evaluation_origin == TRAIN,
        "num_evaluated": evaluated,
        "epochs": command.training.num_train_epochs,
        "min_steps": grid.min_steps,
        "seconds": sum(result.seconds for result in results),
        "grid": len(grid.models) * len(grid.widths) * len(grid.fractions) * len(grid.seeds),
        "unfinished": num_chosen - len(finished),
        "results": [asdict(result) for result in results],
        **analyse(results, evaluated),
    }


def to_result(cell: Cell, run: TrainingRun, of_share: TrainingRun) -> Result:
    """What a finished cell gave, with the images and sights of another run of its share."""
    return Result(
        family=cell.size.family,
        width=cell.size.width,
        fraction=cell.fraction,
        seed=cell.seed,
        images=of_share.split_sizes[TRAIN],
        sights=of_share.sights,
        parameters=run.num_parameters,
        flops=cell.size.flops,
        compute=float(STEP_COST * cell.size.flops * of_share.sights),
        seconds=run.wall_time,
        accuracy=run.results["accuracy"],
        loss=run.results["loss"],
    )


if __name__ == "__main__":
    main()
