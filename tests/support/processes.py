"""Processes that a test started, and waiting for their end."""

import time
from pathlib import Path

from tests.support.command import DEADLINE_S


def descendants_with(text):
    """Living processes whose environment holds `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "environ").read_bytes():  # empty for a zombie
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_until_none(found):
    """Return once `found()` is empty."""
    end = time.monotonic() + DEADLINE_S
    while left := found():
        assert time.monotonic() < end, left
        time.sleep(0.05)
