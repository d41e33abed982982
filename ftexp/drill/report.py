"""The result of a drill: the run with faults compared with the clean one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ftexp.checkpoint.compare import load, tree_differences
from ftexp.checkpoint.store import locate
from ftexp.config.schema import Config
from ftexp.data.feeds.feed import COSTS
from ftexp.data.sampling import identities
from ftexp.errors import CheckpointError
from ftexp.job.stopwatch import SPEEDS
from ftexp.rundir.names import EVENTS_FILE, METRICS_FILE, RUN_FILE
from ftexp.rundir.sample_ledger import Update, problems, read_updates
from ftexp.storage.append_log import read_lines
from ftexp.storage.directory import Storage
from ftexp.wire.messages import MEMORY, REPLACED

Events = list[dict[str, Any]]
Points = dict[tuple[str, int], dict[str, Any]]  # {(split, step): values}


@dataclass
class Row:
    """One fault and its consequences."""

    fault: str
    step: int
    rank: int
    happened: str
    steps_replayed: int
    seconds_lost: float | None  # from the fault to the end of the first new step
    identical: bool


@dataclass
class DrillReport:
    """The comparison. `differences` is empty if the runs are identical."""

    rows: list[Row]
    differences: list[str]
    verdict: str

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def compare(
    clean: Storage, broken: Storage, global_batch_size: int, exit_code: int, config: Config | None = None
) -> DrillReport:
    """Compare two finished runs. `exit_code`: the broken run's.

    config: the config of both, which determines the samples of an epoch; None: each sample once.
    """
    points, updates = read_lines(broken, METRICS_FILE), read_updates(broken)
    logged = _by_place(read_lines(clean, METRICS_FILE))
    data = json.loads(broken.read_bytes(RUN_FILE))["data"]
    num_samples = data["num_samples"]["train"]
    drawn_by = identities(config, num_samples, data["class_counts"]) if config is not None else None
    found = [
        *_in_metrics(logged, _by_place(points)),
        *_in_ledgers(read_updates(clean), updates),
        *problems(updates, num_samples, global_batch_size, drawn_by),
    ]
    first_step = min((step for step, _ in found), default=None)
    differences = [text for _, text in sorted(found, key=lambda item: item[0])]
    if exit_code != 0:
        error = json.loads(broken.read_bytes(RUN_FILE)).get("error")
        differences.insert(0, f"the run with faults ended with exit code {exit_code}: {error}")
    else:
        differences += _in_checkpoints(clean, broken)
    rows = _rows(read_lines(broken, EVENTS_FILE), points)
    if differences:
        bad_from = first_step if first_step is not None else rows[-1].step + 1 if rows else 0
        for row, after in itertools.zip_longest(rows, rows[1:]):
            row.identical = after is not None and after.step < bad_from
        return DrillReport(rows, differences, "\n".join(["NOT identical; the first differences:", *differences[:5]]))
    num_positions = sum(len(update.positions) for update in updates if not update.skipped)
    verdict = (
        f"bitwise identical: model.pt, optimizer.pt, extra_state.pt, {len(logged):,} logged points, and the "
        f"{num_positions:,} samples that drove the updates"
    )
    return DrillReport(rows, [], verdict)


def _in_metrics(clean: Points, broken: Points) -> Iterator[tuple[int, str]]:
    """Yield (step, text) for every logged point that differs."""
    for split, step in sorted({*broken, *clean}, key=lambda place: place[1]):
        one, other = clean.get((split, step)), broken.get((split, step))
        if one is None or other is None:
            yield step, f"step {step}: a {split} point is in the {'broken' if one is None else 'clean'} run only"
            continue
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                yield step, f"step {step}: {key} is {other.get(key)}, and {one.get(key)} in the clean run"


def _in_ledgers(clean: list[Update], broken: list[Update]) -> Iterator[tuple[int, str]]:
    """Yield (step, text) for every update that other samples drove."""
    updates = {update.step: update for update in broken}
    for update in clean:
        mine = updates.pop(update.step, None)
        if mine is None:
            yield update.step, f"step {update.step}: missing from the sample ledger of the run with faults"
        elif (mine.positions, mine.samples) != (update.positions, update.samples):
            yield update.step, f"step {update.step}: driven by other samples than in the clean run"
        elif mine.skipped != update.skipped:
            yield update.step, f"step {update.step}: skipped in the {'broken' if mine.skipped else 'clean'} run only"
    for step in updates:
        yield step, f"step {step}: not in the clean run's sample ledger"


def _in_checkpoints(clean: Storage, broken: Storage) -> list[str]:
    try:
        sides = [locate(run.uri) for run in (clean, broken)]
        one, other = (load(*side) for side in sides)
    except CheckpointError as error:
        return [str(error)]
    return list(tree_differences(one, other))


def _by_place(points: Events) -> Points:
    """Return {(split, step): values} of logged points, without times and speeds."""
    return {
        (point["split"], point["step"]): {
            key: value for key, value in point.items() if key not in ("split", "step", "time", *SPEEDS, *COSTS)
        }
        for point in points
    }


def _rows(events: Events, points: Events) -> list[Row]:
    done_at = {point["step"]: point["time"] for point in points if point["split"] == "train"}
    starts = [number for number, event in enumerate(events) if event["event"] == "chaos"]
    rows = []
    for start, end in itertools.pairwise([*starts, len(events)]):
        fault, after = events[start], events[start + 1 : end]
        restarted, is_back = bool(_named(after, "attempt_started")), bool(_named(after, "ready"))
        restored = next((event["step"] for event in _named(after, "restored")), 0)
        again_at = done_at.get(fault["step"] + 1)
        row = Row(
            fault=fault["fault"],
            step=fault["step"],
            rank=fault["rank"],
            happened="; ".join(_happened(after)) or "not noticed by the run",
            steps_replayed=fault["step"] - restored if restarted else 0,
            seconds_lost=again_at - fault["time"] if is_back and again_at is not None else None,
            identical=True,
        )
        rows.append(row)
    return rows


def _happened(after: Events) -> Iterator[str]:
    """Yield the consequences of one fault, as short phrases."""
    for event in _named(after, "failure")[:1]:
        yield f"{event['cause']} of rank {event['rank']}"
    if not _named(after, "failure") and _named(after, "attempt_started"):
        yield "the command was killed and run again"
    for event in _named(after, "checkpoint_rejected"):
        yield f"{event['checkpoint']} rejected ({event['reason']})"
    for event in _named(after, "restored")[:1]:
        yield f"restored step {event['step']}" + (" from memory" if event.get("source") == MEMORY else "")
    if _named(after, "attempt_started") and not _named(after, "restored"):
        yield "restarted at step 0"
    if _is_replaced(after):
        yield f"rank {_named(after, 'worker_replaced')[0]['rank']} replaced"
    for event in _named(after, "checkpoint_failed"):
        saved = [other["step"] for other in _named(after, "checkpoint_saved") if other["step"] >= event["step"]]
        yield f"step {event['step']} not saved" + (f", step {saved[0]} was" if saved else "")


def _is_replaced(after: Events) -> bool:
    return any(event.get("source") == REPLACED for event in _named(after, "ready"))


def _named(events: Events, name: str) -> Events:
    return [event for event in events if event["event"] == name]
