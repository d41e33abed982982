"""What snapshots in memory cost, side by side: steps per second with failure.memory_every_steps=auto, and with 0.

    uv run python scripts/bench_snapshots.py [--rounds 5] [--window 30] [--check] [--json FILE]

In one Ray Train job of two workers a model: windows of training take turns, one with snapshots as often as `auto` takes
them, and one without. The default model, and ViT-S (22 million parameters with AdamW). Takes 12 minutes on 2 cores.
"""

from __future__ import annotations

import pickle
import statistics
import time
from typing import Any

from bench_checkpoint import MODELS, run_job, steps
from benching import Check, describe_machine, figures, finish, options_parser, print_targets, quotients
from rich.console import Console
from rich.table import Table

_MAX_COST = 0.01  # share of the steps per second


def main() -> None:
    """Measure, print tables, and exit with 1 under --check if a target is missed."""
    parser = options_parser(__doc__, 5, "pairs of windows")
    parser.add_argument("--window", type=float, default=30.0, help="seconds of training in a window")
    options = parser.parse_args()
    console = Console(highlight=False, width=160)
    describe_machine(console)
    results = {}
    for name, overrides in MODELS.items():
        settings = {"rounds": options.rounds, "window_s": options.window}
        results[name] = run_job(overrides, measure, settings)
        console.print(f"{name}: measured")
    misses = report(console, results)
    finish(console, results, options.json, misses, options.check)


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """On each worker: take turns, and return rank 0's figures."""
    from ftexp.checkpoint.build import build_manager
    from ftexp.checkpoint.memory.links import RayLinks
    from ftexp.checkpoint.store import CHECKPOINTS, CheckpointStore
    from ftexp.job.build import build_job
    from ftexp.storage.directory import Storage

    spec = pickle.loads(settings["spec"])
    job = build_job(spec, {})
    store = CheckpointStore(Storage(spec.run_uri).child(CHECKPOINTS))
    checkpoints = build_manager(job, store, RayLinks())
    checkpoints.begin_snapshots()
    batches = job.data.feed.from_position(0)
    snapshots = checkpoints._snapshots
    assert snapshots is not None
    while snapshots._num_taken < 3:  # the first ones also touch new memory
        step(job, batches, checkpoints)
    sides: dict[str, list[dict[str, float]]] = {"auto": [], "off": []}
    for number in range(settings["rounds"]):
        for side in list(sides)[:: -1 if number % 2 else 1]:  # neither side is always the first
            sides[side].append(window(job, batches, checkpoints if side == "auto" else None, settings["window_s"]))
    checkpoints.close()
    job.channel.close()
    room = snapshots._room
    return {
        **sides,
        "bytes": room.reserved.node_bytes if room is not None else None,
        "interval": snapshots._pace.interval,
    }


def window(job: Any, batches: Any, checkpoints: Any, seconds: float) -> dict[str, float]:
    """Train for about `seconds`; steps per second, and the number of snapshots, the first after half an interval."""
    pace = checkpoints._snapshots._pace if checkpoints is not None else None
    if pace is not None:
        pace.postpone(job.progress.step)
        pace._due_at = job.progress.step + job.group.agree(1 + pace.interval // 2)
    taken = checkpoints._snapshots._num_taken if checkpoints is not None else 0
    began, cpu_began, count = time.perf_counter(), time.process_time(), 0
    while job.group.agree(int(time.perf_counter() - began < seconds)):
        step(job, batches, checkpoints)
        count += 1
    rate = count / (time.perf_counter() - began)
    # CPU time of all threads of rank 0, which writes the snapshots: what else the machine does changes it less
    cpu_s = (time.process_time() - cpu_began) / count
    taken = (checkpoints._snapshots._num_taken if checkpoints is not None else 0) - taken
    return {"steps_per_s": rate, "cpu_s": cpu_s, "snapshots": taken}


def step(job: Any, batches: Any, checkpoints: Any) -> None:
    """Take an optimiser step, and a snapshot if one is due."""
    steps(job, batches, 1)
    if checkpoints is not None and checkpoints.snapshot_due():
        checkpoints.take_snapshot(time.perf_counter())


def report(console: Console, results: dict[str, dict[str, Any]]) -> list[str]:
    """Print the tables; returns a line for each target that is missed."""
    titles = ("steps/s", "auto", "off", "auto : off", "CPU-s, auto : off", "snapshots", "MB of the node")
    table = Table(*titles, box=None)
    checks: list[Check] = []
    for name, result in results.items():
        rates = {side: [each["steps_per_s"] for each in result[side]] for side in ("auto", "off")}
        # each window against its own neighbour: the machine's speed drifts
        kept = quotients(rates["auto"], rates["off"])
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*figures(each)) for each in rates.values()]
        cells.append("{:.4f} ({:.4f} to {:.4f})".format(*figures(kept)))
        cpu = quotients(*([each["cpu_s"] for each in result[side]] for side in ("auto", "off")))
        cells.append("{:.4f} ({:.4f} to {:.4f})".format(*figures(cpu)))
        count = sum(int(each["snapshots"]) for each in result["auto"])
        table.add_row(name, *cells, f"{count}, every {result['interval']} steps", f"{result['bytes'] / 1e6:,.1f}")
        checks.append((f"steps/s, auto : off, {name}", statistics.median(kept), 1 - _MAX_COST, True))
    console.print(table)
    return print_targets(console, checks, digits=4)


if __name__ == "__main__":
    main()
