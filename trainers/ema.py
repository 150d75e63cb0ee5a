"""An exponential moving average of the weights: evaluated and published in their place, saved and restored."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel


FILE = "ema.safetensors"


class Ema:
    """Averages of a model's trainable parameters, and of what its batch norms know of their inputs.

    The decay is warmed up, min(decay, (1 + steps) / (10 + steps)), so that short runs forget their random weights.
    """

    def __init__(self, model: PreTrainedModel, decay: float):
        self.decay, self.steps = decay, 0
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        # Averaged weights have other activations than those that the last ones ran over.
        self.statistics: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                for kind in ("running_mean", "running_var"):
                    self.statistics.append(f"{name}.{kind}")
                    self.averages[f"{name}.{kind}"] = getattr(module, kind).clone()

    def distribute(self, model: PreTrainedModel) -> None:
        """Divide the averages among the processes as the parameters are, once these are."""
        for name, tensor in zip(self.averages, self.tensors(model)):
            self.averages[name] = divide_like(self.averages[name], tensor.detach())

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        """Call after every optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        pairs = list(zip(self.averages.values(), self.tensors(model)))
        # What is divided among the processes, and running statistics, which are not, go through no one call.
        for is_divided in (False, True):
            alike = [pair for pair in pairs if isinstance(pair[1], DTensor) is is_divided]
            if alike:
                torch._foreach_lerp_(*map(list, zip(*alike)), 1 - decay)

    @contextmanager
    def in_place(self, model: PreTrainedModel) -> Iterator[None]:
        """The averages in place of what they are of. Call in all processes."""
        self.agree()
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    def agree(self) -> None:
        """Running statistics of all processes: each has averaged those of its own images. Call in all of them."""
        if not distributed.is_available() or not distributed.is_initialized():
            return
        for name in self.statistics:
            distributed.all_reduce(self.averages[name])
            self.averages[name] /= distributed.get_world_size()

    @torch.no_grad()
    def swap(self, model: PreTrainedModel) -> None:
        for tensor, average in zip(self.tensors(model), self.averages.values()):
            kept = tensor.detach().clone()
            tensor.copy_(average)
            average.copy_(kept)

    def tensors(self, model: PreTrainedModel) -> list[Tensor]:
        """Of the model, what there are averages of, in their order."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass alone, some would be whole
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return [named[name] for name in self.averages]

    def save(self, folder: str | Path, writes: bool = True) -> None:
        """Call in all processes; those that do not write give their part."""
        self.agree()
        averages = {}
        for name, average in self.averages.items():
            whole = join(average)  # one at a time: all of them may not fit into one device
            if writes:
                averages[name] = whole.cpu().contiguous()
        if writes:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(averages, Path(folder) / FILE, metadata={"steps": str(self.steps)})

    def load(self, folder: str | Path) -> None:
        """Raises OSError if there is no average in the folder."""
        with safe_open(Path(folder) / FILE, framework="pt") as file:
            for name, average in self.averages.items():
                average.copy_(divide_like(file.get_tensor(name).to(average.device), average))
            self.steps = int(file.metadata()["steps"])


def divide_like(tensor: Tensor, model: Tensor) -> Tensor:
    """The same values where `model` is: on its device, or divided among the processes."""
    if isinstance(tensor, DTensor):
        return tensor
    if not isinstance(model, DTensor):
        return tensor.to(model.device)
    return distribute_tensor(tensor, model.device_mesh, model.placements)


def join(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be divided among the processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
