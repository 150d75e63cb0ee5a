"""Losses of a classifier in training, per image, from logits and class probabilities."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput


LOSSES = ("cross_entropy", "binary_cross_entropy")
DISTILLATIONS = ("hard", "soft")


@dataclass
class Targets:
    """What a batch is trained towards.

    Attributes:
        probabilities: (B, L), one row an image: its class, smoothed or mixed.
        teacher_logits: (B, L) of the teacher on the same pixels, if there is one.
    """

    probabilities: Tensor
    teacher_logits: Tensor | None = None


@dataclass
class Criterion:
    """The loss of a training batch; of an evaluation batch, whose labels are classes, plain cross-entropy.

    Attributes:
        loss: `"cross_entropy"`, or `"binary_cross_entropy"` over the classes (https://arxiv.org/abs/2204.07118).
        class_weights: (L,) with mean 1, or none.
        logit_adjustment: (L,) to add to the logits in training (https://arxiv.org/abs/2007.07314), or none.
        distillation: `"hard"` or `"soft"`, where there is a teacher (https://arxiv.org/abs/2012.12877, section 4).
        distillation_weight: Share of the teacher's loss.
        temperature: Of soft distillation.

    Raises:
        ValueError: if there is no such loss or distillation, or a number is out of range.
    """

    loss: str = "cross_entropy"
    class_weights: Tensor | None = None
    logit_adjustment: Tensor | None = None
    distillation: str = "hard"
    distillation_weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} must be one of {', '.join(LOSSES)}")
        if self.distillation not in DISTILLATIONS:
            raise ValueError(f"distillation={self.distillation!r} must be one of {', '.join(DISTILLATIONS)}")
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight={self.distillation_weight} must lie between 0 and 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"distillation_temperature={self.temperature} must be above 0")

    def __call__(
        self, outputs: ModelOutput, labels: Targets | Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Mean over the images, or their sum over `num_items_in_batch` where gradients are accumulated."""
        if isinstance(labels, Targets):
            losses = self.train_losses(outputs, labels)
        else:
            losses = F.cross_entropy(outputs.logits.float(), labels, reduction="none")
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)

    def train_losses(self, outputs: ModelOutput, targets: Targets) -> Tensor:
        """(B,): of the class head with the labels, and of the distillation head, if any, with the teacher."""
        class_logits, teacher_logits = outputs.get("cls_logits"), targets.teacher_logits
        if class_logits is None or teacher_logits is None:
            class_logits = outputs.logits
        losses = self.class_losses(class_logits.float(), targets.probabilities)
        if teacher_logits is None:
            return losses
        student_logits = outputs.get("distillation_logits")
        student_logits = (outputs.logits if student_logits is None else student_logits).float()
        if self.distillation == "hard":
            distilled = F.cross_entropy(student_logits, teacher_logits.argmax(dim=-1), reduction="none")
        else:
            distilled = soft_distillation(student_logits, teacher_logits.float(), self.temperature)
        return (1 - self.distillation_weight) * losses + self.distillation_weight * distilled

    def class_losses(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """(B, L), (B, L) -> (B,)."""
        if self.logit_adjustment is not None:
            logits = logits + self.logit_adjustment.to(logits.device)
        if self.loss == "binary_cross_entropy":
            # Every class that is in the image at all is wanted whole.
            wanted = (probabilities > 0).float()
            return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=-1)
        if self.class_weights is not None:
            probabilities = probabilities * self.class_weights.to(probabilities.device)
        return -(probabilities * logits.log_softmax(dim=-1)).sum(dim=-1)


def soft_distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence at a temperature, times its square: (B, L), (B, L) -> (B,).

    https://arxiv.org/abs/2012.12877, equation 2.
    """
    student = (student_logits / temperature).log_softmax(dim=-1)
    teacher = (teacher_logits / temperature).log_softmax(dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """Weights of the classes by their effective number of images, with mean 1: (L,) -> (L,).

    https://arxiv.org/abs/1901.05555, equation 4.

    Raises:
        ValueError: if beta is out of range.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"class_weight_beta={beta} must lie in [0, 1)")
    weights = (1 - beta) / (1 - torch.pow(beta, counts.double()))
    return (weights / weights.mean()).float()


def logit_adjustment(counts: Tensor, strength: float) -> Tensor:
    """What to add to the logits in training, so that rare classes need not be guessed less: (L,) -> (L,).

    https://arxiv.org/abs/2007.07314, equation 10.
    """
    return strength * (counts / counts.sum()).log()
