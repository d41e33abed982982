"""A command in its own process, and its run directory."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

DEADLINE_S = 240

# exits as the command does, and prints to standard error which of the given modules were imported by then
TELL_IMPORTS = """
import sys
from ftexp.train import main
heavy, code = sys.argv.pop(1).split(","), 0
try:
    main()
except SystemExit as error:
    code = error.code
print("imported:", sorted({*heavy} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""
# writes the report of a run or sweep, and prints which of the heavy modules were imported
WRITE_REPORT = """
import sys
from ftexp.report.__main__ import main

main()
print(sorted({"torch", "ray", "timm", "torchvision", "pyarrow", "pandas", "numpy"} & set(sys.modules)))
"""


class Command:
    """`python -m ftexp.<module> ...` in its own process, watched by its output and its run directory.

    preloaded: the process to fork from; None: start Python. joins: whether to join the Ray of `preloaded`.
    """

    def __init__(self, module, arguments, directory, preloaded=None, joins=False):
        words, environment = [sys.executable, "-m", f"ftexp.{module}"], dict(os.environ)
        if joins:
            environment, joining = preloaded.joining()
            arguments = [*arguments, *joining]
        elif preloaded is not None:
            environment = preloaded.environment()
        if preloaded is not None:
            words = preloaded.words(module)
        self.process = subprocess.Popen(
            [*words, *arguments],
            cwd=directory, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._directory, self.lines, self._new = Path(directory), [], queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._new.put(line)
        self._new.put(None)

    @property
    def output(self):
        return "\n".join(self.lines)

    def wait_for(self, text):
        """Wait until a line with `text` is printed; fail if the command ends first."""
        end = time.monotonic() + DEADLINE_S
        while not any(text in line for line in list(self.lines)):
            if self._new.get(timeout=max(0.0, end - time.monotonic())) is None:
                raise AssertionError(f"ended without printing {text!r}:\n{self.output}")

    def wait_until(self, condition):
        """Wait until `condition()` holds; it is called again on every line, and at least ten times a second."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, f"ended too early:\n{self.output}"
            assert time.monotonic() < end, self.output
            with contextlib.suppress(queue.Empty):
                self._new.get(timeout=0.1)

    def kill_in_own_ray(self, program):
        """SIGKILL the one process of this command's own Ray whose program or process title begins with `program`.

        Processes of that Ray are recognised by their working directory, which is the command's.
        """
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has exited meanwhile
                title = (process / "cmdline").read_text().partition("\0")[0]
                if Path(title).name.startswith(program) and (process / "cwd").readlink() == self._directory:
                    found.append(int(process.name))
        (pid,) = found
        os.kill(pid, signal.SIGKILL)

    def wait(self):
        """Return the exit code."""
        code = self.process.wait(timeout=DEADLINE_S)
        self._reader.join(timeout=30)
        return code


class RunFolder:
    """A run directory and its contents."""

    def __init__(self, path):
        self.path = Path(path)

    @property
    def storage(self):
        from ftexp.storage.directory import Storage

        return Storage.at(str(self.path))

    @property
    def record(self):
        return json.loads((self.path / "run.json").read_text())

    def events(self, name=None):
        if not (self.path / "events.jsonl").exists():
            return []
        lines = (self.path / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if name in (None, event["event"])]

    def metrics(self):
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def checkpoints(self):
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())

    def kill_worker(self, rank):
        """SIGKILL a worker of the latest attempt."""
        os.kill(self.events("ready")[-1]["pids"][rank], signal.SIGKILL)


def process(*words, cwd, **environment):
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
