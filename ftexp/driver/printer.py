"""Printing of a run's messages, events and failures."""

from __future__ import annotations

import re
from pathlib import Path

from ftexp.config.schema import Config
from ftexp.counting import counted
from ftexp.driver.alerts.rules import described as straggler_described
from ftexp.driver.terminal import Terminal
from ftexp.driver.worker_group import Start, WorkerGroup
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import Failure
from ftexp.trackers.follower import described
from ftexp.wire import events
from ftexp.wire.messages import Evaluated, Happened, Message, Metrics, Raised, Ready, Tick

PACKAGE = Path(__file__).parents[1]
_MAX_SAMPLES_SHOWN = 32
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)\n(?P<code>    .+)?', re.MULTILINE)
# files of libraries, and of ftexp itself
_OTHERS_FILE = re.compile(rf"/(?:site-packages|dist-packages|lib/python3\.\d+)/|^{re.escape(str(PACKAGE))}/")


class Printer:
    """Prints messages, events and failures, once they are recorded."""

    def __init__(self, terminal: Terminal, record: RunRecord, group: WorkerGroup, config: Config) -> None:
        self._terminal, self._record, self._group, self._config = terminal, record, group, config
        self._raised: Raised | None = None  # first exception of this attempt
        self._problem: str | None = None  # last problem of the records that was printed
        self._checks: set[str] = set()  # checks for silent corruption, and "memory" snapshots, whose cost was printed

    def message(self, message: Message) -> None:
        """Print a message if it concerns the user, and a warning if the records can't be written."""
        if self._record.problem not in (None, self._problem):
            self._warn(f"the run's records can't be written: {self._record.problem}; trying again")
        self._problem = self._record.problem
        match message:
            case Tick():
                self._terminal.step(self._record.state)
            case Metrics(split="val"):
                self._terminal.epoch(self._record.state, message.step, message.epoch)
            case Evaluated(step, epoch, values=values) if values:
                self._terminal.epoch(self._record.state, step, epoch)
            case Raised() if self._raised is None:
                self._raised = message
            case Happened(event):
                self.event(event)

    def event(self, event: events.Event) -> None:
        """Print an event if it concerns the user."""
        match event:
            case events.Waiting(reason):
                self._warn(f"no workers for {self._group.waiting_s:.0f} s: {reason}")
            case events.AdviceFailed(error):
                self._warn(f"{error}; the run does without")
            case events.ResizeExpected(num_workers):
                room = counted(num_workers, "worker")
                self._terminal.say(f"there is room for {room}: saving until Ray Train starts them")
            case events.Resized(world_size):
                step = self._record.state.step
                self._terminal.say(f"resized  to {counted(world_size, 'worker')}, from step {step}", "green")
            case events.CheckpointRejected(checkpoint, reason):
                self._warn(f"checkpoint {checkpoint} rejected: {reason}")
            case events.CheckpointFailed(step, error):
                self._warn(f"checkpoint at step {step} not written: {error}")
            case events.FullModelFailed(_, checkpoint, error):
                self._warn(f"model.pt of checkpoint {checkpoint} not written, which is complete without it: {error}")
            case events.PreemptionNotice(ranks=ranks):
                self._warn(f"the machine of rank {', '.join(map(str, ranks))} is about to be taken away: saving now")
            case events.Chaos(fault, rank, step):
                self._terminal.say(f"⚡ chaos: {fault} after step {step} on rank {rank}")
            case events.StepSkipped(_, step, reason):
                self._warn(f"step {step} skipped: {reason}")
            case events.RolledBack((first, end), step, to_step):
                self._warn(
                    f"the gradient of step {step} is not finite: back to step {to_step} in memory, "
                    f"skipping positions {first:,} to {end - 1:,}"
                )
            case events.StoppedEarly(step, epoch, reason):
                self._terminal.say(f"stopped early at step {step}, epoch {epoch}: {reason}")
            case events.LearningRateChanged(step, before, after):
                self._warn(
                    f"learning rate {after:.3g} from step {step}, {before:.3g} in the checkpoint: "
                    f"the schedule now spans train.epochs={self._config.train.epochs}{_how_to_keep_rates(self._config)}"
                )
            case events.EvaluationFailed(step, error):
                self._warn(f"step {step} was not evaluated: {error}")
            case events.Straggler():
                self._warn(straggler_described(event))
            case events.StragglerOver(rank):
                self._terminal.say(f"rank {rank} is as fast as the others again")
            case events.NcclHang(files):
                self._terminal.say(f"Ray's NCCL hang detector: {', '.join(files)}")
            case events.SlowData(rank, reason):
                self._warn(f"rank {rank}: {reason}")
            case events.BadSamples(samples=samples):
                for sample in samples:
                    self._warn(f"excluded, can't be read: {sample['where']}: {sample['reason']}")
            case events.TrackerOpened():
                self._terminal.say(described(event))
            case events.TrackerFailed():
                self._terminal.say(described(event), "yellow")
            case events.CorruptionChecked(check, every_steps, seconds, share) if check not in self._checks:
                self._checks.add(check)
                each = {
                    "replicas": f"compared every {every_steps} steps and before each checkpoint",
                    "repeat": f"one step in {every_steps} is computed twice",
                }[check]
                self._terminal.say(f"{check:<9}{each}: {1000 * seconds:.1f} ms, {share:.2%} of the time")
            case events.SnapshotsTaken(every_steps, seconds, share, num_bytes) if "memory" not in self._checks:
                self._checks.add("memory")
                cost = f"{1000 * seconds:.1f} ms, {share:.2%} of the time; {num_bytes / 1e6:,.1f} MB of a node"
                self._terminal.say(f"{'memory':<9}a snapshot every {every_steps} steps: {cost}")
            case events.SnapshotsOff(reason):
                self._warn(f"no snapshots in memory: {reason}; a failure costs the steps since the last checkpoint")
            case events.AlertFailed():
                self._warn(unsent(event))
            case events.ProfileWritten(where):
                self._terminal.say(f"{'profile':<9}{where} (chrome://tracing, or ui.perfetto.dev)")
            case events.ProfileFailed(error):
                self._warn(f"no profile: {error}")
            case events.ReportFailed(error):
                self._warn(f"the report will be incomplete: {error}")

    def ready(self, ready: Ready, start: Start) -> None:
        """Print that a worker group is about to train. `start`: why it was started."""
        state, train, restored = self._record.state, self._config.train, self._group.restored
        pids, checkpoint = self._record.pids(), restored.checkpoint if restored is not None else None
        if start is Start.AFTER_FAILURE:
            self._terminal.recovered(state.failures[-1], checkpoint, len(self._group.rejected), pids)
        elif start is Start.FIRST and checkpoint is not None:
            self._terminal.say(f"{'resumed':<9}at step {ready.step} from {checkpoint}")
        if ready.weights and ready.step == 0:
            self._terminal.say(f"{'weights':<9}{ready.weights}")
        self._terminal.ready(state, ready.total_steps, train.global_batch_size, train.epochs, pids, ready.device)

    def failure(self, failure: Failure) -> Raised | None:
        """Print a failure; return the first exception of the attempt that it ended."""
        self._terminal.failure(failure)
        raised, self._raised = self._raised, None
        return raised

    def not_replaced(self, failure: Failure) -> None:
        """Print that all workers restart, although only one was to be replaced."""
        self._warn(f"rank {failure.rank} could not be replaced: restarting the workers")

    def diagnosis(self, raised: Raised | None) -> None:
        """Print where the last attempt's first exception was raised, and in which batch."""
        if raised is not None and raised.position == 0 and not raised.samples:
            self._terminal.say(f"  rank {raised.rank} had not begun to train; its traceback is in events.jsonl")
        elif raised is not None:
            samples = ", ".join(map(str, raised.samples[:_MAX_SAMPLES_SHOWN]))
            more = len(raised.samples) - _MAX_SAMPLES_SHOWN
            self._terminal.say(
                f"  rank {raised.rank} was at step {raised.step}, position {raised.position:,}, with samples "
                f"{samples or 'none'}{f' and {more} more' if more > 0 else ''}; its traceback is in events.jsonl"
            )
        if raised is not None and (where := raised_at(raised.traceback)) is not None:
            self._terminal.say(f"  raised at {where}")

    def _warn(self, text: str) -> None:
        self._terminal.say(f"! {text}", "yellow")


def raised_at(text: str) -> str | None:
    """Return file, line, function and code of the innermost frame in the user's own files.

    Without such a frame, of the innermost frame of all; None if the text holds no traceback.
    """
    frames = [frame for frame in _FRAME.finditer(text) if not frame["file"].startswith("<")]
    own = [frame for frame in frames if not _OTHERS_FILE.search(frame["file"])]
    if not frames:
        return None
    found = (own or frames)[-1]
    code = f": {found['code'].strip()}" if found["code"] else ""
    return f"{found['file']}:{found['line']} in {found['function']}{code}"


def unsent(event: events.AlertFailed) -> str:
    """Return a line about an alert that could not be sent."""
    return f"alert {event.alert} not sent to {event.to}: {event.reason}; the run is not affected"


def _how_to_keep_rates(config: Config) -> str:
    """Return how to add epochs without changing the learning rates; "" if schedule.min_lr is 0."""
    schedule = config.schedule
    if not schedule.min_lr:
        return ""
    more = f"{schedule.cooldown_epochs:g} + <the epochs added>" if schedule.cooldown_epochs else "<the epochs added>"
    return f"; to keep the rates as they were, set schedule.cooldown_epochs={more}: trained at schedule.min_lr"
