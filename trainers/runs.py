"""Training runs of any kind: their folders and data, what may end them before their time, and facts about them."""

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from model_cards.citations import PAPERS
from model_cards.environment import EnergyMeter, code_commit, describe_hardware, library_versions, peak_memory
from model_cards.metadata import is_repo_id
from modeling_vit_custom import ViTCustomConfig, list_presets
from trainers import ema
from trainers.arguments import AugmentationArguments, LossArguments, TrainingArguments, TrainingCommand
from trainers.augmentation import Augmentation, Crop
from trainers.data import (
    BUILT_IN_TITLES,
    TRAIN,
    VALIDATION,
    BrokenImageError,
    Splits,
    load_splits,
    processor_transform,
    training_images,
    with_transform,
)
from trainers.hub import RefusedError
from trainers.models import read_processor
from trainers.vit_trainer import CheckpointNotReadError, CheckpointNotWrittenError, TrainingDivergedError, ViTTrainer


SECONDS_BETWEEN_READINGS = 60.0  # of the energy counters


def check_output_dir(training_args: TrainingArguments) -> None:
    """Refuse to replace a model that nobody said may go, and a folder that cannot be written to after hours of work.

    Raises:
        ValueError: if the output folder holds a model, and neither overwriting nor resuming was asked for, or if there
            is no checkpoint to resume from, or the folder cannot be written to.
    """
    folder = Path(training_args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {str(folder)!r} is a file: give a folder")
    if training_args.resume_from_checkpoint in ("true", "True"):
        training_args.resume_from_checkpoint = last_checkpoint(folder)
        if training_args.resume_from_checkpoint is None:
            raise ValueError(f"output_dir {str(folder)!r} holds no checkpoint to resume from")
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is not None:
        state_file = Path(checkpoint) / "trainer_state.json"
        if not state_file.exists():
            raise ValueError(f"--resume_from_checkpoint {checkpoint!r} is no checkpoint: give true or its folder")
        if not (Path(checkpoint) / "scheduler.pt").exists():
            raise ValueError(f"{checkpoint!r} holds weights alone: fine-tune it by --model, or start again")
        if training_args.ema_decay and not (Path(checkpoint) / ema.FILE).exists():
            raise ValueError(f"{checkpoint!r} holds no averages: resume it with --ema_decay 0, as it was trained")
        state = TrainerState.load_from_json(str(state_file))
        steps, epochs = training_args.max_steps, training_args.num_train_epochs
        if state.global_step >= steps if steps > 0 else state.epoch >= epochs:
            raise ValueError(
                f"{checkpoint!r} is {state.global_step} steps ({state.epoch:g} epochs) old: nothing is left to train"
            )
    if checkpoint is None and not training_args.overwrite:
        if (folder / "config.json").exists():
            raise ValueError(f"output_dir {str(folder)!r} already holds a model: pass --overwrite true or another one")
        if any(folder.glob("checkpoint-*")):
            raise ValueError(
                f"output_dir {str(folder)!r} already holds checkpoints: pass --resume_from_checkpoint true to go on, "
                "--overwrite true to start again, or another one"
            )
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {str(folder)!r} cannot be written to: {error.strerror}") from error


def load_training_splits(command: TrainingCommand, needs_labels: bool = True) -> Splits:
    """See `trainers.data.load_splits`; the training arguments fit what comes back.

    Raises:
        ValueError: if they cannot, or something is wrong with the data set.
    """
    training_args = command.training
    if command.data.streaming:
        check_streaming(command.augmentation, command.loss, training_args)
    splits = load_splits(command.data, training_args.seed, needs_labels)
    if not command.data.streaming:
        check_batch_size(training_args, len(splits[TRAIN]))
    if VALIDATION not in splits:
        train_without_validation(training_args)
    return splits


def prepare_images(
    command: TrainingCommand, splits: Splits, processor: BaseImageProcessor
) -> tuple[torch.utils.data.Dataset, Augmentation | None, dict[str, Dataset | IterableDataset]]:
    """Images to train on, how the training device augments them, and every split as the published processor makes it.

    There is no augmentation on the device where the data loader's workers do it.

    Raises:
        ValueError: if the processor or the augmentation's arguments do not fit.
    """
    size, mean, std = read_processor(processor)
    crop, augmentation = Crop(command.augmentation, size), Augmentation(command.augmentation, mean, std)
    on_device = command.augmentation.augment_on_device
    train_dataset = training_images(
        splits[TRAIN], crop, None if on_device else augmentation, on_corrupt=command.data.on_corrupt
    )
    evaluated = {
        name: with_transform(split, processor_transform(processor), command.data.on_corrupt)
        for name, split in splits.items()
    }
    return train_dataset, augmentation if on_device else None, evaluated


def check_streaming(
    augmentation_args: AugmentationArguments, loss_args: LossArguments, training_args: TrainingArguments
) -> None:
    """Raises ValueError for what must know the number of training images or their labels beforehand."""
    if training_args.max_steps <= 0:
        raise ValueError("--streaming true needs --max_steps: a stream does not say how long it is")
    needing = {
        "repeated_augmentation": augmentation_args.repeated_augmentation > 1,
        "class_balanced_sampling": loss_args.class_balanced_sampling,
        "class_weight_beta": loss_args.class_weight_beta,
        "logit_adjustment": loss_args.logit_adjustment,
        "unmixed_epochs": training_args.unmixed_epochs,
        "unmasked_epochs": training_args.unmasked_epochs,
        "initial_image_size": training_args.initial_image_size,
    }
    refused = [name for name, value in needing.items() if value]
    if refused:
        raise ValueError(f"--{refused[0]} must know all training images beforehand: not with --streaming true")


def check_batch_size(training_args: TrainingArguments, num_images: int) -> None:
    """Raises ValueError if a step would need more images than there are."""
    size, devices = training_args.per_device_train_batch_size, training_args.world_size
    if size * devices > num_images:
        raise ValueError(
            f"per_device_train_batch_size={size} on {devices} device(s) is more than the {num_images:,} training "
            f"images: choose at most {num_images // devices}"
        )


def train_without_validation(training_args: TrainingArguments) -> None:
    """Nothing is evaluated before the end.

    Raises:
        ValueError: if the best checkpoint was asked for.
    """
    if training_args.load_best_model_at_end:
        raise ValueError("--load_best_model_at_end true needs a validation split to tell which model is best")
    training_args.eval_strategy = IntervalStrategy.NO


def describe(name: str, model: PreTrainedModel, splits: Splits, training_args: TrainingArguments) -> str:
    """Two lines on what is about to happen; `name` says of which model."""
    sizes = ", ".join(
        f"{len(split):,} {split_name}" if isinstance(split, Dataset) else f"streamed {split_name}"
        for split_name, split in splits.items()
    )
    steps, epochs = training_args.max_steps, training_args.num_train_epochs
    hardware = describe_hardware(training_args.device, training_args.world_size)
    length = f"{steps:,} steps" if steps > 0 else f"{epochs:g} epochs"
    trained = model.num_parameters(only_trainable=True)
    of_them = "" if trained == model.num_parameters() else f" ({trained:,} of them trained)"
    return f"{name}: {model.num_parameters():,} parameters{of_them}\n{sizes} images; {length} on {hardware}"


def train(trainer: ViTTrainer, program: str) -> TrainOutput:
    """What the Trainer reports; a run that cannot go on ends in one line.

    Raises:
        SystemExit: after an interruption, a loss that is not finite, a broken image of a stream, or a checkpoint that
            could not be written or read.
    """
    args = trainer.args
    trainer.add_callback(Spent())
    if args.overwrite and not args.resume_from_checkpoint and args.should_save:
        for folder in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(folder)  # or an interrupted run would go on from another's
    try:
        output = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except KeyboardInterrupt:
        saved = last_checkpoint(args.output_dir)
        further = f"go on from {saved} by --resume_from_checkpoint true" if saved else "nothing was saved yet"
        print(f"\n{program}: interrupted at step {trainer.state.global_step}: {further}", file=sys.stderr)
        raise SystemExit(130) from None
    except TrainingDivergedError as error:
        saved = last_checkpoint(args.output_dir)
        kept = f"{saved} is from before" if saved else "nothing was saved before"
        raise SystemExit(f"{program}: error: training diverged, {error}; {kept}: lower --learning_rate") from error
    except CheckpointNotWrittenError as error:
        saved = last_checkpoint(args.output_dir)
        kept = (
            f"{saved} is complete: go on from it by --resume_from_checkpoint true" if saved else "there is none before"
        )
        raise SystemExit(f"{program}: error: {error}; {kept}") from error
    except CheckpointNotReadError as error:
        print(f"\n{program}: error: {error}: resume with the arguments it had", file=sys.stderr)
        raise SystemExit(2) from error
    except BrokenImageError as error:
        # A worker's comes with its traceback as its text.
        *_, last = str(error).splitlines()
        print(f"\n{program}: error: {last.partition('BrokenImageError: ')[2] or last}", file=sys.stderr)
        raise SystemExit(2) from error
    return output


def push(trainer: ViTTrainer, program: str) -> None:
    """Sends a finished run to the Hub, if that was asked for.

    Raises:
        SystemExit: if the Hub does not take it; nothing is lost.
    """
    args = trainer.args
    if not args.push_to_hub or not trainer.is_world_process_zero():
        return
    try:
        print(f"\nOn the Hub: {trainer.push_to_hub().commit_url}")
    except (RefusedError, ValueError) as error:
        branch = f" --revision {args.hub_revision}" if args.hub_revision else ""
        again = f"python -m trainers.publish {shlex.quote(args.output_dir)} {trainer.hub_model_id}{branch}"
        raise SystemExit(
            f"{program}: error: trained, but not published: {error}; {args.output_dir} is complete: go on by `{again}`"
        ) from error


class Spent(TrainerCallback, ExportableState):
    """Seconds and joules of training, kept in the Trainer's state: a resumed run adds to those of its checkpoint."""

    def __init__(self):
        self.before = {"seconds": 0.0, "joules": 0.0}
        self.start = self.last_reading = time.perf_counter()
        self.meter = EnergyMeter()

    @classmethod
    def read(cls, state: TrainerState) -> dict[str, float | None]:
        """`seconds`, and `joules` if they could be measured from the start."""
        saved = state.stateful_callbacks.get(cls.__name__)
        return saved["attributes"]["before"] if saved else {"seconds": 0.0, "joules": 0.0}

    def state(self) -> dict:
        self.meter.update()
        joules = (self.before["joules"], self.meter.joules)
        spent = {
            "seconds": self.before["seconds"] + time.perf_counter() - self.start,
            "joules": None if None in joules else sum(joules),
        }
        return {"args": {}, "attributes": {"before": spent}}

    def on_train_begin(self, args, state, control, **kwargs):
        self.before, self.start, self.meter = self.read(state), time.perf_counter(), EnergyMeter()
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_step_end(self, args, state, control, **kwargs):
        if time.perf_counter() - self.last_reading > SECONDS_BETWEEN_READINGS:
            self.meter.update()
            self.last_reading = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        state.stateful_callbacks[type(self).__name__] = self.state()


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    states = Path(folder).glob("checkpoint-*/trainer_state.json")
    return max((str(state.parent) for state in states), key=lambda path: int(path.rpartition("-")[2]), default=None)


def gather_facts(command: TrainingCommand, trainer: ViTTrainer, size: tuple[int, int]) -> dict:
    """What a card says of any run, finished or not, as fields of `TrainingRun`."""
    args, state, model, data = trainer.args, trainer.state, command.model.model, command.data.dataset
    from_scratch, is_built_in = model in list_presets(), data in BUILT_IN_TITLES
    is_done = state.global_step >= state.max_steps
    spent = Spent.read(state)
    wall_time, energy = spent["seconds"], spent["joules"]
    images = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "name": (args.hub_model_id or Path(args.output_dir).resolve().name).rpartition("/")[-1],
        "license": args.license,
        "model_type": trainer.model.config.model_type,
        "architecture": name_architecture(trainer.model.config),
        "preset": model if from_scratch else None,
        "image_size": size,
        "ema_decay": args.ema_decay or None,
        "from_scratch": from_scratch,
        **name_origin("base_model", "base_folder", None if from_scratch else model),
        **name_origin("dataset", "dataset_folder", None if is_built_in else data),
        "dataset_title": BUILT_IN_TITLES.get(data),
        "log_history": state.log_history,
        "step": None if is_done else state.global_step,
        "max_steps": None if is_done else state.max_steps,
        "command": format_command(command.program, command.argv, args.world_size),
        "commit": code_commit(),
        "seed": args.seed,
        "versions": library_versions(),
        "hardware": describe_hardware(args.device, args.world_size),
        "wall_time": wall_time,
        "images_per_second": images / wall_time if wall_time else None,
        "peak_memory": peak_memory(args.device),
        "energy": energy / 3.6e6 if energy else None,
        "carbon": energy / 3.6e6 * args.carbon_intensity if energy and args.carbon_intensity else None,
    }


def name_split(split: Dataset | IterableDataset, name: str) -> str | None:
    """What a split is called in its data set, if it is another name: `train` where it was held out of that."""
    origin = None if split.split is None else str(split.split)
    return None if origin == name else origin


def name_origin(on_hub: str, local: str, name: str | None) -> dict[str, str]:
    """What a model or a data set is called: by its Hub id, or by its folder without what lies above it.

    As everywhere in the ecosystem, a folder takes precedence over a Hub id that reads like it.
    """
    if name is None:
        return {}
    if Path(name).exists() or not is_repo_id(name):
        return {local: Path(name).resolve().name}
    return {on_hub: name}


def name_architecture(config: PreTrainedConfig) -> str | None:
    """The paper that a configuration comes closest to, as a key of `model_cards.citations.PAPERS`."""
    if config.model_type != ViTCustomConfig.model_type:
        return config.model_type if config.model_type in PAPERS else None
    if config.window_size:
        return "swin"
    if len(config.stages) > 1:
        return "pvt"
    if config.use_distillation_token:
        return "deit"
    return "vit"


def count_flops(model: PreTrainedModel, size: tuple[int, int]) -> int | None:
    """Additions and multiplications of one image's forward pass; none for models whose kernels cannot be counted."""
    if model.config.model_type != ViTCustomConfig.model_type:
        return None
    pixels = torch.zeros(1, model.config.num_channels, *size, device=model.device)
    was_training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(pixels, output_attentions=True)  # eager attention, whose products are all seen
    model.train(was_training)
    return counter.get_total_flops()


def format_command(program: str, argv: Sequence[str], num_processes: int = 1) -> str:
    """A command line as it may be published."""
    launcher = "python"
    if num_processes > 1:
        on_each_node = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
        nodes = f"--nnodes {num_processes // on_each_node} " if num_processes > on_each_node else ""
        launcher = f"torchrun {nodes}--nproc_per_node {on_each_node}"
    return f"{launcher} -m trainers.{program} {shlex.join(map(hide_folders, argv))}"


def hide_folders(argument: str) -> str:
    """The last part of an absolute path: the whole may say more of its owner than of what lies there."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{equals}{Path(value).name if Path(value).is_absolute() else value}"
