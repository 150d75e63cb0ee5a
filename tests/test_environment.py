"""What a run took, by counters of energy."""

import re
from pathlib import Path

import pytest
import torch

from model_cards.environment import EnergyMeter, code_commit, peak_memory


STATUS = Path("/proc/self/status")


def write_domain(folder, name, joules, wraps_at=100.0):
    folder.mkdir(exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (folder / "max_energy_range_uj").write_text(f"{int(wraps_at * 1e6)}\n")


def test_energy_is_that_of_packages_and_memory(tmp_path):
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "psys"}
    for folder, name in names.items():
        write_domain(tmp_path / folder, name, 50)
    meter = EnergyMeter(tmp_path)
    assert meter.joules == (None if torch.cuda.is_available() and not meter.gpus else 0)
    if meter.joules is None or meter.gpus:
        return
    for folder, joules in {"intel-rapl:0": 60, "intel-rapl:0:0": 59, "intel-rapl:0:1": 53, "intel-rapl:1": 99}.items():
        write_domain(tmp_path / folder, names[folder], joules)
    meter.update()
    assert meter.joules == 13
    # A counter that began again.
    write_domain(tmp_path / "intel-rapl:0", "package-0", 5)
    meter.update()
    assert meter.joules == 13 + 45


def test_where_nothing_counts_nothing_is_said(tmp_path):
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "name").write_text("package-0")  # whose counter may not be read
    meter = EnergyMeter(tmp_path)
    meter.update()
    assert meter.gpus or meter.joules is None


@pytest.mark.skipif(not STATUS.exists(), reason="reads what Linux says of a process")
def test_peak_memory_is_the_systems():
    (high,) = re.findall(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert abs(peak_memory(torch.device("cpu")) - 1024 * int(high)) < 2**24


def test_the_commit_is_that_of_the_checkout():
    commit = code_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 12
