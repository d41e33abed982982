"""Beginning again in the same process, with nothing of what it holds: for a command whose Ray has died.

A process that has a dead Ray can't be trusted with a new one: threads of it wait in Ray for ever, and Ray ends the
process when it is shut down under them. So the process becomes a new interpreter. To whoever started it, it is the
same: its id, terminal, standard streams and signals stay.
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
_BEGUN_WITH = (dict(os.environ), Path.cwd())  # Ray, Hydra and the libraries change theirs


@dataclass(frozen=True)
class Restart:
    """The state that the new interpreter resumes with. The config is the old one: its files may have changed since."""

    config: Config  # with the run's name, and resuming
    overrides: list[str]
    num_before: int  # failures in earlier invocations; only later ones are charged to the budgets
    noticed_at: float  # when Ray was found dead, in seconds since 1970
    unwritten: list[Failure] = field(default_factory=list)  # failures that run.json may lack


def begin_again(restart: Restart) -> NoReturn:
    """Become a new interpreter, with the command line of this one, that finds `restart`; OSError if that fails."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _close_on_exec()
    environment, directory = _BEGUN_WITH
    order = base64.b64encode(pickle.dumps((os.getpid(), str(Path.cwd()), restart))).decode()
    os.chdir(directory)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment, _VARIABLE: order})


def begun_again() -> Restart | None:
    """Return the state to resume with; None if this process was started by somebody else."""
    if (order := os.environ.pop(_VARIABLE, None)) is None:
        return None
    pid, directory, restart = pickle.loads(base64.b64decode(order))
    if pid != os.getpid():
        return None
    os.chdir(directory)
    assert isinstance(restart, Restart)
    return restart


def _close_on_exec() -> None:
    """Have all but the standard streams closed then: Ray leaves files open, and with them its shared memory."""
    try:
        numbers = [int(entry.name) for entry in Path("/dev/fd").iterdir()]
    except OSError:
        return
    for number in numbers:
        if number > 2:
            try:
                os.set_inheritable(number, False)
            except OSError:  # that of the listing itself
                continue
