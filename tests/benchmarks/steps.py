"""Steps of several models in turn: what each takes of time and of memory, and how that is written."""

import ctypes
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


# What is timed, and returns a tensor: a loss or logits.
Step = Callable[[], Tensor]

# Rounds that are made even where the time for them is over.
MIN_ROUNDS = 3


def rotated(items: list, count: int) -> list:
    """The items from another one on: in rounds of which each begins so, none always follows the same one."""
    first = count % max(len(items), 1)
    return items[first:] + items[:first]


def time_step(step: Callable, device: str) -> float:
    """Seconds that a step takes, on a GPU by its own clock and until it has ended."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def make_training_step(parameters: Iterable[nn.Parameter], compute_loss: Step) -> Step:
    """Forward, backward and a step of fused AdamW, for every model in the same way; returns the loss."""
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-5, fused=True)

    def step() -> Tensor:
        loss = compute_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def measure_rise(step: Callable, device: str) -> int | None:
    """Bytes by which the peak of memory in a step exceeds what there was before it.

    None where the system does not tell: main memory is asked of Linux, where gaps between tensors count.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    try:
        # What was freed but is still resident would be used again, unseen.
        ctypes.CDLL(None).malloc_trim(0)
        # From now on the peak is that of what is resident now (https://docs.kernel.org/filesystems/proc.html).
        Path("/proc/self/clear_refs").write_text("5")
        before = read_peak()
    except (AttributeError, OSError):
        return None
    step()
    return read_peak() - before


def read_peak() -> int:
    """Bytes of main memory that were resident at most, since this was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def describe_error(error: Exception) -> str:
    """The kind of error and its message in one line, up to an empty one, which a compiler's command follows."""
    message, *_ = str(error).split("\n\n")
    return f"{type(error).__name__}: {' '.join(message.split())}"


def format_quartiles(values: Sequence[float], write: Callable[[float], str] | None = None) -> str:
    """`median [first quartile, third quartile]`, each written by `write`, by default with three digits that matter."""
    if not values:
        return "-"
    low, median, high = map(write or format_number, np.percentile(values, [25, 50, 75]))
    return f"{median} [{low}, {high}]"


def format_number(value: float) -> str:
    """Three digits that matter, or all before the point: 0.0123, 1.23, 12.3, 1,234."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}"
