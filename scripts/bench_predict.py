"""Measure `python -m ftexp.predict` over many JPEGs: speed next to a plain loop, memory, and the cost of a kill.

    uv run python scripts/bench_predict.py [--rounds 3] [--images 20000] [--only speed kill] [--check] [--json FILE]

JPEGs of 160x160 pixels (to 128, scripts/photo_like.py) and a model that was trained for two steps: its predictions
don't matter here. The baseline is baselines/predict_loop.py: one process with the same decoding function, model and
output. Sides take turns and are compared within each round. Memory is the total of the command's processes, early (at
20 to 50 % of the images) and late (from 70 %). Finally a command is killed by SIGKILL half-way and run again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_feed import SETS, SMALL
from benching import Check, describe_machine, figures, finish, memory_mib, options_parser, print_targets, quotients
from photo_like import write_photos
from rich.console import Console
from rich.table import Table

MODEL = "mobilenetv3_small"
TRAINING_IMAGES = 200
EARLY, LATE = (0.2, 0.5), (0.7, 1.0)
LOOP = Path(__file__).parent / "baselines" / "predict_loop.py"
OURS, LOOPS = "ftexp.predict", "plain loop"
SPEED, KILL = "speed", "kill"


@dataclass
class Results:
    """The measurements; a part that wasn't measured is empty."""

    images_per_s: dict[str, list[float]] = field(default_factory=lambda: {OURS: [], LOOPS: []})
    command_s: dict[str, list[float]] = field(default_factory=lambda: {OURS: [], LOOPS: []})
    memory_mib: dict[str, float] = field(default_factory=dict)
    killed: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Measure, print tables, and exit with 1 under --check if a target is missed."""
    parser = options_parser(__doc__, 3, "turns of each side")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--only", nargs="+", choices=(SPEED, KILL), default=(SPEED, KILL), help="measure no more")
    options = parser.parse_args()
    console, results = Console(highlight=False, width=120), Results()
    describe_machine(console)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        paths = write_photos(directory / "images", options.images, size=SETS[SMALL][0])
        run = trained(directory)
        console.print(f"{len(paths):,} JPEGs, and a run of {MODEL}: made")
        samples: list[tuple[float, float]] = []
        for number in range(options.rounds if SPEED in options.only else 0):
            samples += measure_ours(run, directory / f"out_{number}", len(paths), results)
            measure_loop(run, directory, results)
            console.print(f"round {number + 1}: {results.images_per_s[OURS][-1]:,.0f} and "
                          f"{results.images_per_s[LOOPS][-1]:,.0f} images/s")  # fmt: skip
        for title, (low, high) in (("early", EARLY), ("late", LATE)) if samples else ():
            results.memory_mib[title] = max(held for done, held in samples if low <= done < high)
        if KILL in options.only:
            results.killed = measure_kill(run, directory, len(paths))
        finish(console, vars(results), options.json, report(console, results), options.check)


def trained(directory: Path) -> Path:
    """Train for two steps; return the run directory."""
    write_photos(directory / "training", TRAINING_IMAGES, size=SETS[SMALL][0])
    words = [
        *("data=image_folder", f"data.root={directory / 'training'}", f"data.image_size={SETS[SMALL][1]}"),
        *(f"model={MODEL}", "train.max_steps=2", "train.global_batch_size=32", "schedule.warmup_epochs=0"),
        *(f"run.storage={directory}", "run.name=run", "report.enabled=false"),
    ]
    subprocess.run([sys.executable, "-m", "ftexp.train", *words], check=True, stdout=subprocess.DEVNULL)
    return directory / "run"


def command(run: Path, out: Path) -> list[str]:
    """Return the command that predicts all images."""
    words = [f"run={run}", "data=image_folder", f"data.root={run.parent / 'images'}", f"out={out}"]
    return [sys.executable, "-m", "ftexp.predict", *words]


def measure_ours(run: Path, out: Path, num_images: int, results: Results) -> list[tuple[float, float]]:
    """Run the command; return samples of (share of the images written, MiB of all its processes)."""
    samples, began = [], time.perf_counter()
    with subprocess.Popen(command(run, out), stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            done = 1000 * len(list((out / "parts").glob("part_*"))) / num_images
            samples.append((done, memory_mib(process.pid)))
            time.sleep(0.5)
        assert process.stdout is not None
        printed = process.stdout.read()
    assert process.returncode == 0, printed
    results.command_s[OURS].append(time.perf_counter() - began)
    speed = re.search(r"speed +([\d,]+) images/s", printed)
    assert speed is not None, printed
    results.images_per_s[OURS].append(float(speed[1].replace(",", "")))
    return samples


def measure_loop(run: Path, directory: Path, results: Results) -> None:
    """Run the baseline."""
    (checkpoint,) = (path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("step"))
    words = [str(run), checkpoint, str(directory / "images"), str(directory / "loop.csv")]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, str(LOOP), *words], check=True, capture_output=True, text=True)
    results.command_s[LOOPS].append(time.perf_counter() - began)
    results.images_per_s[LOOPS].append(float(done.stdout))


def measure_kill(run: Path, directory: Path, num_images: int) -> dict[str, Any]:
    """Kill the command half-way, run it again, and compare its output with that of an undisturbed one."""
    import pyarrow.parquet as pq

    out, whole = directory / "killed", directory / "out_0"
    if not whole.exists():
        subprocess.run(command(run, whole), check=True, stdout=subprocess.DEVNULL)
    parts, half = out / "parts", num_images // 2000
    with subprocess.Popen(command(run, out), stdout=subprocess.DEVNULL) as process:
        while len(list(parts.glob("part_*"))) < half:
            assert process.poll() is None, "ended too early"
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("part_*")}
    subprocess.run(command(run, out), check=True, stdout=subprocess.DEVNULL)
    touched = [name for name, when in before.items() if (parts / name).stat().st_mtime_ns != when]
    found, expected = (pq.read_table(path / "parts") for path in (out, whole))
    paths = found["path"].to_pylist()
    return {
        "parts_before": len(before),
        "parts_made_again": len(touched),
        "images_twice": len(paths) - len(set(paths)),
        "images_missing": num_images - len(set(paths)),
        "rows_that_differ": sum(
            one != other for one, other in zip(found.to_pylist(), expected.to_pylist(), strict=True)
        ),
    }


def report(console: Console, results: Results) -> list[str]:
    """Print the tables; return a line for each target that is missed."""
    checks: list[Check] = []
    if results.memory_mib:
        table = Table("", "images/s", "least", "most", "whole command, s", "least", "most", box=None)
        for side in (OURS, LOOPS):
            speeds, seconds = figures(results.images_per_s[side]), figures(results.command_s[side])
            table.add_row(side, *(f"{speed:,.0f}" for speed in speeds), *(f"{value:.1f}" for value in seconds))
        console.print(table)
        text = ", ".join(f"{value:,.0f} MiB {title}" for title, value in results.memory_mib.items())
        console.print(f"most memory: {text}")
        ratio = statistics.median(quotients(results.images_per_s[OURS], results.images_per_s[LOOPS]))
        checks.append((f"images/s: {OURS} : {LOOPS}", ratio, 0.9, True))
        checks.append(("memory: late : early", results.memory_mib["late"] / results.memory_mib["early"], 1.1, False))
    if results.killed:
        console.print(f"killed half-way: {json.dumps(results.killed)}")
        wrong = sum(value for key, value in results.killed.items() if key != "parts_before")
        checks.append(("after a kill: made again, twice, missing, different", float(wrong), 0.0, False))
    return print_targets(console, checks)


if __name__ == "__main__":
    main()
