"""Does a teacher help? Train the default ViT on digits with and without the ResNet of experiment=digits_resnet.

    uv run python scripts/bench_distill.py [--rounds 3] [--check] [--json FILE]

The teacher is trained once (seed 0) and receives the student's batches, scaled from 8 px to its 32 px. Rounds are seeds
of the student; the sides take turns and differ only in `distill`. Takes 6 minutes on 2 cores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benching import describe_machine, finish, options_parser, print_targets
from rich.console import Console
from rich.table import Table

UNTAUGHT, TAUGHT = "untaught", "taught"
MIN_GAIN = 0.0  # gain of mean test accuracy


def main() -> None:
    """Measure, print the table, and exit with 1 under --check if the teacher doesn't help."""
    options = options_parser(__doc__, 3, "seeds of each side").parse_args()
    console = Console(highlight=False, width=120)
    describe_machine(console)
    results: dict[str, list[dict[str, float]]] = {UNTAUGHT: [], TAUGHT: []}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        teacher = run(directory, "teacher", ["experiment=digits_resnet"])
        console.print(f"teacher: {teacher['test_accuracy']:.4f}, {teacher['seconds']:.0f} s")
        taught = ["distill=logits", f"distill.teacher={directory / 'teacher'}"]
        for seed in range(options.rounds):
            for side, overrides in ((UNTAUGHT, []), (TAUGHT, taught)):
                found = run(directory, f"{side}_{seed}", [f"seed={seed}", *overrides])
                results[side].append(found)
                console.print(f"seed {seed}: {side}: {found['test_accuracy']:.4f}, {found['seconds']:.0f} s")
    misses = report(console, results, teacher["test_accuracy"])
    finish(console, {"teacher": teacher, **results}, options.json, misses, options.check)


def run(directory: Path, name: str, overrides: list[str]) -> dict[str, float]:
    """Run the command; return its test accuracy, its seconds, and the milliseconds of a step and of the teacher."""
    began_s = time.perf_counter()
    command = [sys.executable, "-m", "ftexp.train", f"run.storage={directory}", f"run.name={name}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began_s
    last = json.loads((directory / name / "run.json").read_text())["metrics"]["last"]
    points = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    steps = [point for point in points if "forward_ms" in point]
    return {
        "test_accuracy": last["test_accuracy"],
        "seconds": seconds,
        "step_ms": statistics.median(_step_ms(point) for point in steps),
        "teacher_ms": statistics.median(point.get("teacher_ms", 0.0) for point in steps),
    }


def _step_ms(point: dict[str, Any]) -> float:
    sections = ("teacher", "forward", "backward", "optimizer")
    return sum(float(point.get(f"{section}_ms", 0.0)) for section in sections)


def report(console: Console, results: dict[str, list[dict[str, float]]], teacher: float) -> list[str]:
    """Print the table; return a line if the teacher doesn't help."""
    table = Table("", "test accuracy, mean", "standard deviation", "by seed", "step, ms", "teacher, ms", box=None)
    for side, runs in results.items():
        values = [one["test_accuracy"] for one in runs]
        times = [f"{statistics.median(one[key] for one in runs):.1f}" for key in ("step_ms", "teacher_ms")]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        table.add_row(side, f"{statistics.mean(values):.4f}", spread, ", ".join(f"{v:.4f}" for v in values), *times)
    table.add_row("the teacher", f"{teacher:.4f}")
    console.print(table)
    means = {side: statistics.mean(one["test_accuracy"] for one in runs) for side, runs in results.items()}
    return print_targets(console, [("gain in mean accuracy", means[TAUGHT] - means[UNTAUGHT], MIN_GAIN, True)], 4)


if __name__ == "__main__":
    main()
