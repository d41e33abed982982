"""Fast exit of a process that has imported torch and Ray: unloading all their modules would take a second or two."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable


def code_of(run: Callable[[], int | None]) -> int:
    """Call `run`, then do the interpreter's exit steps except for unloading modules; return the exit code.

    The caller then exits by `os._exit`. After a KeyboardInterrupt, the process ends here, by SIGINT.
    """
    interrupted = False
    try:
        code = run() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]  # joins non-daemon threads; multiprocessing calls it too
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    if interrupted:  # shells and the launcher recognise an interrupt by this signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code
