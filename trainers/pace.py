"""How a run is getting on: images a second, waiting for data, memory, utilisation, the time that is left."""

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, ResNetConfig, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from model_cards.environment import peak_memory
from modeling_vit_custom import ViTCustomConfig
from modeling_vit_custom.kernels import dense
from modeling_vit_custom.modeling_vit_custom import PatchDropout


# In forward passes: a backward pass multiplies twice as much (https://arxiv.org/abs/2204.02311, appendix B).
STEP_COST = 3
MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}
MATRIX_SECONDS = 0.2
# What a line for a person shows of the Trainer's log, in this order. The files hold the rest as well.
TRAINING = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "images_per_second": "{:,.0f} images/s",
    "data_wait": "waiting for data {:.0%}",
    "memory_gb": "{:.1f} GB",
    "mfu": "MFU {:.0%}",
}
EVALUATION = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.2%}",
    "top5_accuracy": "top 5 {:.2%}",
    "balanced_accuracy": "balanced {:.2%}",
    "macro_f1": "macro F1 {:.2%}",
    "expected_calibration_error": "calibration error {:.2%}",
}


class Pace:
    """What a run does from one line of its log to the next. Evaluations and checkpoints do not count.

    Args:
        model: What is trained.
        device: Where.
        dtype: Of its products.
        num_processes: How many train it together.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype, num_processes: int):
        self.model, self.device, self.num_processes = model, device, num_processes
        # Where weights are frozen, a backward pass multiplies less than is known here.
        is_counted = is_countable(model) and all(parameter.requires_grad for parameter in model.parameters())
        self.matrix_rate = measure_matrix_rate(device, dtype) if is_counted else None
        self.flops_of_image: dict[tuple, int] = {}
        self.started = self.line_began = time.perf_counter()
        self.images, self.flops, self.waited, self.paused, self.first_step = 0, 0, 0.0, 0.0, None
        self.flops_of_last = 0  # what was counted last

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While data are fetched."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """While something else than training is done."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - began

    def count(self, pixels: torch.Tensor) -> None:
        """Call with what this process is about to train on, (B, C, H, W)."""
        self.images += len(pixels)
        if self.matrix_rate is not None:
            rates = [module.rate for module in self.model.modules() if isinstance(module, PatchDropout)]
            key = (len(pixels), *pixels.shape[2:], *rates)
            if key not in self.flops_of_image:
                with self.pausing():
                    self.flops_of_image[key] = count_flops(self.model, tuple(pixels.shape[2:]), len(pixels))
            self.flops_of_last = STEP_COST * len(pixels) * self.flops_of_image[key]
            self.flops += self.flops_of_last

    def report(self, step: int, max_steps: int) -> dict[str, float]:
        """Figures since the last report, for the log after a step."""
        now = time.perf_counter()
        seconds = max(now - self.line_began - self.paused, 1e-9)
        figures = {
            "images_per_second": self.num_processes * self.images / seconds,
            "data_wait": self.waited / seconds,  # share of the time
            "memory_gb": peak_memory(self.device) / 1e9,
        }
        if self.matrix_rate is not None:
            figures["mfu"] = self.flops / seconds / self.matrix_rate
        if self.first_step is not None and step > self.first_step:
            figures["eta_seconds"] = (max_steps - step) * (now - self.started) / (step - self.first_step)
        elif self.first_step is None:
            # The first steps also compile and fill caches: the time that is left is told without them.
            self.first_step, self.started = step, now
        self.line_began = now
        self.images, self.flops, self.waited, self.paused = 0, 0, 0.0, 0.0
        return figures


def is_countable(model: PreTrainedModel) -> bool:
    """Whether `count_flops` sees all of a model's work; the kernels of others cannot all be counted."""
    return getattr(model.config, "model_type", None) in (ViTCustomConfig.model_type, ResNetConfig.model_type)


def count_flops(model: PreTrainedModel, size: tuple[int, int], batch_size: int | None = None) -> float:
    """Additions and multiplications of one image's forward pass.

    Args:
        model: One that `is_countable`.
        size: (H, W) of the image.
        batch_size: Count what training with so many images computes of each: without what is dropped, and without what
            the head does not read.
    """
    rates = [module.rate for module in model.modules() if isinstance(module, PatchDropout)]
    # On a twin without memory: nothing is computed or drawn, and nobody who watches the model sees a forward pass.
    with torch.random.fork_rng([]), torch.device("meta"), torch.no_grad():
        twin = type(model)(copy.deepcopy(model.config)).train(batch_size is not None)
        for module, rate in zip((each for each in twin.modules() if isinstance(each, PatchDropout)), rates):
            module.rate = rate
        more = {}
        if model.config.model_type == ViTCustomConfig.model_type:
            twin.set_attn_implementation("eager")  # whose products are all seen
            # Weights are asked for where nothing is to be left out.
            more["output_attentions"] = batch_size is None
        with FlopCounterMode(display=False) as counter:
            twin(torch.zeros(batch_size or 1, model.config.num_channels, *size), **more)
    return counter.get_total_flops() / (batch_size or 1)


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Additions and multiplications a second in a product of large matrices: what this machine can do at most."""
    size, own = MATRIX_SIZES.get(device.type, 4096), torch.Generator(device)
    left, right = (torch.rand(size, size, device=device, dtype=dtype, generator=own) for _ in range(2))
    for _ in range(2):
        dense(left, right)
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < MATRIX_SECONDS:
        start = time.perf_counter()
        for _ in range(4):
            dense(left, right)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    if device.type == "cuda":
        del left, right
        torch.cuda.reset_peak_memory_stats(device)  # these matrices are none of the run's
    return best


class LogLines(TrainerCallback):
    """Lines that a person can read, of what the Trainer logs."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = describe_log(logs or {}, state.global_step, state.max_steps)
        if line and state.is_world_process_zero:
            self.write(line)

    def write(self, line: str) -> None:
        print(line, flush=True)


class LogLinesAboveBar(LogLines, ProgressCallback):
    """The same, above a bar."""

    def write(self, line: str) -> None:
        self.training_bar.write(line) if self.training_bar is not None else super().write(line)


def describe_log(logs: Mapping[str, float], step: int, max_steps: int) -> str:
    """One line; empty for what is said elsewhere."""
    place = f"step {step:,}/{max_steps:,}"
    if "loss" in logs:
        parts = [place, f"epoch {logs.get('epoch', 0):.2f}"]
        parts += [text.format(logs[name]) for name, text in TRAINING.items() if name in logs]
        if "eta_seconds" in logs:
            parts.append(f"{describe_seconds(logs['eta_seconds'])} left")
    elif "eval_loss" in logs:
        parts = [place, "evaluated"]
        parts += [text.format(logs[f"eval_{name}"]) for name, text in EVALUATION.items() if f"eval_{name}" in logs]
        if "eval_runtime" in logs:
            parts.append(f"took {describe_seconds(logs['eval_runtime'])}")
    else:
        return ""
    return " | ".join(parts)


def describe_seconds(seconds: float) -> str:
    """`45 s`, `12 min 5 s`, `3 h 20 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60} min"
