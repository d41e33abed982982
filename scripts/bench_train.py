"""Compare training speed and start-up: ftexp, a hand-written DDP loop, and a script like Ray's tutorials.

    uv run python scripts/bench_train.py [--rounds 5] [--seeds 3] [--check] [--json FILE]
    uv run python scripts/bench_train.py --features [--rounds 20] [--json FILE]

Model, data, batch and threads are the same; the sides take turns. Steps per second are measured in the steady state,
without the first epoch: for the steps alone, and including the ends of epochs, where each side evaluates and saves.
"First step" is the time from the start of the command to the end of the first optimiser step. Five rounds take
15 minutes on 2 cores, two rounds 8. --features: see bench_features.py; 20 rounds take 8 minutes.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_features import compare_features
from benching import default_recipe, describe_machine, finish, options_parser, print_targets, scratch_directory
from rich.console import Console
from rich.table import Table

BASELINES = Path(__file__).parent / "baselines"
EPOCHS = 6
BATCH = 32
WORKERS = 2
PLAIN, TUTORIAL, FTEXP = "plain DDP", "tutorial", "ftexp"


def main() -> None:
    """Measure, print a table, and exit with 1 under --check if a target is missed."""
    parser = options_parser(__doc__, 2, "runs of each side for speed and start-up")
    parser.add_argument("--features", action="store_true", help="the cost of each feature, and nothing else")
    parser.add_argument("--seeds", type=int, default=3, help="whole default runs, for accuracy and wall time")
    options = parser.parse_args()
    console = Console(highlight=False)
    describe_machine(console)
    if options.features:
        finish(console, compare_features(console, options.rounds), options.json, [], options.check)
        return
    settings = {"epochs": EPOCHS, "global_batch_size": BATCH, "num_workers": WORKERS, **default_recipe()}
    speed: dict[str, list[dict[str, float]]] = {PLAIN: [], TUTORIAL: [], FTEXP: []}
    for number in range(options.rounds):
        settings["seed"] = number
        for side, measure in ((FTEXP, _ftexp), (PLAIN, _plain), (TUTORIAL, _tutorial)):
            speed[side].append(measure(settings))
            console.print(f"round {number + 1}: {side}: " + _short(speed[side][-1]))
    defaults = [_default_run(seed) for seed in range(options.seeds)]
    for run in defaults:
        console.print("default run: " + _short(run))
    misses = _report(console, speed, defaults)
    finish(console, {"speed": speed, "default": defaults}, options.json, misses, options.check)


def _ftexp(settings: dict[str, Any]) -> dict[str, float]:
    overrides = [f"train.epochs={settings['epochs']}", f"seed={settings['seed']}", "augment=none"]
    directory, began, _ = _run_ftexp(overrides)
    points = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steady = [point for point in points if point["epoch"] >= 1 and point["split"] == "train"]
    within = [
        (second["time"] - first["time"]) / (second["step"] - first["step"])
        for first, second in itertools.pairwise(points)
        if first["split"] == second["split"] == "train" and first["epoch"] >= 1
    ]
    step_s = statistics.mean(within)
    return {
        "steps_per_s": 1 / step_s,
        "steps_per_s_with_epoch_ends": (steady[-1]["step"] - steady[0]["step"])
        / (steady[-1]["time"] - steady[0]["time"]),
        # the first logged point comes after ten steps: subtract nine of them
        "first_step_s": points[0]["time"] - began - (points[0]["step"] - 1) * step_s,
    }


def _plain(settings: dict[str, Any]) -> dict[str, float]:
    printed, _ = _python(BASELINES / "plain_ddp.py", json.dumps(settings), OMP_NUM_THREADS="1")
    return {key: printed[key] for key in ("steps_per_s", "steps_per_s_with_epoch_ends")}


def _tutorial(settings: dict[str, Any]) -> dict[str, float]:
    printed, began = _python(BASELINES / "tutorial.py", json.dumps(settings))
    result = {key: printed[key] for key in ("steps_per_s", "steps_per_s_with_epoch_ends")}
    return {**result, "first_step_s": printed["first_step"] - began}


def _default_run(seed: int) -> dict[str, float]:
    directory, _, seconds = _run_ftexp([f"seed={seed}"])
    last = json.loads((directory / "run.json").read_text())["metrics"]["last"]
    return {"seed": seed, "test_accuracy": last["test_accuracy"], "command_s": seconds}


def _run_ftexp(overrides: list[str]) -> tuple[Path, float, float]:
    """Run the command; return its run directory, its start time and its duration in seconds."""
    storage = str(scratch_directory())
    began = time.time()
    command = [sys.executable, "-m", "ftexp.train", "run.name=bench", f"run.storage={storage}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Path(storage) / "bench", began, time.time() - began


def _python(script: Path, argument: str, **environment: str) -> tuple[dict[str, Any], float]:
    began = time.time()
    # otherwise each worker of a plain Ray script under `uv run` would start through uv again
    variables = {**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", **environment}
    done = subprocess.run(
        [sys.executable, str(script), argument], check=True, capture_output=True, text=True, env=variables
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]), began


def _report(console: Console, speed: dict[str, list[dict[str, float]]], defaults: list[dict[str, float]]) -> list[str]:
    """Print the table; return a line for each target that is missed."""
    table = Table("", *speed, box=None)
    titles = {
        "steps_per_s": "steps/s, steps alone",
        "steps_per_s_with_epoch_ends": "steps/s, with epoch ends",
        "first_step_s": "command to first step, s",
    }
    medians: dict[str, dict[str, float]] = {}
    for key, title in titles.items():
        values = {side: [run[key] for run in runs if key in run] for side, runs in speed.items()}
        medians[key] = {side: statistics.median(found) for side, found in values.items() if found}
        cells = [f"{statistics.median(v):.1f} ({min(v):.1f} to {max(v):.1f})" if v else "-" for v in values.values()]
        table.add_row(title, *cells)
    console.print(table)
    rate, start = medians["steps_per_s_with_epoch_ends"], medians["first_step_s"]
    accuracies, seconds = [r["test_accuracy"] for r in defaults], [r["command_s"] for r in defaults]
    spread = f"{min(accuracies):.4f} to {max(accuracies):.4f}"
    results = [
        (f"mean test accuracy ({spread})", statistics.mean(accuracies), 0.97, True),
        ("slowest whole command, s", max(seconds), 120.0, False),
        (f"steps/s, {FTEXP} : {PLAIN}", rate[FTEXP] / rate[PLAIN], 0.95, True),
        (f"steps/s, {FTEXP} : {TUTORIAL}", rate[FTEXP] / rate[TUTORIAL], 2.0, True),
        (f"first step, {FTEXP} : {TUTORIAL}", start[FTEXP] / start[TUTORIAL], 1.1, False),
    ]
    return print_targets(console, results)


def _short(values: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in values.items())


if __name__ == "__main__":
    main()
