"""Restart of the driver as a new interpreter in the same process, after its Ray has died.

A process whose Ray has died can't use a new Ray reliably: some of its threads wait in the dead one for ever, and Ray
exits the process if it is shut down while they do. So the process replaces itself by exec. It keeps its id, terminal
and standard streams: whoever started it sees the same process, and can send it signals.
"""

from __future__ import annotations

import base64
import os
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from ftexp.config.schema import Config
from ftexp.rundir.state import Failure

_VARIABLE = "FTEXP_RESTART"
_BEGUN_WITH = (dict(os.environ), Path.cwd())  # Ray, Hydra and other libraries change these later


@dataclass(frozen=True)
class Restart:
    """State that the new interpreter resumes with. It includes the config, whose files may have changed since."""

    config: Config  # with run.name set, and resume=auto
    overrides: list[str]
    num_before: int  # failures in earlier invocations; only later ones are charged to the budgets
    noticed_at: float  # when Ray was found dead, in seconds since 1970
    unwritten: list[Failure] = field(default_factory=list)  # failures that run.json may lack


def begin_again(restart: Restart) -> NoReturn:
    """Replace this process with a new interpreter, with the same command line and `restart`; OSError if that fails."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _close_on_exec()
    environment, directory = _BEGUN_WITH
    order = base64.b64encode(pickle.dumps((os.getpid(), str(Path.cwd()), restart))).decode()
    os.chdir(directory)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment, _VARIABLE: order})


def begun_again() -> Restart | None:
    """Return the state to resume with; None if `begin_again` did not start this interpreter."""
    if (order := os.environ.pop(_VARIABLE, None)) is None:
        return None
    pid, directory, restart = pickle.loads(base64.b64decode(order))
    if pid != os.getpid():
        return None
    os.chdir(directory)
    assert isinstance(restart, Restart)
    return restart


def _close_on_exec() -> None:
    """Let exec close all files but the standard streams: Ray leaves files open, which would keep its shared memory."""
    try:
        numbers = [int(entry.name) for entry in Path("/dev/fd").iterdir()]
    except OSError:
        return
    for number in numbers:
        if number > 2:
            try:
                os.set_inheritable(number, False)
            except OSError:  # closed meanwhile: the descriptor of the listing itself
                continue
