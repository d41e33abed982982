"""Processes that a test started, and waiting for their end; and a process that holds many files open."""

import contextlib
import os
import resource
import time
from pathlib import Path

from tests.support.command import DEADLINE_S


def descendants_with(text):
    """Living processes whose environment holds `text`."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (directory / "environ").read_bytes():  # empty for a zombie
                found.append(int(directory.name))
        except OSError:
            continue
    return found


def wait_for_command_line(pid, start):
    """Return once the process's command line begins with `start`: subprocess.Popen returns a moment before that."""
    end = time.monotonic() + DEADLINE_S
    while not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(start):
        assert time.monotonic() < end, pid
        time.sleep(0.001)


def wait_until_none(found):
    """Return once `found()` is empty."""
    end = time.monotonic() + DEADLINE_S
    while left := found():
        assert time.monotonic() < end, left
        time.sleep(0.05)


@contextlib.contextmanager
def many_open_files():
    """Hold so many that what is opened meanwhile is above 1,023, where select.select ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
