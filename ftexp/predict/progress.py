"""Progress of predictions: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ftexp.cli.wrapping import say

_LINE_EVERY_S = 10.0


class ImageProgress:
    """Counts images of this invocation. A context manager; call `advance` inside it."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._began = self._printed = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal and total:
            self._bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True)

    def __enter__(self) -> ImageProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(str(self), total=self._total)
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_images: int) -> None:
        """Add to the number of written images."""
        self._done += num_images
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=str(self))
        elif now - self._printed >= _LINE_EVERY_S and self._done < self._total:
            self._printed = now
            say(self._console, str(self))

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @property
    def rate(self) -> float:
        """Images per second, since the start."""
        return self._done / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        text = f"{self._done:,}/{self._total:,} images"
        if self._done:
            text += f"  {self.rate:,.0f} images/s  {(self._total - self._done) / self.rate:,.0f} s left"
        return text
