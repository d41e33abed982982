"""Finding and awaiting processes that a test started, and a context with many open files."""

import contextlib
import os
import resource
import time
from pathlib import Path

from tests.support.command import DEADLINE_S


def descendants_with(text):
    """Return the pids of running processes whose environment contains `text`."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (directory / "environ").read_bytes():  # empty for a zombie
                found.append(int(directory.name))
        except OSError:
            continue
    return found


def wait_until(condition, tell=lambda: "it never came", every_s=0.05, within_s=DEADLINE_S):
    """Wait until `condition()` holds; fail with the message `tell()` after `within_s`."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, tell()
        time.sleep(every_s)


def wait_until_none(found):
    """Wait until `found()` is empty."""
    wait_until(lambda: not found(), tell=found)


def wait_for_command_line(pid, start):
    """Wait until the process's command line begins with `start`: subprocess.Popen returns a moment before that."""
    wait_until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(start), every_s=0.001)


@contextlib.contextmanager
def many_open_files():
    """Hold 1,024 open files, so that new descriptors are above 1,023, the limit of select.select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
