"""The HF Trainer with what the recipes of vision transformers need.

On the training device, while training only: augmentation, mixing, the teacher and the loss. Besides: parameter groups
and optimizers, samplers, averaged weights, and what changes in the course of a run.
"""

import copy
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo, HfApi
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    get_scheduler,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, has_length

from model_cards.facts import TrainingRun
from model_cards.rendering import write_card
from modeling_vit_custom.modeling_vit_custom import PatchDropout
from trainers import hub
from trainers.arguments import TrainingArguments
from trainers.data import StreamedImages, as_it_comes, kill_workers_at_exit, outlive_termination
from trainers.draws import Draws
from trainers.ema import Ema
from trainers.losses import Criterion, Targets
from trainers.mixing import Mixing
from trainers.optim import make_optimizer, parameter_groups
from trainers.pace import LogLines, LogLinesAboveBar, Pace
from trainers.sampling import EpochBatches, RandomOrder
from trainers.streams import StreamBatches


PROVISIONAL = "provisional"  # of the output folder: what was pushed last while training goes on


class TrainingDivergedError(Exception):
    """A loss or a weight is not finite; the last checkpoint is from before."""


class CheckpointNotWrittenError(Exception):
    """A checkpoint could not be written, e.g. because the disk is full; nothing of it is left, older ones are."""


class CheckpointNotReadError(Exception):
    """A checkpoint is not of this model or this optimizer."""

    def __init__(self, checkpoint: str, another: str):
        super().__init__(f"{checkpoint} is of another {' '.join(another.split())}: resume with the arguments it had")


class Contents(TrainerCallback, ExportableState):
    """In the Trainer's state: what a run that goes on from its checkpoint must know.

    Attributes:
        images_per_step: Of all processes and accumulated batches.
        files: Sizes in bytes by the names in the checkpoint that is being written, without which it is none.
        owes_evaluation: Whether one was due at its step and had to be left out.
        losses: Their sum up to the last line of the log, and since; and the step of that line.
    """

    def __init__(self, images_per_step: int):
        self.images_per_step, self.files, self.owes_evaluation = images_per_step, {}, False
        self.losses = [0.0, 0.0, 0]

    @classmethod
    def read(cls, state: TrainerState) -> dict:
        """The attributes; empty of a checkpoint that does not say."""
        return state.stateful_callbacks.get(cls.__name__, {}).get("attributes", {})

    def list_files(self, folder: Path) -> None:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != TRAINER_STATE_NAME)
        self.files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}

    def resume(self, state: TrainerState) -> None:
        """Take over what another run has to hand on."""
        known = self.read(state)
        self.owes_evaluation = known.get("owes_evaluation", False)
        self.losses = known.get("losses", [0.0, 0.0, state.global_step])

    def state(self) -> dict:
        return {"args": {}, "attributes": vars(self).copy()}

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks[type(self).__name__] = self.state()
        if self.owes_evaluation:
            args.eval_on_start = True


class ViTTrainer(Trainer):
    """Trains an image classifier, or an encoder by a loss of its own.

    Args:
        train_dataset: See `trainers.data.training_images`.
        augmentation: 8-bit pixels (B, C, H, W) to normalised ones, on the device; none where workers did it.
        mixing: Normalised pixels and classes to mixed pixels and class probabilities; none where labels mean nothing.
        criterion: The loss of a classifier; without one the model's own.
        teacher: Pixels to logits (B, L), without gradients.
        order: Of the training images, if they are no stream; a random permutation by default.
        describe: What is known of the run so far, for the card of what is pushed to the Hub while it goes on.

    Raises:
        ValueError: if the arguments ask for what this model cannot do.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        mixing: Mixing | None = None,
        criterion: Criterion | None = None,
        augmentation: Callable[[Tensor, Draws], Tensor] | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
        order: RandomOrder | None = None,
        describe: Callable[[], TrainingRun] | None = None,
        **kwargs,
    ):
        check_optimization(model, args)
        check_initial_image_size(args.initial_image_size, model.config)
        if args.push_to_hub and describe is None:
            raise ValueError("push_to_hub=True needs describe, for the card of what is pushed")
        self.describe, self.push = describe, None
        super().__init__(model, args, compute_loss_func=criterion, **kwargs)
        self.augmentation, self.mixing, self.teacher = augmentation, mixing, teacher
        self.batches = None if self.train_dataset is None else self.make_batches(order)
        self.ema = Ema(self.model, self.args.ema_decay) if self.args.ema_decay else None
        self.image_size: tuple[int, int] | None = None  # to train at, if not the one that images come in
        self.pace: Pace | None = None  # of training, while it goes on
        kill_workers_at_exit()
        self.contents = Contents(args.images_per_step)
        self.add_callback(self.contents)
        self.add_callback(_Phases(self))
        for theirs in (PrinterCallback, ProgressCallback):
            self.remove_callback(theirs)
        self.add_callback(LogLines if args.disable_tqdm else LogLinesAboveBar)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = create_optimizer(model or self.model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        self.args.lr_scheduler_kwargs = schedule_options(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def make_batches(self, order: RandomOrder | None) -> EpochBatches | StreamBatches:
        """Which images this process sees when."""
        args, images = self.args, self.train_dataset
        shared = (args.per_device_train_batch_size, args.process_index, args.world_size)
        if isinstance(images, StreamedImages):
            return StreamBatches(images.stream, *shared)
        return EpochBatches(order or RandomOrder(len(images), args.seed), *shared)

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=as_it_comes,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context if args.dataloader_num_workers else None,
            worker_init_fn=outlive_termination,
        )
        # The batches are this process's already: nothing is left to divide.
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
        )

    def _prepare_inputs(self, inputs: dict) -> dict:
        # Before the autocast of the loss: coordinates and colours need their precision.
        numbers = inputs.pop("numbers", None)  # of training images alone
        inputs = super()._prepare_inputs(inputs)
        if self.mixing is None:
            inputs = {"pixel_values": inputs["pixel_values"]}
        if not self.model.training:
            return inputs
        pixels = inputs["pixel_values"]
        if self.augmentation is not None:
            pixels = self.augmentation(pixels, Draws.of(self.args.seed, numbers, "augmentation"))
        if self.image_size is not None:
            pixels = F.interpolate(pixels, self.image_size, mode="bilinear", antialias=True)
        self.pace.count(pixels)
        if self.mixing is None:
            return {"pixel_values": pixels}
        draws = Draws.of(self.args.seed, numbers, "mixing")
        pixels, probabilities = self.mixing(pixels, inputs["labels"], draws)
        teacher_logits = None if self.teacher is None else self.teacher(pixels)
        return {"pixel_values": pixels, "labels": Targets(probabilities, teacher_logits)}

    def floating_point_ops(self, inputs: dict) -> float:
        """Of the step that was just made, forward and backward; 0 where they cannot be counted.

        transformers guesses them from the number of parameters and of pixel values.
        """
        return self.pace.flops_of_last

    def _run_epoch(self, **kwargs) -> None:
        # Where a run goes on from the checkpoint of its last step, the Trainer would take another step.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        # As the Trainer does; counting the images waits for other processes, not for data.
        with self.pace.waiting():
            batches = list(islice(epoch_iterator, num_batches))
        return batches, self._get_num_items_in_batch(batches, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.pace is not None and "loss" in logs:
            logs |= self.pace.report(self.state.global_step, self.state.max_steps)
        if "train_loss" in logs:  # of all steps; the Trainer divides by those since it went on
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def averaged_weights(self) -> AbstractContextManager:
        """The averaged weights in the model's place, if there are any."""
        return nullcontext() if self.ema is None else self.ema.in_place(self.model)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler: bool = False) -> dict[str, float]:
        is_owed, self.contents.owes_evaluation = self.contents.owes_evaluation, False
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not is_owed)
        if is_owed:
            self._determine_best_metric(metrics, trial)
        return metrics

    def evaluation_loop(self, dataloader: DataLoader, *args, metric_key_prefix: str = "eval", **kwargs):
        # Whatever is drawn at random, such as masks, is the same at each evaluation, and training goes on as without.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        pausing = self.pace.pausing() if self.is_in_train else nullcontext()
        with pausing, self.averaged_weights(), torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed)
            self.losses = None if has_length(dataloader) else []
            dataloader.base_dataloader.worker_init_fn = outlive_termination
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Of a stream, the Trainer takes the last batch for a full one.
        if self.losses:
            output.metrics[f"{metric_key_prefix}_loss"] = torch.cat(self.losses).mean().item()
        return output

    def prediction_step(self, model, inputs, *args, **kwargs):
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and self.losses is not None:
            self.losses.append(self.accelerator.gather_for_metrics(loss.repeat(len(inputs["pixel_values"]))))
        return loss, logits, labels

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # A checkpoint keeps the weights to go on from, with the averages beside them.
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        trained = self.model
        with self.averaged_weights():
            self.model = self.published_model()
            try:
                super().save_model(output_dir, _internal_call=True)  # or it would be pushed before its card is there
            finally:
                self.model = trained

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository on the Hub, before anything is trained."""
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
            hub.check_repo_id(name)
            destination = hub.Destination(name, self.args.hub_private_repo, self.args.hub_revision or "main")
            self.destination = replace(destination, repo_id=hub.create_repo(destination))
            self.hub_model_id = self.destination.repo_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Starts sending what opens by itself, with its code and a card; checkpoints stay here."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        folder = Path(self.args.output_dir) / PROVISIONAL
        # All processes save or none does.
        [is_busy] = broadcast_object_list([self.push is not None and not self.push.done()])
        if is_busy:
            return
        try:
            self.save_model(str(folder))
            if self.is_world_process_zero():
                self._finish_current_push()
                write_card(folder, self.describe(), {})
                self.callback_handler.on_push_begin(self.args, self.state, self.control)
                message = f"Training in progress, step {self.state.global_step}"
                self.push = HfApi().run_as_future(_push, folder, self.destination, message)
        except (OSError, RuntimeError, SafetensorError) as error:
            print(f"Not on the Hub yet: {error}.")  # the checkpoint is here, and training goes on

    def _finish_current_push(self) -> None:
        """Waits for what is on its way; what the Hub refuses is said, and sent with the next checkpoint."""
        push, self.push = self.push, None
        if push is not None and push.exception() is not None:
            print(f"Not on the Hub yet: {push.exception()}.")

    def push_to_hub(self, commit_message: str = "End of training", **kwargs) -> CommitInfo:
        """Sends the output folder, which is finished.

        Raises:
            ValueError: if it is not.
            RefusedError: if the Hub does not take it.
        """
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        commit = _push(Path(self.args.output_dir), self.destination, commit_message)
        if self.args.hub_strategy != HubStrategy.END:
            shutil.rmtree(Path(self.args.output_dir) / PROVISIONAL, ignore_errors=True)
        return commit

    def published_model(self) -> PreTrainedModel:
        """The model with low-rank changes merged, in a copy, or as it is if there are none."""
        if isinstance(self.model, PreTrainedModel):
            return self.model
        return copy.deepcopy(self.model).merge_and_unload()

    def train(self, *args, **kwargs):
        """Train.

        Raises:
            TrainingDivergedError: if a loss or the weights are not finite.
            CheckpointNotWrittenError: if a checkpoint could not be written.
            CheckpointNotReadError: if the one to resume from is of another model or optimizer.
        """
        # The Trainer would take every folder checkpoint-* for one of its own, and delete what is the oldest.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.max_checkpoints = max(0, limit or 0)  # 0: all of them stay
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        self.check_weights()
        return output

    def check_weights(self) -> None:
        # Of weights that are divided among the processes, each looks at its own.
        own = (each.to_local() if isinstance(each, DTensor) else each for each in self.model.parameters())
        is_finite = torch.tensor([all(each.isfinite().all() for each in own)], device=self.args.device)
        if not self.accelerator.gather(is_finite).all():
            raise TrainingDivergedError(f"weights are not finite at step {self.state.global_step}")

    def _save_checkpoint(self, model, trial) -> None:
        self.check_weights()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self.contents.files = {}
        try:
            with self.pace.pausing():
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # until it is written, nothing there counts
                if self.ema is not None:
                    self.ema.save(folder, self.args.should_save)
                super()._save_checkpoint(model, trial)
                if self.args.should_save and self.max_checkpoints:
                    best = self.state.best_model_checkpoint
                    self._delete_checkpoints(folder.parent, [folder, *([Path(best)] if best else [])])
        except (OSError, RuntimeError, SafetensorError) as error:
            # PyTorch says in this way that it could not write; all other such errors are something else.
            if isinstance(error, RuntimeError) and not re.search("inline_container|PytorchStreamWriter", str(error)):
                raise
            if self.args.should_save and not (folder / TRAINER_STATE_NAME).exists():
                shutil.rmtree(folder, ignore_errors=True)
            free, reason = shutil.disk_usage(self.args.output_dir).free, " ".join(str(error).split())
            raise CheckpointNotWrittenError(
                f"{folder} could not be written, with {free / 1e9:.1f} GB left on the disk ({reason})"
            ) from error

    def _delete_checkpoints(self, run_folder: Path, spared: Sequence[Path]) -> None:
        """The oldest ones of this run, as many as are too many, but none of those to spare, wherever these are."""
        checkpoints, spared = list_checkpoints(run_folder), {path.resolve() for path in spared}
        others = [checkpoints[step] for step in sorted(checkpoints) if checkpoints[step].resolve() not in spared]
        num_spared = len(checkpoints) - len(others)
        for checkpoint in others[: max(0, len(others) - max(0, self.max_checkpoints - num_spared))]:
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.batches, StreamBatches):
            self.batches.save(output_dir, self._count_batches(self.state))
        since = self.accelerator.gather(self._tr_loss).mean().item()
        self.contents.losses = [self._total_loss_scalar, since, self._globalstep_last_logged]
        # The Trainer's state, which says that a checkpoint is complete, comes after the files of all processes.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.contents.list_files(Path(output_dir))

    def _count_batches(self, state: TrainerState) -> int:
        """Of each process, until now."""
        return state.global_step * self.args.gradient_accumulation_steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        state = read_state(Path(resume_from_checkpoint))
        self.contents.resume(state)
        if isinstance(self.batches, StreamBatches):
            self.batches.load(resume_from_checkpoint, self._count_batches(state))
        self._load_weights(
            resume_from_checkpoint, lambda: super(ViTTrainer, self)._load_from_checkpoint(resume_from_checkpoint, model)
        )

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        self._load_weights(str(best), super()._load_best_model)
        if self.args.should_save and self.max_checkpoints == 1:
            # The best one may be of the run that this one went on from, in its folder.
            self._delete_checkpoints(Path(self.args.output_dir), [best])

    def _load_weights(self, checkpoint: str, load: Callable[[], None]) -> None:
        """By the model's own way, since the files may have older names than the weights; else as the Trainer does."""
        try:
            if isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                saved = type(self.model).from_pretrained(checkpoint, dtype=torch.float32)
                self.model.load_state_dict(saved.state_dict())
            else:
                load()
            if self.ema is not None:
                self.ema.load(checkpoint)
        except (RuntimeError, SafetensorError, ValueError) as error:
            raise CheckpointNotReadError(checkpoint, f"model ({error})") from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What was asked for now holds: a checkpoint brings its moments and its place in the schedule."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        asked = [{key: value for key, value in each.items() if key != "params"} for each in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointNotReadError(checkpoint, f"optimizer ({error})") from error
        for group, fields in zip(self.optimizer.param_groups, asked):
            missing = sorted(fields.keys() - group.keys())
            if missing:
                raise CheckpointNotReadError(checkpoint, f"optimizer (it has no {missing[0]!r})")
            group["weight_decay"] = fields["weight_decay"]
            if group["initial_lr"] != fields["initial_lr"]:
                group["lr"] *= fields["initial_lr"] / group["initial_lr"]
                group["initial_lr"] = fields["initial_lr"]
        self.lr_scheduler.base_lrs = [fields["initial_lr"] for fields in asked]

    def _get_learning_rate(self) -> float:
        # The Trainer's is that of the first group, which layer-wise decay makes the smallest.
        return float(max(group["lr"] for group in self.optimizer.param_groups))


def read_state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """Folders of checkpoints by their step, whole or not."""
    names = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in names if match and path.is_dir()}


def _push(folder: Path, destination: hub.Destination, message: str) -> CommitInfo:
    hub.check_publishable(folder)
    return hub.upload(folder, destination, message)


class _Phases(TrainerCallback):
    """What changes while a run goes on: image size, averages, the last epochs, the end of a diverged one."""

    def __init__(self, trainer: ViTTrainer):
        self.trainer = trainer
        self.steps_per_epoch = 1
        self.patch_dropouts = [module for module in trainer.model.modules() if isinstance(module, PatchDropout)]
        self.patch_dropout_rates = [module.rate for module in self.patch_dropouts]

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.trainer.pace = Pace(self.trainer.model, args.device, dtype, args.world_size)
        # A stream does not know its length, and nothing is asked of it that would need one.
        if isinstance(self.trainer.train_dataset, Sized):
            self.steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        # The Trainer counts from where it goes on.
        total, since, self.trainer._globalstep_last_logged = self.trainer.contents.losses
        self.trainer._total_loss_scalar, self.trainer._tr_loss = total, self.trainer._tr_loss + since
        if self.trainer.ema is not None:
            self.trainer.ema.distribute(self.trainer.model)
        # What the model drops is drawn by each process for itself.
        if args.process_index:
            set_seed(args.seed + args.process_index)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # In the middle of an epoch a resumed run does not say which one it is.
        if isinstance(self.trainer.batches, EpochBatches):
            self.trainer.batches.set_epoch(state.global_step // self.steps_per_epoch)

    def on_step_begin(self, args, state, control, **kwargs):
        epochs_left = (state.max_steps - state.global_step) / self.steps_per_epoch
        if args.initial_image_size is not None:
            growing = state.max_steps / self.steps_per_epoch - args.full_size_epochs
            share = 1 - (epochs_left - args.full_size_epochs) / growing if growing > 0 else 1.0
            self.trainer.image_size = grown_size(args.initial_image_size, self.trainer.model.config, share)
        if self.trainer.mixing is not None:
            self.trainer.mixing.is_on = epochs_left > args.unmixed_epochs
        for module, rate in zip(self.patch_dropouts, self.patch_dropout_rates):
            module.rate = rate if epochs_left > args.unmasked_epochs else 0.0

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss", 0.0)
        if not torch.tensor(float(loss)).isfinite():
            raise TrainingDivergedError(f"the loss is {loss} at step {state.global_step}")


def create_optimizer(model: torch.nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """Raises ValueError if there is nothing to optimize, or not in that way."""
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, args.layer_decay)
    betas = (args.adam_beta1, args.adam_beta2)
    return make_optimizer(args.optimizer, groups, betas, args.adam_epsilon, args.momentum)


def schedule_options(args: TrainingArguments, num_training_steps: int) -> dict:
    """What a schedule asks for besides warm-up and length."""
    options = dict(args.lr_scheduler_kwargs or {})
    if args.lr_scheduler_type == "warmup_stable_decay":
        steps = args.decay_steps if args.decay_steps >= 1 else args.decay_steps * num_training_steps
        options["num_decay_steps"] = int(steps)
    return options


def check_optimization(model: torch.nn.Module, args: TrainingArguments) -> None:
    """Raises ValueError, before anything is written, if there is no such optimizer or schedule."""
    steps = 100
    options = schedule_options(args, steps)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            create_optimizer(model, args),
            args.get_warmup_steps(steps),
            steps,
            scheduler_specific_kwargs=options,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"lr_scheduler_type={args.lr_scheduler_type.value!r} with lr_scheduler_kwargs={options} makes no schedule: "
            f"{error}"
        ) from error


def check_initial_image_size(initial_size: int | None, config: PreTrainedConfig) -> None:
    """Raises ValueError if a run cannot start with smaller images."""
    if initial_size is None:
        return
    if not hasattr(config, "native_size"):
        raise ValueError(f"initial_image_size={initial_size} needs a vit_custom model, not {config.model_type}")
    if not 0 < initial_size <= min(config.native_size):
        raise ValueError(
            f"initial_image_size={initial_size} must lie between 1 and {min(config.native_size)}, the last"
        )


def grown_size(initial_size: int, config: PreTrainedConfig, share: float) -> tuple[int, int] | None:
    """Size (H, W) of the training images after a share of the growing phase; none where it is the native one.

    The shorter side grows evenly from the initial to the native size, in whole patches of the last stage.
    """
    native = config.native_size
    if share >= 1:
        return None
    multiple = math.prod(stage.patch_size for stage in config.stages)
    shorter = initial_size + share * (min(native) - initial_size)
    size = tuple(max(1, int(side * shorter / min(native) / multiple)) * multiple for side in native)
    return None if min(size) >= min(native) else size
