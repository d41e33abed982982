"""Terminal output of a run: a header, a progress bar, a line for each failure and recovery, a table.

Without a terminal (CI, nohup), a line for each evaluation replaces the bar.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ftexp.cli.wrapping import say
from ftexp.config.metric_names import ALWAYS_LOGGED
from ftexp.counting import counted
from ftexp.data.info import DataInfo
from ftexp.rundir.names import CHECKPOINTS
from ftexp.rundir.state import Failure, RunState
from ftexp.storage.directory import Storage
from ftexp.wire.messages import MEMORY, REPLACED, START, STORAGE

_RATE_WINDOW_S = 10.0


class Terminal:
    """Output of one run. All values come from the run's records, so output and records agree."""

    def __init__(self, console: Console | None = None) -> None:
        # a file or pipe has no width: lines aren't wrapped
        plain = console is None and not sys.stdout.isatty()
        self.console = console or Console(highlight=False, width=160 if plain else None, soft_wrap=plain)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._epochs = 0
        self._batch_size = 0
        self._rates: list[tuple[float, int]] = []  # (time, step) within the last _RATE_WINDOW_S
        self._deaf = False  # whether output has failed, so nothing is printed any more

    def say(self, text: str, style: str = "") -> None:
        """Print a line above the bar."""
        console = self._bar.console if self._bar is not None else self.console
        self._draw(lambda: say(console, text, style))

    def _draw(self, draw: Callable[[], None]) -> None:
        """Call `draw`. Failing output never ends a run: after the first error, nothing is drawn any more."""
        if self._deaf:
            return
        try:
            draw()
        except (OSError, ValueError, SystemExit):  # rich exits when its reader has gone, as in `... | head`
            self._deaf, self._bar = True, None

    def header(
        self,
        run: str,
        location: str,
        model: str,
        data: DataInfo,
        data_name: str,
        workers: str,
        feed: str,
        epoch: str,
        weights: str | None = None,
        teacher: str | None = None,
    ) -> None:
        """Print the run's header. `weights`: the pretrained weights and their preprocessing."""
        sizes = " · ".join(f"{count:,} {split}" for split, count in data.num_samples.items())
        shape = f"{data.image_size}×{data.image_size}×{data.channels}"
        for title, text in (
            ("run", f"{run}  ({location})"),
            ("model", model),
            ("weights", weights),
            ("teacher", teacher),
            ("data", f"{data_name}: {sizes} · {data.outputs_in_words} · {shape}"),
            ("feed", feed),
            ("epoch", epoch),
            ("workers", workers),
        ):
            if text is not None:
                self.say(f"{title:<9}{text}")
        for excluded in data.excluded or []:
            self.say(f"excluded {excluded}")
        for warning in data.warnings:
            self.say(f"! {warning}", "yellow")
        if data.bad_samples:
            first = f"{data.bad_samples[0].where}: {data.bad_samples[0].reason}"
            samples = counted(len(data.bad_samples), "sample")
            text = f"{samples} that can't be read (the first: {first}); see events.jsonl"
            self.say(f"{'skipped':<9}{text}", "yellow")

    def finished_before(self, run: str, location: str) -> None:
        """Print that there is nothing to train."""
        self.say(f"{'run':<9}{run}  ({location})")
        self.say(f"{'status':<9}finished before: nothing to train; train.epochs=... trains on")

    def changed(self, lines: Sequence[str]) -> None:
        """Print the differences from the run's last invocation."""
        for line in lines:
            self.say(f"{'changed':<9}{line}", "yellow")

    def ready(
        self, state: RunState, total_steps: int, batch_size: int, epochs: int, pids: list[int], device: str
    ) -> None:
        """Print that training starts, unless after a failure, and open the bar or reset it."""
        self._epochs, self._batch_size, self._rates = epochs, batch_size, []
        pid_text = ", ".join(map(str, pids))
        if state.attempts == 1 or not state.failures or state.failures[-1].seconds_to_restore is None:
            parameters = state.model.get("num_parameters", 0)
            self.say(f"{'started':<9}{parameters:,} parameters on {device} · {total_steps:,} steps · pids {pid_text}")
        self._draw(lambda: self._open_bar(total_steps, epochs, state.step))
        self.step(state)

    def _open_bar(self, total_steps: int, epochs: int, step: int) -> None:
        if self.console.is_terminal and self._bar is None:
            columns = (
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                BarColumn(_WIDE_BAR if self.console.width >= _WIDE_CONSOLE else _BAR),
                TextColumn("step {task.completed:,.0f}/{task.total:,.0f} {task.fields[values]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total_steps, epoch=0, epochs=epochs, values="")
        elif self._bar is not None and self._task is not None:
            self._bar.reset(self._task, completed=step)  # else the time left would count the restart as slow steps

    def step(self, state: RunState) -> None:
        """Move the bar to the state's step."""
        now = time.monotonic()
        self._rates = [(when, step) for when, step in self._rates if now - when < _RATE_WINDOW_S] + [(now, state.step)]
        if (bar := self._bar) is not None and (task := self._task) is not None:
            current = min(state.epoch + 1, self._epochs)
            fixed = f"epoch {current}/{self._epochs} step {state.step:,}/{bar.tasks[0].total:,.0f} 0:00:00 left "
            values = _fitting(self._values(state), self.console.width - len(fixed) - _BAR)
            self._draw(lambda: bar.update(task, completed=state.step, epoch=current, values=values))

    def epoch(self, state: RunState, step: int, epoch: int) -> None:
        """Show the evaluation of an epoch that ended at `step`. Without a terminal, this line shows the progress."""
        self.step(state)
        if self._bar is None:
            self.say(" ".join([f"epoch {epoch}/{self._epochs} step {step}", *self._values(state).values()]))

    def failure(self, failure: Failure) -> None:
        """Print a failure: where and when, its cause, and the decision."""
        what = f"✗ {failure.where} failed after step {failure.step} [{failure.cause}]: {failure.error}"
        self.say(f"{what}; {failure.decision}", "red")

    def recovered(self, failure: Failure, checkpoint: str | None, rejected: int, pids: list[int]) -> None:
        """Print that training continues after a failure, and the state that it continues from."""
        origin = f"restored {checkpoint}" if checkpoint else "no checkpoint yet: restarting from the beginning"
        if failure.recovery == MEMORY:
            origin = f"restored {checkpoint} from memory"
        elif failure.recovery == REPLACED:
            origin = f"{failure.where} replaced"
        damaged = f" ({rejected} rejected)" if rejected else ""
        parts = [failure.seconds_to_detect, failure.seconds_to_restart, failure.seconds_to_restore]
        total = sum(seconds for seconds in parts if seconds is not None)
        replayed = counted(failure.steps_replayed or 0, "step")
        self.say(
            f"↻ training again after {total:.1f} s: {origin}{damaged}, replaying {replayed} · "
            f"pids {', '.join(map(str, pids))}",
            "green",
        )

    def close(self) -> None:
        """Remove the bar."""
        if (bar := self._bar) is not None:
            self._draw(bar.stop)
            self._bar = None

    def summary(self, state: RunState, run_dir: Storage) -> None:
        """Print the closing table."""
        self.close()
        last, best = state.metrics["last"], state.metrics["best"]
        rows: list[tuple[str, Any]] = [("status", state.status + _reason(state))]
        if state.stopped is not None:
            at = f"at step {state.stopped['step']:,}, epoch {state.stopped['epoch']}"
            rows.append(("stopped early", f"{at}: {state.stopped['reason']}"))
        rows += [(title, f"{last[key]:.4f}") for key, title in _SHOWN if last.get(key) is not None]
        rows += [(key.replace("_", " "), f"{last[key]:.4f}") for key in _others(last)]
        if best:
            rows.append(
                (
                    "best",
                    ", ".join(f"{k} {v:.4f}" for k, v in best.items() if isinstance(v, float))
                    + f" at epoch {best['epoch']}",
                )
            )
        survived = len(state.failures) - (state.status == "failed")
        rows += [
            ("steps", f"{state.step:,} in {counted(state.epoch, 'epoch')}"),
            ("time", f"{state.seconds:.1f} s" + _goodput(state)),
            ("failures", f"{max(survived, 0)} survived"),
            *(("", _account(failure)) for failure in state.failures[-_MAX_FAILURES_SHOWN:]),
            ("checkpoint", run_dir.child(CHECKPOINTS, state.checkpoint).uri if state.checkpoint else "none"),
        ]
        self.say("─" * 60)
        for title, text in rows:
            self.say(f"{title:<15}{text}")
        if state.status in ("interrupted", "failed"):
            first = "Fix the cause. " if state.status == "failed" else ""
            then = "resume from the last checkpoint" if state.checkpoint else "start again (there is no checkpoint)"
            self.say(f"{first}To {then}, run the same command with run.name={state.name}")

    def _values(self, state: RunState) -> dict[str, str]:
        """Return {title: text} of the values of the last point that are shown, and of the speed."""
        last = state.metrics["last"]
        shown = {title: f"{title} {last[key]:.3f}" for key, title in _LIVE if last.get(key) is not None}
        if len(self._rates) > 1 and (seconds := self._rates[-1][0] - self._rates[0][0]) > 0:
            rate = (self._rates[-1][1] - self._rates[0][1]) * self._batch_size / seconds
            shown[_RATE] = f"{max(rate, 0):,.0f} {_RATE}"
        return shown


def _fitting(values: Mapping[str, str], room: int) -> str:
    """Return the values as a line of at most `room` characters, without the least useful ones if need be."""
    shown = dict(values)
    for title in _DROPPED_FIRST:
        if len(" ".join(shown.values())) > room:
            shown.pop(title, None)
    return " ".join(shown.values())


def _others(last: Mapping[str, float | None]) -> list[str]:
    """Return the names of the test split's metrics other than loss and accuracy."""
    known = {f"test_{name}{of}" for name in ALWAYS_LOGGED for of in ("", "_ema")}
    return [key for key, value in last.items() if key.startswith("test_") and key not in known and value is not None]


def _reason(state: RunState) -> str:
    """Return why the run ended; "" if the line of its last failure shows it."""
    printed = state.error is None or (state.failures and state.failures[-1].error in state.error)
    return "" if printed else f": {state.error}"


def _goodput(state: RunState) -> str:
    return f", {state.goodput:.0%} of it on steps that were kept" if state.goodput is not None else ""


def _account(failure: Failure) -> str:
    """Return a line about a failure and its cost."""
    parts = (
        ("to detect", failure.seconds_to_detect),
        ("to restart", failure.seconds_to_restart),
        ("to restore", failure.seconds_to_restore),
        ("to a new step", failure.seconds_to_new_step),
    )
    costs = [_RECOVERIES[failure.recovery]] if failure.recovery is not None else []
    costs += [f"{seconds:.1f} s {title}" for title, seconds in parts if seconds is not None]
    costs += [f"{counted(failure.steps_replayed, 'step')} replayed"] if failure.steps_replayed is not None else []
    what = failure.cause if failure.where == "Ray" else f"{failure.cause} of {failure.where}"
    return f"{what} at step {failure.step}: {', '.join(costs)}"


_RECOVERIES = {
    **{REPLACED: "replaced", MEMORY: "restored from memory", STORAGE: "restored from storage"},
    START: "restarted from the beginning",
}
_MAX_FAILURES_SHOWN = 10
_LIVE = (
    *(("train_loss", "loss"), ("train_accuracy", "acc"), ("val_loss", "val_loss"), ("val_accuracy", "val_acc")),
    ("val_accuracy_ema", "val_acc_ema"),
)
_RATE = "images/s"
_DROPPED_FIRST = ("val_loss", "acc", _RATE, "val_acc_ema", "loss", "val_acc")
_BAR, _WIDE_BAR, _WIDE_CONSOLE = 10, 40, 150  # characters
_SHOWN = (
    *(("test_accuracy", "test accuracy"), ("test_accuracy_ema", "… of the EMA"), ("test_loss", "test loss")),
    *(("val_accuracy", "val accuracy"), ("val_accuracy_ema", "… of the EMA"), ("val_loss", "val loss")),
)
