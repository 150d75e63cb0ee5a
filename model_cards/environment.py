"""Where a run took place: the machine, the versions of the libraries and of the code, and what it took."""

import platform
import resource
import subprocess
import sys
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import torch


POWERCAP = Path("/sys/class/powercap")
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


@cache
def code_commit() -> str | None:
    """The commit of the checkout that this file lies in, marked where files differ from it; none outside of one.

    As it was when first asked for: what runs was read before.
    """
    folder = Path(__file__).parent
    try:
        describe = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
        result = subprocess.run(describe, cwd=folder, capture_output=True, text=True, timeout=20)
        # Installed beside somebody's own code, this would be the commit of that.
        listed = ["git", "ls-files", "--error-unmatch", __file__]
        known = subprocess.run(listed, cwd=folder, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 and known.returncode == 0 else None


def peak_memory(device: torch.device) -> int:
    """Bytes that the process has taken at most: of a GPU if that is its device, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class EnergyMeter:
    """Joules that the machine's processors, memory and NVIDIA GPUs have taken since it was made, by their own counters.

    Processors count by Linux's powercap (https://docs.kernel.org/power/powercap/powercap.html), which many machines let
    only their administrator read, and GPUs by NVML, for which the package nvidia-ml-py must be installed.

    Attributes:
        joules: None where nothing counts, or the GPUs do not.
    """

    def __init__(self, powercap: Path = POWERCAP):
        self.domains = {}  # counter -> what it counts to before it begins again, both in microjoules
        for folder in sorted(powercap.glob("intel-rapl:*")):
            try:
                name = (folder / "name").read_text().strip()
                if name.startswith("package") or name == "dram":  # the others are parts of these, or hold them
                    (folder / "energy_uj").read_text()
                    self.domains[folder / "energy_uj"] = int((folder / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                continue
        self.gpus = _find_gpus()
        is_blind = torch.cuda.is_available() and not self.gpus  # most would be left out
        self.joules = 0.0 if (self.domains or self.gpus) and not is_blind else None
        self.last = self._read()

    def update(self) -> None:
        """Call it at least every few minutes: a processor's counter begins again after about an hour."""
        if self.joules is None:
            return
        now = self._read()
        for counter, value in now.items():
            taken = value - self.last[counter]
            self.joules += (taken + self.domains[counter] if taken < 0 else taken) / 1e6
        self.last = now

    def _read(self) -> dict:
        readings = {counter: int(counter.read_text()) for counter in self.domains}
        for gpu, read in self.gpus.items():
            readings[gpu] = 1000 * read()
        return readings


def _find_gpus() -> dict:
    """Functions that read the millijoules of every visible GPU that counts them."""
    if not torch.cuda.is_available():
        return {}
    try:
        import pynvml
    except ImportError:
        return {}
    gpus = {}
    try:
        pynvml.nvmlInit()
        for index in range(torch.cuda.device_count()):
            name = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            gpus[name] = partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    except pynvml.NVMLError:
        return {}  # of a part of them the sum would mislead
    return gpus
