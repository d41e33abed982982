"""Threads that give way to training."""

from __future__ import annotations

import os
import sys
import threading

_LOWEST = 19
_NICE = 10  # a tenth of a core where training wants it all; with less (19: a hundredth), saving could starve


def give_way() -> None:
    """Have this thread run where the training leaves a core idle; Linux knows priorities of threads.

    From the process's own on, which Ray has lowered: only root may raise one.
    """
    if sys.platform == "linux":
        lower = min(_LOWEST, os.getpriority(os.PRIO_PROCESS, 0) + _NICE)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), lower)
