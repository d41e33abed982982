"""Compare recovery times: from the SIGKILL of a worker to the first new step, one that had not been done before.

    uv run python scripts/bench_recovery.py [--rounds 5] [--check] [--json FILE]

Sides: ftexp (replacing the worker; with in-memory snapshots every ten steps; without snapshots; without snapshots and
hot start), a script like Ray Train's tutorials, and a DDP loop under torchrun with --max-restarts and a checkpoint at
the end of each epoch. Model, data, batch and the two workers are the same; the sides take turns, and the worker is
killed ten steps after the second epoch. Start-up is measured from the command to the first step: with its own Ray as
above, and on a cluster that stays up between runs, excluding the first run. Five rounds take 19 minutes on 2 cores, two
rounds 8.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_train import BASELINES, BATCH, WORKERS
from benching import default_recipe, describe_machine, finish, options_parser, print_targets, scratch_directory
from rich.console import Console
from rich.table import Table

REPLACED, MEMORY, FTEXP = "ftexp, replace", "ftexp, memory", "ftexp, storage"
COLD = "ftexp, hot_start=off"
_OF_FTEXP = (REPLACED, MEMORY, FTEXP, COLD)
TUTORIAL, TORCHRUN = "tutorial", "torchrun"
SNAPSHOT_EVERY = 10  # steps
EPOCHS, KILL_EPOCH, KILL_STEP = 8, 2, 10
_DEADLINE_S = 180.0
# a step that is logged earlier after the kill may be one that the surviving worker was still finishing
_DYING_S = 0.5
# phases of a start: imports, config, data and Ray; workers; model, data and restore; the first step
START_PHASES = {"command_started": "start_ray_s", "attempt_started": "start_workers_s", "ready": "start_model_s"}
FIRST_STEP = "start_first_step_s"
PHASES = ("seconds_to_detect", "seconds_to_restart", "seconds_to_restore", "seconds_to_new_step")
Note = tuple[float, int, int, int, int]  # time, rank, pid, epoch, step within it (from 1)


def main() -> None:
    """Measure, print a table, and exit with 1 under --check if a target is missed."""
    options = options_parser(__doc__, 2, "recoveries of each side").parse_args()
    console = Console(highlight=False, width=120)
    describe_machine(console)
    settings = {"epochs": EPOCHS, "global_batch_size": BATCH, "num_workers": WORKERS, "seed": 0, **default_recipe()}
    sides: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
        REPLACED: lambda _: ftexp("auto", recovery="replace"), MEMORY: lambda _: ftexp("auto", SNAPSHOT_EVERY),
        FTEXP: lambda _: ftexp("auto"), TUTORIAL: tutorial,
        TORCHRUN: torchrun, COLD: lambda _: ftexp("off"),
    }  # fmt: skip
    results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side, measure in sides.items():
            results[side].append(measure(settings))
            console.print(f"round {number + 1}: {side}: {results[side][-1]}")
    starts = starts_on_a_live_cluster(options.rounds)
    misses = report(console, results, starts)
    finish(console, {**results, "live cluster": starts}, options.json, misses, options.check)


def ftexp(
    hot_start: str, snapshot_every: int = 0, address: str | None = None, recovery: str = "restart"
) -> dict[str, float]:
    """Measure the command with the default config, shortened; with an `address`, only up to its first step."""
    storage = scratch_directory()
    words = [f"run.storage={storage}", "run.name=bench", f"train.epochs={EPOCHS}", "train.log_every_steps=1"]
    words += [f"failure.memory_every_steps={snapshot_every}", f"failure.recovery={recovery}"]
    if address is not None:
        words += [f"scaling.address={address}", f"scaling.num_workers={WORKERS}", "scaling.use_gpu=false"]
    command = [sys.executable, "-m", "ftexp.train", *words, f"scaling.hot_start={hot_start}"]

    def notes() -> list[Note]:
        lines = _lines(storage / "bench" / "metrics.jsonl")
        points = [point for point in lines if point["split"] == "train"]
        ready = [event for event in _lines(storage / "bench" / "events.jsonl") if event["event"] == "ready"]
        per_epoch = next((point["step"] for point in lines if point["split"] == "val"), 1 << 30)
        return [
            (point["time"], 1, ready[-1]["pids"][1], *divmod(point["step"] - 1, per_epoch)) for point in points if ready
        ]

    found = _measure(command, notes, shift=1, kills=address is None)
    events = _lines(storage / "bench" / "events.jsonl")
    found |= _start_phases(events, found["began"], found["first_step_s"])
    for event in events:
        if event["event"] == "recovered":
            wanted = "memory" if snapshot_every else "storage"
            # a kill while the ranks agree between steps restarts all workers, even with failure.recovery=replace
            assert recovery == "replace" or event["recovery"] == wanted, (
                f"recovery is {event['recovery']}, not {wanted}"
            )
            found |= {key: event[key] for key in (*PHASES, "steps_replayed")}
            found["replaced"] = float(event["recovery"] == "replaced")
    return found


def starts_on_a_live_cluster(rounds: int) -> dict[str, list[float]]:
    """Return seconds from the command to its first step on a running Ray, after an earlier run on it."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # as ftexp/cluster/README.md recommends for a cluster
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": WORKERS, "include_dashboard": False})
    try:
        ftexp("auto", address=cluster.address)
        sides: dict[str, list[float]] = {"auto": [], "off": []}
        for _ in range(rounds):
            for hot_start, found in sides.items():
                found.append(ftexp(hot_start, address=cluster.address)["first_step_s"])
    finally:
        cluster.shutdown()
    return sides


def tutorial(settings: dict[str, Any]) -> dict[str, float]:
    """Measure Ray Train as its tutorials use it."""
    path = scratch_directory() / "notes"
    command = [sys.executable, str(BASELINES / "tutorial.py"), json.dumps({**settings, "notes": str(path)})]
    return _measure(command, lambda: [tuple(line) for line in _lines(path)])


def torchrun(settings: dict[str, Any]) -> dict[str, float]:
    """Measure a DDP loop that torchrun restarts."""
    directory = scratch_directory()
    given = {**settings, "notes": str(directory / "notes"), "checkpoint": str(directory / "checkpoint.pt")}
    words = ["--standalone", "--nproc-per-node", str(WORKERS), "--max-restarts", "3"]
    script = [str(BASELINES / "torchrun_ddp.py"), json.dumps(given)]
    command = [sys.executable, "-m", "torch.distributed.run", *words, *script]
    return _measure(command, lambda: [tuple(line) for line in _lines(directory / "notes")])


def _measure(
    command: list[str], notes: Callable[[], list[Any]], shift: int = 0, kills: bool = True
) -> dict[str, float]:
    """Start the command, kill rank 1 at the chosen step, wait for a new step; then stop everything."""
    environment = {**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "OMP_NUM_THREADS": "1"}
    began = time.time()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            place = (KILL_EPOCH, KILL_STEP - shift) if kills else (0, 0)
            seen = _until(process, lambda: [n for n in notes() if n[1] == 1 and (n[3], n[4]) >= place])
            first_step = min(note[0] for note in notes()) - began
            if not kills:
                return {"began": began, "first_step_s": first_step}
            killed_at = time.time()
            os.kill(seen[-1][2], signal.SIGKILL)
            again = _until(process, lambda: _new_steps(notes(), killed_at + _DYING_S))
            return {"began": began, "recovery_s": again[0][0] - killed_at, "first_step_s": first_step}
        finally:
            if process.poll() is None:  # else _until's error about its exit must be seen, not ProcessLookupError
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _start_phases(events: list[Any], began: float, first_step_s: float) -> dict[str, float]:
    """Split the time from the start of the command, at `began`, to its first step into phases."""
    phases, before = {}, began
    for name, phase in START_PHASES.items():
        at = next(event["time"] for event in events if event["event"] == name)
        phases[phase], before = at - before, at
    return {**phases, FIRST_STEP: began + first_step_s - before}


def _new_steps(notes: list[Note], stopped_at: float) -> list[Note]:
    """Return the notes after `stopped_at` of steps that had not been done by then."""
    farthest = max(note[3:] for note in notes if note[0] <= stopped_at)
    return [note for note in notes if note[0] > stopped_at and note[3:] > farthest]


def _until(process: subprocess.Popen[bytes], found: Callable[[], list[Any]]) -> list[Any]:
    end = time.monotonic() + _DEADLINE_S
    while not (result := found()):
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        assert time.monotonic() < end, f"{process.args} took too long"
        time.sleep(0.02)
    return result


def _lines(path: Path) -> list[Any]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def report(console: Console, results: dict[str, list[dict[str, float]]], starts: dict[str, list[float]]) -> list[str]:
    """Print the tables; return a line for each target that is missed."""
    table = Table("", *results, box=None)
    medians: dict[str, dict[str, float]] = {}
    for key, title in (("recovery_s", "kill to first new step, s"), ("first_step_s", "command to first step, s")):
        values = {side: [run[key] for run in runs] for side, runs in results.items()}
        medians[key] = {side: statistics.median(found) for side, found in values.items()}
        cells = [f"{statistics.median(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in values.values()]
        table.add_row(title, *cells)
    console.print(table)
    table = Table("of ftexp's starts and recoveries", *(side for side in _OF_FTEXP if side in results), box=None)
    for key in (*START_PHASES.values(), FIRST_STEP, *PHASES, "steps_replayed", "replaced"):
        values = [[run[key] for run in results[side] if key in run] for side in _OF_FTEXP]
        cells = [f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" if v else "" for v in values]
        table.add_row(key.replace("_", " "), *cells)
    console.print(table)
    table = Table("on a cluster that lives on, command to first step, s", "", box=None)
    for hot_start, values in starts.items():
        cell = f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        table.add_row(f"scaling.hot_start={hot_start}", cell)
    console.print(table)
    recovery, first_step = medians["recovery_s"], medians["first_step_s"]
    sides = ((TUTORIAL, 0.35), (TORCHRUN, 0.75))
    checks = [
        (f"recovery, ftexp : {side}", recovery[FTEXP] / recovery[side], maximum, False) for side, maximum in sides
    ]
    replayed = max(run.get("steps_replayed", 0) for run in results[MEMORY])
    checks += [
        ("recovery by replacing, the slowest, s", max(run["recovery_s"] for run in results[REPLACED]), 1.0, False),
        ("steps replayed by replacing", max(run.get("steps_replayed", 0) for run in results[REPLACED]), 0, False),
        ("recovery from memory, s", recovery[MEMORY], 1.5, False),
        ("steps replayed from memory", replayed, SNAPSHOT_EVERY, False),
        (f"command to first step, ftexp : {TORCHRUN}", first_step[FTEXP] / first_step[TORCHRUN], 1.0, False),
    ]
    return print_targets(console, checks)


if __name__ == "__main__":
    main()
