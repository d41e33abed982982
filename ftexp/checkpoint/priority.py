"""Priority of background threads below that of training."""

from __future__ import annotations

import os
import sys
import threading

_LOWEST = 19
_NICE = 10  # leaves a tenth of a core that training would use fully; with less, saving could starve


def give_way() -> None:
    """Lower this thread's priority below that of training; on Linux only, where threads have their own.

    The value is relative to the process's own, which may be low already. Ray starts workers with nice 15; there the
    maximum, 19, would leave this thread a third of a core that training needs, so SCHED_IDLE is used, which leaves a
    tenth. Only root may raise a priority again.
    """
    if sys.platform == "linux":
        own, thread = os.getpriority(os.PRIO_PROCESS, os.getpid()), threading.get_native_id()
        if own + _NICE <= _LOWEST:
            os.setpriority(os.PRIO_PROCESS, thread, own + _NICE)
        else:
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
