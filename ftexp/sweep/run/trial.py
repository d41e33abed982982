"""The driver of one trial, in a process of its own: `python trial.py <JSON of sys.path>`, a request on standard input.

A process of its own, and so a job of its own in Ray: what it crashes, prints, catches or leaves behind is nobody
else's, and Ray takes back what a dead job held. Standard input stays open as long as the sweep lives: when it ends,
the sweep is gone, and so is the trial.
"""

import json
import os
import pickle
import signal
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftexp.cluster.ray_cluster import SharedRay
    from ftexp.config.schema import Config


@dataclass(frozen=True)
class TrialRequest:
    """Arguments of a trial."""

    config: "Config"
    overrides: list[str]
    shared: "SharedRay"


def main() -> None:
    """Read the request, train, and end with the exit code that `python -m ftexp.train` would end with."""
    sys.path[:] = json.loads(sys.argv[1])  # that of the sweep, so that the same plug-ins are found
    request: Any = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_sweep, daemon=True, name="sweep").start()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)  # type: ignore[union-attr]  # its log is read now
    sys.stderr.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that started it with `&` has SIGINT ignored
    sys.exit(run(request))


def run(request: TrialRequest) -> int:
    """Return the exit code of one trial."""
    # imported here, once sys.path is that of the sweep
    from ftexp.cli.exit_codes import exit_code_of
    from ftexp.driver.run import train

    return exit_code_of(lambda: train(request.config, request.overrides, request.shared))


def _end_with_the_sweep() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
