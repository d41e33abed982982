"""The driver of one trial, in its own process: `python trial.py <JSON of sys.path>`, with a request on standard input.

Its own process is also its own job in Ray: its crashes, output, signals and leftovers don't affect other trials, and
Ray frees the resources of a dead job. Standard input stays open while the sweep lives. When it closes, the sweep is
gone, and the trial kills itself.
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
    """Read the request, train, and exit with the exit code that `python -m ftexp.train` would have."""
    sys.path[:] = json.loads(sys.argv[1])  # the sweep's, so that the same plug-ins are found
    request: Any = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_sweep, daemon=True, name="sweep").start()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)  # type: ignore[union-attr]  # its log is read while it runs
    sys.stderr.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a shell started the sweep with `&`
    sys.exit(run(request))


def run(request: TrialRequest) -> int:
    """Return the exit code of one trial."""
    # imported here, once sys.path is the sweep's
    from ftexp.cli.exit_codes import exit_code_of
    from ftexp.driver.run import train

    return exit_code_of(lambda: train(request.config, request.overrides, request.shared))


def _end_with_the_sweep() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
