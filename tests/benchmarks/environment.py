"""Where a result comes from: machine, versions, date and command."""

import datetime
import os
import platform
import shlex

import timm
import torch
import transformers

from model_cards.environment import code_commit, cpu_model
from trainers.run_facts import hide_folders


Environment = dict[str, str | float]

# Of these, several measurements tell the first and the last value, or the least and the greatest.
RANGES = ("date", "load average at the start")
# Where these differ, figures cannot stand in one table.
COMMON = ("CPU", "GPU", "versions", "fp32 products", "code")


def describe_environment(script: str, argv: list[str], device: str) -> Environment:
    """What somebody needs to repeat a run, as it is printed above its table."""
    environment: Environment = {
        "command": shlex.join(["python", f"tests/benchmarks/{script}", *map(hide_folders, argv)]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "load average at the start": round(os.getloadavg()[0], 2),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}",
    }
    if device == "cuda":
        environment["GPU"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    environment["fp32 products"] = (
        f"{torch.get_float32_matmul_precision()} precision, TF32 in convolutions "
        f"{'allowed' if torch.backends.cudnn.allow_tf32 else 'off'} (CUDA only)"
    )
    if (commit := code_commit()) is not None:
        environment["code"] = f"commit {commit}"
    return environment


def merge_environments(environments: list[Environment]) -> Environment:
    """One for measurements that were made one after another: dates and loads as ranges, of the rest what differs."""
    merged = {}
    for name in environments[0]:
        values = list(dict.fromkeys(environment[name] for environment in environments if name in environment))
        if len(values) == 1:
            merged[name] = values[0]
        else:
            merged[name] = f"{min(values)} to {max(values)}" if name in RANGES else "; ".join(values)
    return merged


def check_comparable(earlier: Environment, now: Environment) -> None:
    """Raise ValueError if figures of the two cannot stand in one table."""
    for name in COMMON:
        if earlier.get(name) != now.get(name):
            before, here = (each.get(name, "none") for each in (earlier, now))
            raise ValueError(
                f"earlier figures are of {name} {before}, these would be of {here}: choose another --output"
            )


def format_environment(environment: Environment) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in environment.items())
