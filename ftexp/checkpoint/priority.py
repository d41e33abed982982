"""Threads that give way to training."""

from __future__ import annotations

import os
import sys
import threading

_LOWEST = 19
_NICE = 10  # a tenth of a core where training wants it all; with less, saving could starve


def give_way() -> None:
    """Have this thread run where the training leaves a core idle; Linux knows priorities of threads.

    From the process's own on, which may be low: Ray gives its workers 15, from where the lowest still leaves this
    thread a third of a core that training wants, and the policy for idle cores a tenth. Only root may raise one.
    """
    if sys.platform == "linux":
        own, thread = os.getpriority(os.PRIO_PROCESS, os.getpid()), threading.get_native_id()
        if own + _NICE <= _LOWEST:
            os.setpriority(os.PRIO_PROCESS, thread, own + _NICE)
        else:
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
