"""Findings of checks, and their table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Verdict(StrEnum):
    """Consequence of a finding for a run."""

    OK = "ok"
    WARNING = "warning"  # a run would work, but slower or less safely
    FAILS = "fails"  # a run would fail
    NOT_HERE = "-"  # there is nothing to check on this machine, or with this config


_STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILS: "red", Verdict.NOT_HERE: "dim"}
_WIDE_CONSOLE = 110  # characters


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. `fix`: what to do about it, in a line; "" if nothing is to be done."""

    check: str
    verdict: Verdict
    found: str
    fix: str = ""


def ok(check: str, found: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(check, Verdict.OK, found)


def warning(check: str, found: str, fix: str) -> Finding:
    """Return a finding with which a run would still work."""
    return Finding(check, Verdict.WARNING, found, fix)


def fails(check: str, found: str, fix: str) -> Finding:
    """Return a finding with which a run would fail."""
    return Finding(check, Verdict.FAILS, found, fix)


def not_here(check: str, found: str) -> Finding:
    """Return a finding that says why there is nothing to check."""
    return Finding(check, Verdict.NOT_HERE, found)


def print_table(findings: Iterable[Finding], console: Console) -> None:
    """Print the findings, and a line with their number by verdict.

    On a narrow console, the fix is below the finding, not next to it.
    """
    findings = list(findings)
    is_beside = console.width >= _WIDE_CONSOLE and any(finding.fix for finding in findings)
    titles = ("check", "", "found", *(["what to do"] if is_beside else []))
    table = Table(*titles, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in findings:
        cells = [Text(finding.check), Text(finding.verdict, style=_STYLES[finding.verdict]), Text(finding.found)]
        if is_beside:
            cells.append(Text(finding.fix))
        elif finding.fix:
            cells[-1].append(f"\n→ {finding.fix}")
        table.add_row(*cells)
    console.print(table)
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    outcome = "a run would fail" if counts[Verdict.FAILS] else "a run would start"
    numbers = f"{counts[Verdict.OK]} ok, {counts[Verdict.WARNING]} to look at, {counts[Verdict.FAILS]} that fail"
    console.print(f"\n{outcome}: {numbers}", markup=False)
