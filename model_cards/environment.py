"""Where a run took place: the machine and the versions of the libraries."""

import platform
from importlib import metadata
from pathlib import Path

import torch


LIBRARIES = {"PyTorch": "torch", "transformers": "transformers", "datasets": "datasets", "accelerate": "accelerate"}


def describe_hardware(device: torch.device, num_processes: int = 1) -> str:
    """The accelerators, one for each process, or the processor and the threads that PyTorch uses of it."""
    if device.type == "cuda":
        return f"{num_processes} x {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return f"{num_processes} x {device.type} of {cpu_model()}"
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''} of {cpu_model()}"


def cpu_model() -> str:
    """The processor's name as Linux gives it, or the best that Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Python's version and those of the libraries that a result depends on."""
    return {
        "Python": platform.python_version(),
        **{title: metadata.version(package) for title, package in LIBRARIES.items()},
    }
