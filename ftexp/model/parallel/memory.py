"""Return of a sharded model's freed CPU memory to the operating system."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in glibc's malloc.h
_BYTES = 2**20  # larger blocks are mapped, and unmapped when freed


def return_freed_memory() -> None:
    """Make glibc return large blocks to the system as soon as they are freed; does nothing with another C library.

    By default, glibc raises its threshold for this to the size of freed blocks, up to 32 MiB. Memory that FSDP2
    allocates and frees for each block then stays in a fragmented heap: a worker with a quarter of ViT-B used more
    memory than one with the whole model.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _BYTES)  # setting it also stops glibc from raising it
        libc.mallopt(_TRIM_THRESHOLD, _BYTES)
