"""How a process ends that has imported torch and Ray: taking all their modules down would take a second or two."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable


def code_of(run: Callable[[], int | None]) -> int:
    """The exit code of `run`, after what the interpreter does at its end, short of taking the modules down.

    The process is to end by `os._exit` then. After a KeyboardInterrupt it ends here, by SIGINT.
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
    threading._shutdown()  # type: ignore[attr-defined]  # joins threads that aren't daemons, as multiprocessing does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    if interrupted:  # by this, a shell and a launcher recognise an interrupt
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code
