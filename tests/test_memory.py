"""Memory that is freed, in processes of their own."""

import platform
import subprocess
import sys

import pytest


CODE = """
import sys
from pathlib import Path
import torch
from trainers.memory import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
for _ in range(3):
    blocks = [torch.ones(2**20 * size // 4) for size in (40, 1, 300)]
    del blocks
print(resident() - before)
"""


def rise(mode: str) -> int:
    """MiB that are still taken after 341 were freed."""
    result = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
    assert rise("keep") > 300
    assert rise("default") < 100
