"""Rows of the tables on a run's page."""

from __future__ import annotations

from typing import Any

from ftexp.config.schema import MULTI_LABEL, REGRESSION
from ftexp.report.source import Record, RunFiles
from ftexp.report.text import cut, decimals, digits

_MAX_PAIRS = 12
_OF_TARGETS = (("mean absolute error", "mae"), ("mean squared error", "mse"), ("R²", "r2"))
_ERROR_LETTERS = 160


def checkpoints(run: RunFiles) -> list[tuple[Record, str]]:
    """Return (event, state) of every checkpoint, newest first.

    The state is kept, removed, rejected or not written, the last two with the reason.
    """
    rejected = {event["checkpoint"]: event.get("reason", "") for event in run.named("checkpoint_rejected")}

    def state(event: Record) -> str:
        name = event.get("checkpoint")
        if name is None:
            return f"not written: {cut(event.get('error'), _ERROR_LETTERS)}"
        if name in rejected:
            return f"rejected: {cut(rejected[name], _ERROR_LETTERS)}"
        return "kept" if name in run.kept else "removed"

    return [(event, state(event)) for event in reversed(run.named("checkpoint_saved", "checkpoint_failed"))]


def stragglers(run: RunFiles) -> list[tuple[Record, int | None]]:
    """Return (event, step) of each rank that stayed slow; step: when that was over, or a restart; None: not yet."""
    found: list[tuple[Record, int | None]] = []
    ends = run.named("straggler_over", "failure", "resized")
    for event in run.named("straggler"):
        after = (
            end["step"]
            for end in ends
            if end["time"] >= event["time"] and (end["event"] != "straggler_over" or end["rank"] == event["rank"])
        )
        found.append((event, next(after, None)))
    return found


def worst_classes(evaluation: Record) -> list[Record]:
    """Return the rows of the classes, worst first: by average precision for multi_label, else by recall."""
    by = "average_precision" if evaluation.get("task") == MULTI_LABEL else "recall"
    return sorted(evaluation["classes"], key=lambda row: (row[by] is None, row[by], row["class"]))


def measured(evaluation: Record) -> str:
    """Return the metrics over all samples, as text."""
    others = (evaluation.get("metrics") or {}).items()
    shown = [f"{name} {decimals(value)}" for name, value in others if name not in evaluation]
    return ", ".join([_of_task(evaluation), *shown])


def _of_task(evaluation: Record) -> str:
    task = evaluation.get("task")
    if task == REGRESSION:
        return ", ".join(f"{title} {digits(evaluation.get(key))}" for title, key in _OF_TARGETS)
    accuracy = f"accuracy {decimals(evaluation['accuracy'])}"
    if task != MULTI_LABEL:
        return accuracy
    precision, labels = evaluation.get("average_precision"), evaluation.get("labels_per_sample")
    return (
        f"{accuracy} (all labels of a sample right), average precision {decimals(precision)}; "
        f"{digits(labels)} labels a sample"
    )


def confused(evaluation: Record) -> list[tuple[str, str, int, float]]:
    """Return (label, prediction, count, share of the class) of the most frequent confusions."""
    names = [row["class"] for row in evaluation["classes"]]
    pairs = [
        (names[row], names[column], number, number / sum(line))
        for row, line in enumerate(evaluation["confusion"])
        for column, number in enumerate(line)
        if number and row != column
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:_MAX_PAIRS]


def facts(run: RunFiles) -> list[tuple[str, Any]]:
    """Return versions and hardware."""
    state, hardware = run.state, dict(run.state.get("hardware") or {})
    ready = run.named("ready")
    rows: list[tuple[str, Any]] = list(state.get("versions", {}).items())
    if "memory_bytes" in hardware:
        hardware["memory"] = f"{hardware.pop('memory_bytes') / 2**30:.1f} GiB"
    rows += hardware.items()
    rows += [("device", ready[-1].get("device"))] if ready else []
    distinct = list(dict.fromkeys(state.get("world_sizes", [])))
    rows.append(("workers", ", then ".join(map(str, distinct[:8])) + (" …" if len(distinct) > 8 else "")))
    return [(name, "" if value is None else value) for name, value in rows]
