"""The HF Trainer with what the recipes of vision transformers need.

On the training device, while training only: augmentation, mixing, the teacher and the loss. Besides: parameter groups
and optimizers, samplers, averaged weights, and phases at the end of a run.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from modeling_vit_custom.modeling_vit_custom import PatchDropout
from trainers.ema import Ema
from trainers.losses import Criterion, Targets
from trainers.mixing import Mixing
from trainers.optim import make_optimizer, parameter_groups


class TrainingDivergedError(Exception):
    """A loss or a weight is not finite; the last checkpoint is from before."""


class ViTTrainer(Trainer):
    """Trains an image classifier.

    Args:
        augmentation: 8-bit pixels (B, C, H, W) to normalised ones, on the device; none where workers did it.
        mixing: Normalised pixels and classes to mixed pixels and class probabilities.
        criterion: The loss.
        teacher: Pixels to logits (B, L), without gradients.
        sampler: The order of the training images; a random permutation by default.
    """

    def __init__(
        self,
        *args,
        mixing: Mixing,
        criterion: Criterion,
        augmentation: Callable[[Tensor], Tensor] | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
        sampler: Sampler | None = None,
        **kwargs,
    ):
        super().__init__(*args, compute_loss_func=criterion, **kwargs)
        self.augmentation, self.mixing, self.teacher, self.sampler = augmentation, mixing, teacher, sampler
        self.ema = Ema(self.model, self.args.ema_decay) if self.args.ema_decay else None
        self.add_callback(_Phases(self))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            groups = parameter_groups(model or self.model, args.learning_rate, args.weight_decay, args.layer_decay)
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = make_optimizer(args.optimizer, groups, betas, args.adam_epsilon, args.momentum)
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        return self.sampler or super()._get_train_sampler(train_dataset)

    def _prepare_inputs(self, inputs: dict) -> dict:
        # Before the autocast of the loss: coordinates and colours need their precision.
        inputs = super()._prepare_inputs(inputs)
        if not self.model.training:
            return inputs
        pixels = inputs["pixel_values"]
        if self.augmentation is not None:
            pixels = self.augmentation(pixels)
        pixels, probabilities = self.mixing(pixels, inputs["labels"])
        teacher_logits = None if self.teacher is None else self.teacher(pixels)
        return {"pixel_values": pixels, "labels": Targets(probabilities, teacher_logits)}

    def averaged_weights(self) -> AbstractContextManager:
        """The averaged weights in the model's place, if there are any."""
        return nullcontext() if self.ema is None else self.ema.in_place(self.model)

    def evaluation_loop(self, *args, **kwargs):
        with self.averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # A checkpoint keeps the weights to go on from, with the averages beside them.
        with nullcontext() if _internal_call else self.averaged_weights():
            super().save_model(output_dir, _internal_call)

    def train(self, *args, **kwargs):
        """Raises TrainingDivergedError if a loss or the weights are not finite."""
        output = super().train(*args, **kwargs)
        self.check_weights()
        return output

    def check_weights(self) -> None:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise TrainingDivergedError(f"weights are not finite at step {self.state.global_step}")

    def _save_checkpoint(self, model, trial) -> None:
        self.check_weights()
        super()._save_checkpoint(model, trial)
        if self.ema is not None and self.args.should_save:
            self.ema.save(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            self.ema.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            self.ema.load(self.state.best_model_checkpoint)


class _Phases(TrainerCallback):
    """What changes while a run goes on: averages after each step, the last epochs, the end of a diverged one."""

    def __init__(self, trainer: ViTTrainer):
        self.trainer = trainer
        self.patch_dropouts = [module for module in trainer.model.modules() if isinstance(module, PatchDropout)]
        self.patch_dropout_rates = [module.rate for module in self.patch_dropouts]

    def on_step_begin(self, args, state, control, **kwargs):
        epochs_left = state.num_train_epochs * (1 - state.global_step / state.max_steps)
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
