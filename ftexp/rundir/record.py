"""The run's records: run.json, metrics.jsonl and .csv, events.jsonl. Written by the driver alone, fed by the hub."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ftexp.config.versions import package_versions
from ftexp.errors import StorageError
from ftexp.rundir.metrics_csv import MetricsCsv
from ftexp.storage.append_log import AppendLog, as_json, finite, parse_lines
from ftexp.storage.directory import Storage
from ftexp.wire.hub import Message

CONFIG_FILE, RUN_FILE, METRICS_FILE, EVENTS_FILE = "config.yaml", "run.json", "metrics.jsonl", "events.jsonl"
RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"
_FLUSH_INTERVAL_S = 10.0  # between copies to an object store


@dataclass(kw_only=True)
class Failure:
    """One failure of the worker group. Times in seconds; None while it isn't known."""

    attempt: int
    cause: str
    rank: int | None
    step: int  # the last that was seen done
    error: str
    seconds_to_detect: float | None = None  # from the process's death, or the exception, to Ray's notice
    seconds_to_restart: float | None = None  # from there to the new worker group's start
    seconds_to_restore: float | None = None  # from there to the first batch
    steps_replayed: int | None = None
    node: str | None = None  # that the rank ran on
    progressed: bool = True  # whether its attempt did a step that had never been done before
    decision: str = ""  # what happened then, and the arithmetic behind it

    @property
    def where(self) -> str:
        """What failed, as a sentence about it begins."""
        if self.cause == "ray":
            return "Ray"
        return f"rank {self.rank}" if self.rank is not None else "a worker"


@dataclass(kw_only=True)
class RunState:
    """What run.json holds."""

    name: str
    status: str = RUNNING
    model: dict[str, Any] = field(default_factory=dict)  # arguments of timm.create_model
    data: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)  # config keys that define the run
    attempts: int = 0
    world_sizes: list[int] = field(default_factory=list)  # of each attempt
    failures: list[Failure] = field(default_factory=list)
    accumulate_steps: int | None = None  # since memory ran out, if more than configured
    skipped: list[list[int]] = field(default_factory=list)  # [start, end) positions that drive no update
    step: int = 0
    farthest_step: int = 0  # that was ever done: after a restart, `step` is behind it until what was lost is done again
    epoch: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=lambda: {"last": {}, "best": {}})
    checkpoint: str | None = None  # the latest saved, under checkpoints/
    error: str | None = None
    started: float = field(default_factory=time.time)  # seconds since 1970
    seconds: float = 0.0  # wall time over all calls of the command
    productive_s: float = 0.0  # of it, on steps that had not been done before, and what they brought along
    goodput: float | None = None  # productive_s / seconds
    versions: dict[str, str] = field(default_factory=package_versions)
    hardware: dict[str, Any] = field(default_factory=dict)  # of rank 0's node, in the latest attempt


def read_state(storage: Storage) -> RunState | None:
    """What a run directory says of its run; None if there is no run in it."""
    try:
        content = json.loads(storage.read_bytes(RUN_FILE))
    except FileNotFoundError:
        return None
    known = {field.name for field in dataclasses.fields(RunState)}
    content["failures"] = [Failure(**failure) for failure in content.get("failures", [])]
    return RunState(**{key: value for key, value in content.items() if key in known})


class RunRecord:
    """Keeps the records of one call of the command. `handle` is called by the hub, one message at a time."""

    def __init__(
        self,
        storage: Storage,
        state: RunState,
        score: tuple[str, str],
        clock: Callable[[], float] = time.time,
        noticed_at: float | None = None,
    ):
        self.storage, self.state, self._clock = storage, state, clock
        self._score_name, self._score_order = score
        self._metrics, self._events = AppendLog(storage, METRICS_FILE), AppendLog(storage, EVENTS_FILE)
        self._seen = {(point["split"], point["step"]) for point in self.points()}
        self._table = MetricsCsv(storage, self.points)
        self.on_point: Callable[[dict[str, Any]], None] = lambda _: None  # told of each new one
        # noticed_at: when the same command, before it began again with a new Ray, noticed that its first had died
        self._began, self._seconds_before = clock() if noticed_at is None else noticed_at, state.seconds
        self._flushed = clock()
        self.problem: str | None = None  # why the records couldn't be written the last time
        self._died_at: float | None = None  # when the current attempt's first process was lost, or raised
        self.died_rank: int | None = None  # that of the first process that was lost
        self._farthest_before = state.farthest_step  # when the current attempt began
        self._working_since = clock()  # the end of what was last counted as productive, or lost
        self.noticed_at = noticed_at  # the last failure
        self._attempt_at = clock()
        self._replayed_from: int | None = None  # the step that the attempt began at, while it replays
        self.workers: dict[int, dict[str, Any]] = {}  # of the current attempt, by rank: pid, node

    def handle(self, message: Message) -> Message | None:
        """Take one message in; the answer goes to a worker that said hello."""
        kind = message["kind"]
        handler = getattr(self, f"_on_{kind}", None)
        answer: Message | None = handler(message) if handler else None
        if self._clock() - self._flushed > _FLUSH_INTERVAL_S:
            self.write()
        return answer

    def points(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds, or will hold once it can be written."""
        return parse_lines(self._metrics.lines())

    def event(self, name: str, **fields: Any) -> None:
        """Add a line to events.jsonl."""
        head = {"time": self._clock(), "event": name, "attempt": self.state.attempts, "step": self.state.step}
        self._events.append(json.dumps({**head, **fields}))

    def write(self) -> None:
        """Bring run.json, and the copies on an object store, up to date.

        What goes wrong stays in `problem` until a later call succeeds: a full disk must not end the training.
        """
        try:
            self._write()
        except OSError as error:
            self.problem = str(error)
        else:
            self.problem = None

    def _write(self) -> None:
        self._flushed = self._clock()
        self.state.seconds = self._seconds_before + self._flushed - self._began
        self.state.goodput = round(self.state.productive_s / self.state.seconds, 4) if self.state.seconds else None
        self.storage.write_bytes(RUN_FILE, as_json(dataclasses.asdict(self.state), indent=1).encode())
        self._metrics.sync()
        self._table.sync()
        self._events.sync()

    def close(self, status: str, error: str | None = None) -> None:
        """Record how the call ended; StorageError if the records can't be written even now."""
        self.state.status, self.state.error = status, error
        self.event(status, **({"error": error} if error else {}))
        self.write()
        if self.problem is not None:
            raise StorageError(f"the records of {self.storage.uri} can't be written: {self.problem}; make room there")
        self._metrics.close()
        self._table.close()
        self._events.close()

    def late_event(self, name: str, **fields: Any) -> None:
        """As `event`, once the records are closed; OSError if it can't be written."""
        self._events = AppendLog(self.storage, EVENTS_FILE)
        self.event(name, **fields)
        self._events.close()

    @property
    def has_progressed(self) -> bool:
        """Whether the current attempt has done a step that had never been done before."""
        return self.state.farthest_step > self._farthest_before

    def fail(self, cause: str, rank: int | None, error: str, decision: str = "", told_late: bool = False) -> Failure:
        """Record that the current attempt's worker group failed. `told_late`: Ray knew when the first process ended."""
        self.noticed_at = self._clock()
        died_at = self._died_at if self._died_at is not None else self.noticed_at
        if told_late:
            self.noticed_at = died_at
        failure = Failure(
            attempt=self.state.attempts,
            cause=cause,
            rank=rank,
            node=self.workers[rank]["node"] if rank in self.workers else None,
            progressed=self.has_progressed,
            decision=decision,
            step=self.state.step,
            error=error,
            seconds_to_detect=round(max(0.0, self.noticed_at - died_at), 3),
        )
        self.state.failures.append(failure)
        # the next group may die before it says hello
        self._farthest_before, self._died_at, self.died_rank = self.state.farthest_step, None, None
        fields = {key: value for key, value in vars(failure).items() if key not in ("attempt", "step")}
        self.event("failure", **fields, time=self.noticed_at)
        self.write()
        return failure

    def _on_hello(self, message: Message) -> Message | None:
        state = self.state
        self.workers[message["rank"]] = message
        if message["rank"] != 0:
            return None
        state.attempts += 1
        state.world_sizes.append(message["world_size"])
        self._attempt_at, self._died_at, self.died_rank = self._clock(), None, None
        self._farthest_before = state.farthest_step
        if state.failures and state.failures[-1].seconds_to_restart is None and self.noticed_at is not None:
            state.failures[-1].seconds_to_restart = round(self._attempt_at - self.noticed_at, 3)
        fields = {name: message.get(name) for name in ("world_size", "pid", "node", "hot_start")}
        self.event("attempt_started", **fields, time=self._attempt_at)
        self.write()
        return {
            "attempt": state.attempts,
            "skipped": state.skipped,
            "accumulate_steps": state.accumulate_steps,
        }

    def _on_ready(self, message: Message) -> None:
        self.state.model = {name: message[name] for name in ("arguments", "num_parameters")}
        self.state.hardware = message.get("hardware", {})
        self._working_since = self._clock()
        self._replayed_from = message["step"] if message["step"] < self.state.farthest_step else None
        self.state.step = message["step"]
        if message["weights"]:
            self.event("weights_loaded", report=message["weights"])
        self.event("ready", device=message["device"], pids=self.pids(), time=self._working_since)
        self._note_recovery(message["step"])

    def pids(self) -> list[int]:
        """Process ids of the current attempt's workers, by rank."""
        world_size = (self.state.world_sizes or [0])[-1]
        return [self.workers[rank]["pid"] for rank in range(world_size) if rank in self.workers]

    def _note_recovery(self, step: int) -> None:
        failures = self.state.failures
        if failures and failures[-1].steps_replayed is None and self.noticed_at is not None:
            failures[-1].seconds_to_restore = round(self._working_since - self._attempt_at, 3)
            failures[-1].steps_replayed = max(0, failures[-1].step - step)
            self.write()

    def _on_tick(self, message: Message) -> None:
        self._at(message["step"], message["epoch"])

    def _at(self, step: int, epoch: int) -> None:
        state, now = self.state, self._clock()
        if step > state.farthest_step:
            if self._replayed_from is not None:
                self.event("caught_up", step=state.farthest_step, replayed_from=self._replayed_from)
                self._replayed_from = None
            state.productive_s += now - self._working_since
        if step != state.step:  # at the same step, the time goes to the step that comes next
            self._working_since = now
        state.step, state.epoch, state.farthest_step = step, epoch, max(step, state.farthest_step)

    def _on_metrics(self, message: Message) -> None:
        state, values, point = self.state, message["values"], (message["split"], message["step"])
        self._at(message["step"], message["epoch"])
        state.metrics["last"].update(values)
        if (score := values.get(self._score_name)) is not None and self._is_best(score):
            state.metrics["best"] = {**values, "step": message["step"], "epoch": message["epoch"]}
        if point in self._seen:  # replayed after a restart: the point is there already
            return
        self._seen.add(point)
        head = {"time": message["time"], "split": point[0], "step": point[1], "epoch": message["epoch"]}
        logged = finite({**head, **values})
        self._metrics.append(json.dumps(logged))
        self._table.append(logged)
        self.on_point(logged)

    def _is_best(self, score: float) -> bool:
        best = self.state.metrics["best"].get(self._score_name)
        sign = 1 if self._score_order == "max" else -1
        return math.isfinite(score) and (best is None or sign * score > sign * best)

    def _on_event(self, message: Message) -> None:
        fields = {key: value for key, value in message.items() if key not in ("kind", "name")}
        if message["name"] == "checkpoint_saved":
            self.state.checkpoint = message["checkpoint"]
        if message["name"] in ("step_skipped", "rolled_back"):
            self.state.skipped.append(message["positions"])
        head = {"event": message["name"], "attempt": self.state.attempts, "step": self.state.step}
        self._events.append(as_json({**head, **fields}))
        if message["name"] == "checkpoint_saved":
            self.write()

    def _on_sync(self, message: Message) -> Message:
        self.write()
        return {"synced": message["number"], "problem": self.problem}

    def _on_raised(self, message: Message) -> None:
        self._at(message["step"], self.state.epoch)  # the exact one, by which a bug is known when it comes again
        self.event("raised", rank=message["rank"], traceback=message["traceback"])
        self._note_death(message["time"])

    def is_of_the_past(self, lost: Message) -> bool:
        """Whether a line that was closed is one of an earlier worker group: another may say hello meanwhile."""
        known = self.workers.get(lost.get("rank", -1))
        return known is not None and known["pid"] != lost["pid"]

    def _on_lost(self, message: Message) -> None:
        if "rank" in message:  # the controller's lines have none
            self._note_death(message["time"])
            # a rank that raised may be heard of first, though it raised because this one had died
            self.died_rank = message["rank"] if self.died_rank is None else self.died_rank

    def _note_death(self, when: float) -> None:
        self._died_at = when if self._died_at is None else self._died_at
