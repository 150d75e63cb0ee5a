"""Training runs of any kind: their folders and data, and what may end them before their time."""

import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import BaseImageProcessor, PreTrainedModel, TrainerState
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from model_cards.environment import code_commit, describe_hardware
from trainers import ema
from trainers.arguments import (
    AugmentationArguments,
    LossArguments,
    TrainingArguments,
    TrainingCommand,
    report_user_errors,
)
from trainers.augmentation import Augmentation, Crop
from trainers.data import (
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
from trainers.run_facts import Spent
from trainers.vit_trainer import CheckpointNotReadError, CheckpointNotWrittenError, TrainingDivergedError, ViTTrainer


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
    code_commit()  # what runs is what lies there now
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
    except (CheckpointNotReadError, BrokenImageError) as error:
        # A worker's comes with its traceback as its text.
        *_, last = str(error).splitlines()
        print(file=sys.stderr)  # the progress bar's line has no end
        with report_user_errors(program):
            raise ValueError(last.partition("BrokenImageError: ")[2] or last) from error
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


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    states = Path(folder).glob("checkpoint-*/trainer_state.json")
    return max((str(state.parent) for state in states), key=lambda path: int(path.rpartition("-")[2]), default=None)
