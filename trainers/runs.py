"""Runs: their folders, and what may end them before their time."""

import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from trainers.arguments import TrainingArguments
from trainers.vit_trainer import CheckpointNotWrittenError, TrainingDivergedError, ViTTrainer


def check_output_dir(training_args: TrainingArguments) -> None:
    """Refuse to replace a model that nobody said may go, and a folder that cannot be written to after hours of work.

    Raises:
        ValueError: if the output folder holds a model, and neither overwriting nor resuming was asked for, or if there
            is no checkpoint to resume from.
        ValueError: if the folder cannot be written to.
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


def train(trainer: ViTTrainer, program: str) -> tuple[TrainOutput, float]:
    """What the Trainer reports, and the wall time in seconds; a run that cannot go on ends in one line.

    Raises:
        SystemExit: after an interruption, a loss that is not finite, or a checkpoint that could not be written.
    """
    args, start = trainer.args, time.perf_counter()
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
    return output, time.perf_counter() - start


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    states = Path(folder).glob("checkpoint-*/trainer_state.json")
    return max((str(state.parent) for state in states), key=lambda path: int(path.rpartition("-")[2]), default=None)


def format_command(program: str, argv: Sequence[str]) -> str:
    """A command line as it may be published."""
    return f"python -m trainers.{program} {shlex.join(map(hide_folders, argv))}"


def hide_folders(argument: str) -> str:
    """The last part of an absolute path: the whole may say more of its owner than of what lies there."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{equals}{Path(value).name if Path(value).is_absolute() else value}"
