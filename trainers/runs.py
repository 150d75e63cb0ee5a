"""Training runs of any kind: their folders and data, and what may end them before their time."""

import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import transformers
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import BaseImageProcessor, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from model_cards.environment import code_commit, describe_hardware
from model_cards.facts import RUN
from model_cards.rendering import CARD, FIGURES
from modeling_vit_custom.command_line import report_user_errors, say
from trainers import ema
from trainers.arguments import (
    AugmentationArguments,
    LossArguments,
    TrainingArguments,
    TrainingCommand,
    check_writable,
    find_difference,
    plain_recipe,
    read_recipe,
    write_recipe,
)
from trainers.augmentation import Augmentation, Crop
from trainers.data import (
    TRAIN,
    VALIDATION,
    BrokenImageError,
    FetchError,
    Splits,
    load_splits,
    processor_transform,
    training_images,
    with_transform,
)
from trainers.hub import RECIPE, RefusedError
from trainers.memory import keep_freed_memory
from trainers.models import read_processor
from trainers.run_facts import Spent
from trainers.vit_trainer import (
    CheckpointNotReadError,
    CheckpointNotWrittenError,
    Contents,
    TrainingDivergedError,
    ViTTrainer,
    list_checkpoints,
    read_state,
)


# What the libraries that connect processes say when one of them is gone.
LOST_PROCESS = re.compile(
    r"closed by (the )?(remote )?peer|reset by peer|[Bb]roken pipe|was (likely )?closed|ncclRemoteError|process exited"
)


def check_output_dir(command: TrainingCommand) -> None:
    """What is in the output folder decides where a run starts, before hours of work.

    An unfinished run of the same command is gone on with. Nothing is replaced that nobody said may go.

    Raises:
        ValueError: if the output folder holds a model or another run, and neither overwriting nor resuming was asked
            for, or if there is no checkpoint to resume from, or the folder cannot be written to.
    """
    args = command.training
    folder = Path(args.output_dir)
    if args.overwrite and args.resume_from_checkpoint is not None:
        raise ValueError(
            f"--overwrite true starts again, and --resume_from_checkpoint {args.resume_from_checkpoint} goes on: "
            "give one of them"
        )
    check_writable(folder, "output_dir")
    if args.resume_from_checkpoint in ("true", "True"):
        args.resume_from_checkpoint = last_checkpoint(folder)
        if args.resume_from_checkpoint is None:
            raise ValueError(f"output_dir {str(folder)!r} holds no checkpoint to resume from")
    elif args.resume_from_checkpoint is None and not args.overwrite:
        args.resume_from_checkpoint = find_unfinished(folder, command)
    elif args.resume_from_checkpoint is not None:
        check_room(folder, Path(args.resume_from_checkpoint))
    chosen = gather_object([args.resume_from_checkpoint])
    if len(set(chosen)) > 1:
        different = " and ".join(repr(each) for each in dict.fromkeys(chosen))
        raise ValueError(f"processes would go on from {different}: all of them must see the same output_dir")
    if args.resume_from_checkpoint is not None:
        check_checkpoint(args)
        keep_images_per_step(command)


def check_room(folder: Path, checkpoint: Path) -> None:
    """Raises ValueError if a folder that a run goes on in is not the checkpoint's own and holds another one."""
    is_taken = any((folder / name).exists() for name in (RUN, CARD, "config.json")) or list_checkpoints(folder)
    if is_taken and checkpoint.resolve().parent != folder.resolve():
        raise ValueError(
            f"output_dir {str(folder)!r} already holds another run than {str(checkpoint)!r} is of: give another one, "
            "or pass --resume_from_checkpoint true to go on with the one that is there"
        )


def find_unfinished(folder: Path, command: TrainingCommand) -> str | None:
    """The last checkpoint of an unfinished run of the same command; none if it got to none, or there is no run.

    Raises:
        ValueError: if the folder holds a model or another run.
    """
    there, checkpoint = f"output_dir {str(folder)!r}", last_checkpoint(folder)
    asked = plain_recipe(command.given)
    begun = read_recipe(str(folder / RECIPE)) if (folder / RECIPE).exists() else None
    is_other_model = (folder / "config.json").exists() and asked != begun
    if (folder / RUN).exists() or (checkpoint is None and is_other_model):
        raise ValueError(f"{there} already holds a model: pass --overwrite true or another one")
    others = [] if begun is not None else [name for name in (CARD, *FIGURES) if (folder / name).exists()]
    if others:
        raise ValueError(
            f"{there} holds a {others[0]}, in whose place the model's would come: pass --overwrite true or another one"
        )
    choice = "pass --resume_from_checkpoint true to go on, --overwrite true to start again, or another output_dir"
    if begun is None and list_checkpoints(folder):
        raise ValueError(f"{there} already holds checkpoints: {choice}")
    if checkpoint is None:
        return None
    name = find_difference(asked, begun)
    if name is not None:
        one, other = (f"--{name} {each[name]}" if name in each else f"no --{name}" for each in (begun, asked))
        raise ValueError(f"{there} holds an unfinished run with {one}, and now there is {other}: {choice}")
    return checkpoint


def check_checkpoint(args: TrainingArguments) -> None:
    """Raises ValueError if a run cannot go on from the checkpoint that it was given."""
    checkpoint = Path(args.resume_from_checkpoint)
    if not is_whole(checkpoint):
        raise ValueError(f"--resume_from_checkpoint {str(checkpoint)!r} is no checkpoint: give true or its folder")
    if not (checkpoint / "scheduler.pt").exists():
        raise ValueError(f"{str(checkpoint)!r} holds weights alone: fine-tune it by --model, or start again")
    if args.ema_decay and not (checkpoint / ema.FILE).exists():
        raise ValueError(f"{str(checkpoint)!r} holds no averages: resume it with --ema_decay 0, as it was trained")
    state = read_state(checkpoint)
    steps, epochs = args.max_steps, args.num_train_epochs
    is_done = state.global_step >= steps if steps > 0 else state.epoch >= epochs
    if is_done and (Path(args.output_dir) / RUN).exists():
        raise ValueError(
            f"{str(checkpoint)!r} is {state.global_step} steps ({state.epoch:g} epochs) old: nothing is left to train"
        )


def keep_images_per_step(command: TrainingCommand) -> None:
    """A run that goes on with another number of processes takes as many images a step as before, or its steps, its
    schedule and its place in the data would be others.

    Raises:
        ValueError: if it cannot, or was asked for another number.
    """
    args, folder = command.training, Path(command.training.output_dir)
    before = Contents.read(read_state(Path(args.resume_from_checkpoint))).get("images_per_step")
    now = args.images_per_step
    if before in (None, now):
        return
    begun = read_recipe(str(folder / RECIPE)) if (folder / RECIPE).exists() else {}
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
    asked = plain_recipe(command.given)
    if before % args.world_size or any(asked.get(name) != begun.get(name) for name in sizes):
        raise ValueError(
            f"{args.resume_from_checkpoint!r} is of a run with {before} images a step, and now there are {now}: choose "
            "--per_device_train_batch_size and --gradient_accumulation_steps that make as many"
        )
    of_each = before // args.world_size
    largest = next(size for size in range(min(args.train_batch_size, of_each), 0, -1) if of_each % size == 0)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = largest, of_each // largest
    if args.base_learning_rate is not None:
        args.learning_rate = args.base_learning_rate * before / 256
    if args.should_save:
        accumulated = f" x {of_each // largest} accumulated" if of_each > largest else ""
        print(f"{before} images a step as before: {largest}{accumulated} on each of {args.world_size} processes")


def hide_progress_bars(training_args: TrainingArguments) -> None:
    """Where `disable_tqdm` wants none: it reaches neither those of reading images nor those of loading weights."""
    if training_args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def load_training_splits(command: TrainingCommand, needs_labels: bool = True) -> Splits:
    """See `trainers.data.load_splits`; the training arguments fit what comes back.

    Raises:
        ValueError: if they cannot, or something is wrong with the data set.
    """
    training_args = command.training
    hide_progress_bars(training_args)
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
    in_workers = None if on_device else augmentation
    train_dataset = training_images(splits[TRAIN], crop, in_workers, command.training.seed, command.data.on_corrupt)
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


def train(trainer: ViTTrainer, command: TrainingCommand) -> TrainOutput:
    """What the Trainer reports; a run that cannot go on ends in one line.

    Raises:
        SystemExit: after an interruption, a loss that is not finite, a broken image of a stream, a checkpoint that
            could not be written or read, or the end of another process of the run.
    """
    args, program = trainer.args, command.program
    code_commit()  # what runs is what lies there now
    if args.device.type == "cpu":
        keep_freed_memory()
    trainer.add_callback(Spent())
    trainer.add_callback(StopOnTermination(trainer.contents, args.world_size))
    if args.should_save:
        clean_output_dir(args)
        write_recipe(Path(args.output_dir) / RECIPE, command.given)
    if args.resume_from_checkpoint and trainer.is_world_process_zero():
        print(f"Going on from {args.resume_from_checkpoint}")
    try:
        output = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted at step {trainer.state.global_step}: {how_to_go_on(command)}", file=sys.stderr)
        raise SystemExit(130) from None
    except TerminatedError:
        if trainer.is_world_process_zero():
            step = trainer.state.global_step
            print(f"\n{program}: told to stop (SIGTERM) at step {step}: {how_to_go_on(command)}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    except TrainingDivergedError as error:
        saved = last_checkpoint(args.output_dir)
        kept = f"{saved} is from before" if saved else "nothing was saved before"
        raise SystemExit(f"{program}: error: training diverged, {error}; {kept}: lower --learning_rate") from error
    except CheckpointNotWrittenError as error:
        raise SystemExit(f"{program}: error: {error}; {how_to_go_on(command)}") from error
    except (CheckpointNotReadError, BrokenImageError) as error:
        print(file=sys.stderr)  # the progress bar's line has no end
        with report_user_errors(program):
            raise ValueError(say(error)) from error
    except RuntimeError as error:
        if args.world_size == 1 or not LOST_PROCESS.search(str(error)):
            raise
        lost = f"lost another process of the run at step {trainer.state.global_step}, whose own message says why"
        *_, said = str(error).splitlines()
        raise SystemExit(f"\n{program}: error: {lost} ({said}); {how_to_go_on(command)}") from error
    return output


@contextmanager
def noticing_lost_images(command: TrainingCommand) -> Iterator[None]:
    """Ends a run in one line whose images cannot be fetched any longer from where they lie."""
    try:
        yield
    except FetchError as error:
        message = f"\n{command.program}: error: {say(error)}; {how_to_go_on(command)}"
        raise SystemExit(message) from error


def clean_output_dir(args: TrainingArguments) -> None:
    """Takes away what would be taken for a part of the run: checkpoints of an older one, those that were given up by
    going back to an earlier one, and half-written ones."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    start = args.resume_from_checkpoint and read_state(Path(args.resume_from_checkpoint)).global_step
    for step, checkpoint in list_checkpoints(folder).items():
        if start is None or step > start or not is_whole(checkpoint):
            if not args.overwrite and not is_whole(checkpoint):
                print(f"{checkpoint} is not whole, as a run leaves it that dies while it saves: it is taken away")
            shutil.rmtree(checkpoint)
    (folder / RUN).unlink(missing_ok=True)  # what is there is unfinished from now on


def how_to_go_on(command: TrainingCommand) -> str:
    """The end of a message on a run that ended before its time."""
    args = command.training
    saved = last_checkpoint(args.output_dir)
    if saved is None:
        return "nothing was saved yet"
    if args.save_only_model:
        return f"{saved} holds weights alone: fine-tune it by --model"
    again = "the same command"
    if args.overwrite:
        again += ", with --resume_from_checkpoint true in place of --overwrite,"
    elif command.given.get("resume_from_checkpoint") not in (None, "true", "True"):
        again += ", with --resume_from_checkpoint true,"
    return f"{saved} is complete: {again} goes on from there"


class TerminatedError(Exception):
    """A run was told to stop, and did so after a checkpoint."""


class StopOnTermination(TrainerCallback):
    """After SIGTERM, a scheduler's notice, a checkpoint is saved at the end of the step, and nothing else is done.

    An evaluation that goes on comes to its end before; one that would be next is left to the run that goes on. The
    Trainer's own `enable_jit_checkpoint` waits for three seconds, and saves while other processes train on.

    Raises:
        TerminatedError: in all processes, when the checkpoint is there.
    """

    def __init__(self, contents: Contents, world_size: int):
        self.contents, self.was_told, self.is_stopping, self.previous = contents, False, False, None
        # NCCL would make the processor wait for the GPU at every step.
        self.group = torch.distributed.new_group(backend="gloo") if world_size > 1 else None

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, _number, _frame) -> None:
        self.was_told = True

    def on_step_end(self, args, state, control, **kwargs):
        # Processes hear of it at different steps, and must save the same one.
        told = torch.tensor(int(self.was_told))
        if self.group is not None:
            torch.distributed.all_reduce(told, group=self.group)
        if told:
            # An evaluation could take longer than the notice lasts.
            self.is_stopping = control.should_save = True
            self.contents.owes_evaluation, control.should_evaluate = control.should_evaluate, False

    def on_save(self, args, state, control, **kwargs):
        if self.is_stopping:
            self.on_train_end(args, state, control)
            raise TerminatedError

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self.previous is None else self.previous)


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
    whole = {step: path for step, path in list_checkpoints(Path(folder)).items() if is_whole(path)}
    return str(whole[max(whole)]) if whole else None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, which is the Trainer's state, and nothing of it was deleted."""
    try:
        state = read_state(checkpoint)
    except (OSError, TypeError, ValueError):
        return False
    files = Contents.read(state).get("files", {})
    try:
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False
