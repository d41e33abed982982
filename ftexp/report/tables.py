"""What the tables of a run's page hold."""

from __future__ import annotations

from typing import Any

from ftexp.report.source import Record, RunFiles
from ftexp.report.text import cut

_MAX_PAIRS = 12
_ERROR_LETTERS = 160


def checkpoints(run: RunFiles) -> list[tuple[Record, str]]:
    """(event, state) of every save, the newest first: those that are there, were removed since, or came to nothing."""
    rejected = {event["checkpoint"]: event.get("reason", "") for event in run.named("checkpoint_rejected")}

    def state(event: Record) -> str:
        name = event.get("checkpoint")
        if name is None:
            return f"not written: {cut(event.get('error'), _ERROR_LETTERS)}"
        if name in rejected:
            return f"rejected: {cut(rejected[name], _ERROR_LETTERS)}"
        return "kept" if name in run.kept else "removed"

    return [(event, state(event)) for event in reversed(run.named("checkpoint_saved", "checkpoint_failed"))]


def worst_classes(evaluation: Record) -> list[Record]:
    """Recall and precision of each class, the worst first."""
    return sorted(evaluation["classes"], key=lambda row: (row["recall"] is None, row["recall"], row["class"]))


def confused(evaluation: Record) -> list[tuple[str, str, int, float]]:
    """(label, prediction, times, share of the class) of the pairs that are taken for each other most often."""
    names = [row["class"] for row in evaluation["classes"]]
    pairs = [
        (names[row], names[column], number, number / sum(line))
        for row, line in enumerate(evaluation["confusion"])
        for column, number in enumerate(line)
        if number and row != column
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:_MAX_PAIRS]


def facts(run: RunFiles) -> list[tuple[str, Any]]:
    """Versions and hardware."""
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
