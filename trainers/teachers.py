"""Teachers for distillation: any image classifier, at its own resolution and normalisation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from trainers.arguments import LossArguments
from trainers.inference import match_classes
from trainers.models import check_is_model, read_processor


class Teacher:
    """The student's normalised pixels (B, C, H, W) -> logits (B, L) in the student's order of classes.

    It is no part of the student, so it is neither trained nor saved with it.

    Raises:
        ValueError: if there is no such teacher, or its classes are not the student's.
    """

    def __init__(
        self,
        arguments: LossArguments,
        labels: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        bf16: bool = False,
    ):
        self.bf16 = bf16
        check_is_model(arguments.teacher, "teacher")
        origin = {"trust_remote_code": arguments.trust_teacher_code}
        processor = AutoImageProcessor.from_pretrained(arguments.teacher, **origin)
        self.model = AutoModelForImageClassification.from_pretrained(arguments.teacher, dtype=torch.float32, **origin)
        self.model = self.model.requires_grad_(False).eval().to(device)
        names = [str(self.model.config.id2label[index]) for index in range(self.model.config.num_labels)]
        teacher, by_index = f"teacher {arguments.teacher!r}", arguments.teacher_labels_by_index
        order = match_classes(names, labels, by_index, teacher, "--teacher_labels_by_index true")
        if len(names) > len(labels):
            raise ValueError(f"{teacher} has {len(names):,} classes, not the data set's {len(labels):,}")
        self.order = torch.tensor(order, device=device)
        self.size, own_mean, own_std = read_processor(processor)
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std, own_mean, own_std)
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        pixels = pixels * self.scale + self.shift
        if tuple(pixels.shape[2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(pixel_values=pixels).logits.float()[:, self.order]
