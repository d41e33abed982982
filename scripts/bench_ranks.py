"""Measure the cost of each comparison of ranks: stragglers, replicas of the weights, steps computed twice.

    uv run python scripts/bench_ranks.py [--rounds 20] [--blocks 10] [--check] [--json FILE]

One Ray Train job of two workers trains the default model in blocks of 10 steps. A block has one logged point, and one
check of the replicas or one repeated step if that is enabled. None of the three and each alone take turns. Takes
4 minutes on 2 cores.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
from typing import Any

from bench_checkpoint import run_job
from benching import Check, describe_machine, finish, in_turns, options_parser, print_targets, quartiles
from rich.console import Console
from rich.table import Table

PLAIN, STRAGGLERS, REPLICAS, REPEAT = "plain", "straggler_factor", "check_replicas_every_steps", "repeat_step_every"
LOG_EVERY = 10  # steps between logged points, checks of the replicas, and repeated steps
_MAX_COST = 0.005  # share of a step, for detecting stragglers


def main() -> None:
    """Measure, print the table, and exit with 1 under --check if detecting stragglers costs too much."""
    parser = options_parser(__doc__, 20, "turns of each side")
    parser.add_argument("--blocks", type=int, default=10, help="of a turn")
    options = parser.parse_args()
    console = Console(highlight=False, width=160)
    describe_machine(console)
    overrides = ["train.epochs=2000", f"train.log_every_steps={LOG_EVERY}"]
    results = run_job(overrides, measure, {"rounds": options.rounds, "blocks": options.blocks})
    misses = report(console, results)
    finish(console, results, options.json, misses, options.check)


def measure(settings: dict[str, Any]) -> dict[str, list[float]]:
    """Take turns on each worker; return the blocks of each side on this rank."""
    from ftexp.job.build import build_job

    job = build_job(pickle.loads(settings["spec"]), {})
    batches = job.data.feed.from_position(0)
    sides: dict[str, list[float]] = {PLAIN: [], STRAGGLERS: [], REPLICAS: [], REPEAT: []}
    turn(job, batches, PLAIN, settings["blocks"])  # not counted: the first steps also allocate memory
    for side in in_turns(sides, settings["rounds"]):
        sides[side] += turn(job, batches, side, settings["blocks"])
    job.channel.close()
    return sides


def turn(job: Any, batches: Any, side: str, num_blocks: int) -> list[float]:
    """Train for some blocks; return the milliseconds per step of each."""
    from ftexp.worker.corruption import ReplicaCheck, StepRepeat
    from ftexp.worker.log import log_train
    from ftexp.worker.loop import advance
    from ftexp.worker.ranks import RankTimes
    from ftexp.worker.step import train_step

    failure = dataclasses.replace(
        job.config.failure,
        check_replicas_every_steps=LOG_EVERY if side == REPLICAS else None,
        repeat_step_every=LOG_EVERY if side == REPEAT else None,
    )
    factor = job.config.scaling.straggler_factor if side == STRAGGLERS else None
    scaling = dataclasses.replace(job.config.scaling, straggler_factor=factor)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, failure=failure, scaling=scaling))
    replicas, repeat, ranks = ReplicaCheck(job), StepRepeat(job), RankTimes(job)
    blocks = []
    for _ in range(1 + num_blocks):
        began = time.perf_counter()
        for _ in range(LOG_EVERY):
            batch = next(batches)
            train_step(job, batch, repeat)
            advance(job, batch)
            if job.progress.step % LOG_EVERY == 0:
                log_train(job, ranks)
            replicas.check(saves=False)
        blocks.append(1000 * (time.perf_counter() - began) / LOG_EVERY)
    ranks.stop()
    return blocks[1:]  # in the first block, RankTimes has a hook on every gradient to find the last one


def report(console: Console, results: dict[str, list[float]]) -> list[str]:
    """Print the tables; return a line for each target that is missed."""
    table = Table("", "ms a step: first quartile, median, third quartile", ": plain, by first quartiles", box=None)
    found = {side: quartiles(blocks) for side, blocks in results.items()}
    shares = {side: each[0] / found[PLAIN][0] for side, each in found.items()}
    for side, each in found.items():
        title = side if side in (PLAIN, STRAGGLERS) else f"{side}={LOG_EVERY}"
        table.add_row(title, ", ".join(f"{ms:.2f}" for ms in each), f"{shares[side]:.4f}")
    console.print(table)
    checks: list[Check] = [("stragglers, share of a step", shares[STRAGGLERS] - 1, _MAX_COST, False)]
    return print_targets(console, checks, digits=4)


if __name__ == "__main__":
    main()
