"""Measure the cost of in-memory snapshots: blocks of steps with one snapshot and with none take turns.

    uv run python scripts/bench_snapshots.py [--rounds 40] [--steps 8] [--check] [--json FILE]

Models: the default one, and ViT-S (22 million parameters with AdamW); one Ray Train job of two workers each. A block
with a snapshot ends once the snapshot is complete; the time that it takes longer than a block without one is the cost
of a snapshot. The cost is also given as a share of the steps between two snapshots, at the interval that
`failure.memory_every_steps=auto` chooses. Blocks are compared by first quartiles, as in bench_ranks.py. The same
comparison among blocks without a snapshot gives the resolution. Takes 10 minutes on 2 cores.
"""

from __future__ import annotations

import pickle
import statistics
import time
from typing import Any

from bench_checkpoint import MODELS, run_job, steps
from benching import Check, describe_machine, finish, in_turns, options_parser, print_targets, quartiles
from rich.console import Console
from rich.table import Table

WITH, WITHOUT = "a snapshot", "none"
_MAX_COST = 0.01  # share of a step
_MAX_RESOLVED = _MAX_COST / 2  # above it, the machine was too busy for a result
_TURNS = {"default ViT": 6}  # blocks of a side per round, for models with short blocks


def main() -> None:
    """Measure, print tables, and exit with 1 under --check if a target is missed."""
    parser = options_parser(__doc__, 40, "turns of each side")
    parser.add_argument("--steps", type=int, default=8, help="of a block")
    options = parser.parse_args()
    console = Console(highlight=False, width=160)
    describe_machine(console)
    results = {}
    for name, overrides in MODELS.items():
        settings = {"blocks": options.rounds * _TURNS.get(name, 1), "steps": options.steps}
        results[name] = run_job(overrides, measure, settings)
        console.print(f"{name}: measured")
    misses = report(console, results)
    finish(console, results, options.json, misses, options.check)


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Take turns on each worker; return the figures of this rank."""
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
    sides: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    intervals = []
    for side in in_turns(sides, settings["blocks"]):
        sides[side].append(block(job, batches, checkpoints, settings["steps"], takes=side == WITH))
        intervals.append(snapshots._pace.interval)
    taken = snapshots._num_taken
    checkpoints.close()
    job.channel.close()
    room = snapshots._room
    return {
        **sides,
        "steps": settings["steps"],
        "interval": statistics.median(intervals),
        "snapshots": taken - 3,
        "bytes": room.reserved.node_bytes if room is not None else None,
    }


def block(job: Any, batches: Any, checkpoints: Any, num_steps: int, takes: bool) -> float:
    """Train for some steps, with a snapshot after the first if `takes`; return seconds until both are done."""
    snapshots = checkpoints._snapshots
    job.group.agree(0)  # ranks start together
    began = time.perf_counter()
    for number in range(num_steps):
        if takes:
            snapshots._pace._due_at = job.progress.step + 1 if number == 0 else job.progress.step + num_steps + 1
            step(job, batches, checkpoints)
        else:
            steps(job, batches, 1)
    if takes and snapshots._thread is not None:
        snapshots._thread.join()
    job.group.agree(0)
    return time.perf_counter() - began


def step(job: Any, batches: Any, checkpoints: Any) -> None:
    """Take an optimiser step, and a snapshot if one is due."""
    steps(job, batches, 1)
    if checkpoints.snapshot_due():
        checkpoints.take_snapshot(time.perf_counter())


def report(console: Console, results: dict[str, dict[str, Any]]) -> list[str]:
    """Print the tables; return a line for each target that is missed."""
    sides = [f"ms a step, {side}: quartiles" for side in (WITH, WITHOUT)]
    titles = ("", *sides, "ms of a snapshot", "every", "share of a step", "none : none", "snapshots", "MB of the node")
    table = Table(*titles, box=None)
    checks: list[Check] = []
    for name, result in results.items():
        num_steps, interval, plain = result["steps"], result["interval"], result[WITHOUT]
        found = {side: quartiles(result[side]) for side in (WITH, WITHOUT)}
        step_s = found[WITHOUT][0] / num_steps
        cost_s = found[WITH][0] - found[WITHOUT][0]
        firsts = [quartiles(half)[0] for half in (plain[::2], plain[1::2])]
        share, resolved = (seconds / (interval * step_s) for seconds in (cost_s, abs(firsts[0] - firsts[1])))
        cells = [", ".join(f"{1000 * each / num_steps:.2f}" for each in side) for side in found.values()]
        cells += [f"{1000 * cost_s:.2f}", f"{interval:g} steps", f"{share:.4f}", f"{resolved:.4f}"]
        table.add_row(name, *cells, str(result["snapshots"]), f"{result['bytes'] / 1e6:,.1f}")
        checks.append((f"share of a step, {name}", share, _MAX_COST, False))
        checks.append((f"none : none, {name}", resolved, _MAX_RESOLVED, False))
    console.print(table)
    return print_targets(console, checks, digits=4)


if __name__ == "__main__":
    main()
