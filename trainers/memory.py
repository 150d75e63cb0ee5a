"""Main memory that training takes again and again."""

import ctypes
import sys


# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep the memory that one step's tensors free, for those of the next; whether this system can.

    By default glibc gives large blocks back to the system, which hands them out again page by page, filled with zeros:
    several percent of a training step, and more in a virtual machine.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
