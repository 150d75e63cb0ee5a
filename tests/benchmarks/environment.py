"""Where a result comes from: machine, versions, date and command."""

import datetime
import os
import platform
import shlex

import timm
import torch
import transformers

from model_cards.environment import cpu_model


def describe_environment(script: str, argv: list[str], device: str) -> dict[str, str]:
    """What somebody needs to repeat a run, as it is printed above its table."""
    environment = {
        "command": shlex.join(["python", f"tests/benchmarks/{script}", *argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.2f} at the start",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}",
    }
    if device == "cuda":
        environment["GPU"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    environment["fp32 products"] = (
        f"{torch.get_float32_matmul_precision()} precision, TF32 in convolutions "
        f"{'allowed' if torch.backends.cudnn.allow_tf32 else 'off'} (CUDA only)"
    )
    return environment


def format_environment(environment: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in environment.items())
