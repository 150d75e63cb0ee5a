"""An exponential moving average of the weights: evaluated and published in their place, saved and restored."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel


FILE = "ema.safetensors"


class Ema:
    """Averages of a model's trainable parameters.

    The decay is warmed up, min(decay, (1 + steps) / (10 + steps)), so that short runs forget their random weights.
    """

    def __init__(self, model: PreTrainedModel, decay: float):
        self.decay, self.steps = decay, 0
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        """Call after every optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.averages.values()), self.parameters(model), 1 - decay)

    @contextmanager
    def in_place(self, model: PreTrainedModel) -> Iterator[None]:
        """The averages in place of the model's parameters."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    @torch.no_grad()
    def swap(self, model: PreTrainedModel) -> None:
        for parameter, average in zip(self.parameters(model), self.averages.values()):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def parameters(self, model: PreTrainedModel) -> list[Tensor]:
        named = dict(model.named_parameters())
        return [named[name] for name in self.averages]

    def save(self, folder: str | Path) -> None:
        averages = {name: average.contiguous() for name, average in self.averages.items()}
        save_file(averages, Path(folder) / FILE, metadata={"steps": str(self.steps)})

    def load(self, folder: str | Path) -> None:
        """Raises OSError if there is no average in the folder."""
        with safe_open(Path(folder) / FILE, framework="pt") as file:
            for name, average in self.averages.items():
                average.copy_(file.get_tensor(name))
            self.steps = int(file.metadata()["steps"])
