"""Freed memory of a sharded model on CPUs, returned to the system."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in glibc's malloc.h
_BYTES = 2**20  # what is larger is mapped, and unmapped when it is freed


def return_freed_memory() -> None:
    """Have glibc give back large blocks as soon as they are freed; nothing with another C library.

    By default it raises the size from which it does to that of the blocks that it sees freed, up to 32 MiB. What FSDP2
    gathers and frees for each block then stays in a heap full of gaps: a worker with a quarter of ViT-B held more than
    one with all of it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _BYTES)  # setting it also keeps it where it is
        libc.mallopt(_TRIM_THRESHOLD, _BYTES)
