"""Printing of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from ftexp.cli.wrapping import say
from ftexp.config.schema import MULTI_LABEL, REGRESSION

_TITLES = {"num_samples": "samples", "average_precision": "average precision"}


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def evaluating() -> Status:
    """Return the status line that a terminal shows during the evaluation."""
    return Console().status("evaluating")


def print_result(result: dict[str, Any]) -> None:
    """Print a result of `ftexp.evaluate.measure.measure`."""
    console = Console(highlight=False)
    say(
        console,
        f"{result['checkpoint']} (epoch {result['epoch']}) on {result['num_samples']} {result['split']} samples"
        + (", each with its mirror image (tta=hflip)" if result["tta"] == "hflip" else ""),
    )
    for line in _of_classes(result):
        say(console, line)
    keys = {MULTI_LABEL: ("accuracy", "loss", "average_precision"), REGRESSION: ("loss", "mae", "mse", "r2")}
    overall = keys.get(result["task"], ("accuracy", "loss"))
    console.print("   ".join(f"{key} {_number(result[key])}" for key in overall))
    for name, value in result["metrics"].items():
        if name not in overall:
            console.print(f"{name} {_number(value)}", markup=False)
    if result["task"] == REGRESSION:
        rows, columns = result["targets"], ("target", "mae", "mse", "r2")
    else:
        more = ("average_precision",) if result["task"] == MULTI_LABEL else ()
        rows, columns = result["classes"], ("class", "num_samples", "recall", "precision", *more)
    table = Table(*(_TITLES.get(column, column) for column in columns), box=None)
    for row in rows:
        table.add_row(*(_number(row[column]) for column in columns))
    console.print(table)
    outcome = f"written to {result['written']}" if "written" in result else f"! not written to {result['not_written']}"
    say(console, outcome)


def _of_classes(result: dict[str, Any]) -> Iterator[str]:
    """Yield lines about classes that only the model, or only the other data, has."""
    if missing := result.get("missing_classes"):
        yield f"missing classes: {', '.join(missing)}"
    if new := result.get("new_classes"):
        each = ", ".join(f"{name} ({count:,})" for name, count in new.items())
        yield f"new classes, {sum(new.values()):,} samples excluded: {each}"
