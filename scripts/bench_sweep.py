"""Compare the wall time of eight short trials: an ftexp sweep, Hydra's own launcher, and eight commands.

    uv run python scripts/bench_sweep.py [--rounds 1] [--check] [--json FILE]

The commands differ only in the launcher: the default model on digits at eight learning rates, two epochs. The sweep
runs two trials at a time with one worker each; the other sides run one after the other, with the default number of
workers. Also prints a breakdown of the sweep's time. A round takes about 6 minutes on 2 cores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benching import describe_machine, finish, options_parser, print_targets, scratch_directory
from rich.console import Console
from rich.table import Table

SWEEP, BASIC, SEPARATE = "sweep, 2 at once", "hydra/launcher=basic", "eight commands"
RATES = ["1e-4", "2e-4", "5e-4", "1e-3", "2e-3", "5e-3", "1e-2", "2e-2"]
SHORT = ["train.epochs=2", "schedule.warmup_epochs=0"]
_DEADLINE_S = 900.0


def main() -> None:
    """Measure, print the tables, and exit with 1 under --check if a target is missed."""
    options = options_parser(__doc__, 1, "runs of each side").parse_args()
    console = Console(highlight=False, width=120)
    describe_machine(console)
    results: dict[str, list[float]] = {SWEEP: [], BASIC: [], SEPARATE: []}
    parts: list[dict[str, float]] = []
    for number in range(options.rounds):
        for side in results:
            storage = scratch_directory()
            results[side].append(measure(side, storage))
            console.print(f"round {number + 1}: {side}: {results[side][-1]:.1f} s")
            if side == SWEEP:
                parts.append(where_time_went(storage, results[side][-1]))
    misses = report(console, results, parts)
    finish(console, {"seconds": results, "parts": parts}, options.json, misses, options.check)


def measure(side: str, storage: Path) -> float:
    """Return the seconds from the start of the first command to the end of the last."""
    rates = f"optim.lr={','.join(RATES)}"
    words = [*SHORT, f"run.storage={storage}"]
    commands = {
        SWEEP: [["-m", rates, *words, "sweep.name=bench", "sweep.max_concurrent=2"]],
        BASIC: [["-m", rates, *words, "hydra/launcher=basic", f"hydra.sweep.dir={storage}/.multirun"]],
        SEPARATE: [[f"optim.lr={rate}", *words] for rate in RATES],
    }[side]
    began = time.monotonic()
    for command in commands:
        whole = [sys.executable, "-m", "ftexp.train", *command]
        subprocess.run(whole, check=True, stdout=subprocess.DEVNULL, timeout=_DEADLINE_S)
    return time.monotonic() - began


def where_time_went(storage: Path, whole_s: float) -> dict[str, float]:
    """Return mean seconds from a trial's start to each stage, and the seconds outside of trials."""
    stages: dict[str, list[float]] = {"until its workers start": [], "until the first step": [], "until its end": []}
    starts, ends = [], []
    for run_dir in sorted((storage / "sweeps" / "bench").iterdir()):
        if run_dir.is_dir():
            began = json.loads((run_dir / "run.json").read_text())["started"]
            lines = (run_dir / "events.jsonl").read_text().splitlines()
            times = {event["event"]: event["time"] for event in map(json.loads, lines) if "time" in event}
            for stage, name in zip(stages, ("attempt_started", "ready", "finished"), strict=True):
                stages[stage].append(times[name] - began)
            starts.append(began)
            ends.append(times["finished"])
    means = {stage: statistics.mean(values) for stage, values in stages.items()}
    return {**means, "outside of trials": whole_s - (max(ends) - min(starts))}


def report(console: Console, results: dict[str, list[float]], parts: list[dict[str, Any]]) -> list[str]:
    """Print the tables; return a line for each target that is missed."""
    table = Table("8 trials", *results, box=None)
    medians = {side: statistics.median(values) for side, values in results.items()}
    spread = [f"{statistics.median(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in results.values()]
    table.add_row("seconds", *spread)
    console.print(table)
    for part in parts[0]:
        console.print(f"{part}: {statistics.median(each[part] for each in parts):.1f} s")
    return print_targets(
        console,
        [
            (f"sweep : {BASIC}", medians[SWEEP] / medians[BASIC], 0.6, False),
            (f"sweep : {SEPARATE}", medians[SWEEP] / medians[SEPARATE], 0.35, False),
        ],
    )


if __name__ == "__main__":
    main()
