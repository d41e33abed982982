"""The tables of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ftexp.report.defaults import config_differences
from ftexp.report.markup import Child, Markup, element
from ftexp.report.series import duration
from ftexp.report.source import Record, RunFiles
from ftexp.report.text import cut
from ftexp.report.timeline import DETECTING, PHASES, REPLAYING, RESTARTING, RESTORING, STARTING, Timeline

MOST_ROWS = 200  # of a table; what is in the middle of a longer one is left out
_MOST_CLASSES = 100
_MOST_PAIRS = 12
_ERROR_LETTERS, _NAME_LETTERS = 160, 60


def table(head: Sequence[str], rows: Sequence[Sequence[Child]], words: Iterable[int] = ()) -> Markup:
    """A table that scrolls where it doesn't fit; `words` are the columns that hold no numbers."""
    texts = set(words)
    kinds = [None if column in texts else "number" for column in range(len(head))]
    shown: list[Sequence[Child] | None] = list(rows)
    if len(rows) > MOST_ROWS:
        shown = [*rows[: MOST_ROWS // 2], None, *rows[-MOST_ROWS // 2 :]]
    body = [
        element("tr", (element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        if row is not None
        else element("tr", element("td", f"… {len(rows) - MOST_ROWS:,} more …", colspan=len(head), class_="gap"))
        for row in shown
    ]
    titles = element("tr", (element("th", title, class_=kind) for title, kind in zip(head, kinds, strict=True)))
    return element("div", element("table", element("thead", titles), element("tbody", body)), class_="scroll")


def phases(timeline: Timeline) -> Markup:
    """What the seconds went to."""
    total = timeline.total_s or 1.0
    rows = [
        (
            element("span", element("i", class_="swatch", style=f"background:var(--{phase})"), phase),
            duration(seconds),
            _bar(seconds / total, phase),
            PHASES[phase],
        )
        for phase, seconds in timeline.seconds_by_phase().items()
        if seconds
    ]
    return table(("phase", "time", "share", "what it is"), [*rows, ("all", duration(total), "", "")], words=(0, 2, 3))


def interruptions(timeline: Timeline) -> Markup:
    """Each failure, and what it cost."""
    head = (
        "after step",
        "what",
        "detect",
        "restart",
        "restore",
        "replay",
        "steps replayed",
        "lost",
        "restored",
        "then",
    )
    rows = [
        (
            f"{one.step:,}",
            element("span", one.cause + (f" of rank {one.rank}" if one.rank is not None else ""), title=one.error),
            *(_seconds(sum(one.seconds.get(phase, 0.0) for phase in group)) for group in _ACCOUNT),
            "" if one.steps_replayed is None else f"{one.steps_replayed:,}",
            _seconds(one.lost_s),
            one.restored or "",
            cut(one.decision, _ERROR_LETTERS),
        )
        for one in timeline.interruptions
    ]
    return table(head, rows, words=(1, 8, 9))


_ACCOUNT = ((DETECTING,), (RESTARTING, STARTING), (RESTORING,), (REPLAYING,))


def _seconds(seconds: float) -> str:
    return duration(seconds) if seconds else ""


def checkpoints(run: RunFiles) -> Markup:
    """Every save, the newest first: those that are there, were removed since, or came to nothing."""
    rejected = {event["checkpoint"]: event.get("reason", "") for event in run.named("checkpoint_rejected")}
    rows = []
    for event in reversed(run.named("checkpoint_saved", "checkpoint_failed")):
        name = event.get("checkpoint")
        if name is None:
            state = f"not written: {cut(str(event.get('error')), _ERROR_LETTERS)}"
            rows.append(("", f"{event['step']:,}", "", "", "", "", state))
            continue
        state = "kept" if name in run.kept else "removed"
        state = f"rejected: {cut(rejected[name], _ERROR_LETTERS)}" if name in rejected else state
        sizes = (f"{event['bytes'] / 1e6:,.1f} MB", f"{1000 * event['blocked_s']:.0f} ms", duration(event["write_s"]))
        score = event.get("metrics", {}).get("val_accuracy")
        rows.append((name, f"{event['step']:,}", _number(score), *sizes, state))
    head = ("checkpoint", "step", "val accuracy", "size", "training blocked", "written in", "state")
    return table(head, rows, words=(0, 6))


def classes(evaluation: Record) -> Markup:
    """Recall and precision of each class, the worst first."""
    found = sorted(evaluation["classes"], key=lambda row: (row["recall"] is None, row["recall"], row["class"]))
    rows = [
        (
            cut(row["class"], _NAME_LETTERS),
            f"{row['num_samples']:,}",
            _bar(row["recall"], "right"),
            _percent(row["precision"]),
        )
        for row in found[:_MOST_CLASSES]
    ]
    if len(found) > _MOST_CLASSES:
        rows.append((f"… and {len(found) - _MOST_CLASSES:,} more", "", "", ""))
    return table(("class", "samples", "accuracy (recall)", "precision"), rows, words=(0, 2))


def confused(evaluation: Record) -> Markup:
    """The pairs that are taken for each other most often."""
    names = [cut(row["class"], _NAME_LETTERS) for row in evaluation["classes"]]
    pairs = [
        (number, names[row], names[column], sum(line))
        for row, line in enumerate(evaluation["confusion"])
        for column, number in enumerate(line)
        if number and row != column
    ]
    top = sorted(pairs, key=lambda pair: -pair[0])[:_MOST_PAIRS]
    rows = [(label, guess, f"{number:,}", f"{number / total:.1%}") for number, label, guess, total in top]
    return table(("label", "taken for", "times", "of the class"), rows, words=(0, 1))


def config(run: RunFiles) -> Markup:
    """Where the config isn't the default."""
    rows = [(key, _value(own), _value(usual)) for key, own, usual in config_differences(run.config)]
    if not rows:
        return element("p", "Nothing does.")
    return table(("key", "value", "default"), rows, words=(0, 1, 2))


def facts(run: RunFiles) -> Markup:
    """Versions and hardware."""
    state, hardware = run.state, dict(run.state.get("hardware") or {})
    ready = run.named("ready")
    rows: list[tuple[str, Any]] = [(name, version) for name, version in state.get("versions", {}).items()]
    if "memory_bytes" in hardware:
        hardware["memory"] = f"{hardware.pop('memory_bytes') / 2**30:.1f} GiB"
    rows += hardware.items()
    rows += [("device", ready[-1].get("device"))] if ready else []
    sizes = state.get("world_sizes", [])
    distinct = list(dict.fromkeys(sizes))
    rows.append(("workers", ", then ".join(map(str, distinct[:8])) + (" …" if len(distinct) > 8 else "")))
    return table(("what", "which"), rows, words=(0, 1))


def _value(value: Any) -> Markup:
    texts = {None: "null", True: "true", False: "false"}
    return element("code", cut(texts[value] if value is None or isinstance(value, bool) else str(value), 300))


def _bar(share: float | None, role: str) -> Markup | str:
    if share is None:
        return "no samples"
    width = f"width:{100 * min(1.0, max(0.0, share)):.1f}%;background:var(--{role})"
    return element("span", element("span", element("i", style=width), class_="bar"), f"{share:.1%}", class_="share")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""
