"""Compare the time of a step with each feature to that of the default run: `bench_train.py --features`.

In one Ray Train job of one worker, the plain run and one run per feature take turns in blocks of 10 steps. Feeding,
logging and saving are excluded. For the cost of comparing ranks, see bench_ranks.py.
"""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
import time
from typing import Any

from bench_checkpoint import run_job
from benching import composed, in_turns, quartiles, scratch_directory
from rich.console import Console
from rich.table import Table

PLAIN = "plain"
FEATURES = {
    PLAIN: [],
    "EMA": ["ema=warmup"],
    "clip_grad_norm": ["train.clip_grad_norm=1"],
    "clip_grad_value": ["train.clip_grad_value=1"],
    "clip_grad_agc": ["train.clip_grad_agc=0.02"],
    **{f"loss={name}": [f"loss={name}"] for name in ("bce", "focal", "asl", "poly")},
    "distill=logits, of a ResNet at 32 px": ["distill=logits"],
    "distill=features, likewise": ["distill=features"],
    "resizing=progressive, at half size": ["resizing=progressive", "+model.kwargs.dynamic_img_size=true"],
}
STEPS, BLOCKS = 10, 5  # steps per block; blocks per turn


def compare_features(console: Console, rounds: int) -> dict[str, list[float]]:
    """Measure `rounds` rounds and print the table; return {feature: ms per step of each block}."""
    settings = {"features": pickle.dumps(described(str(scratch_directory()))), "rounds": rounds}
    results: dict[str, list[float]] = run_job(["train.epochs=2000"], measure, settings, num_workers=1)
    report(console, results)
    return results


def described(storage: str) -> dict[str, Any]:
    """Train the teacher for one step; return {feature: (config, teacher)}."""
    from ftexp.driver.teacher import with_teacher
    from ftexp.storage.directory import Storage

    words = ["experiment=digits_resnet", "train.max_steps=1", "report.enabled=false", "run.name=teacher"]
    command = [sys.executable, "-m", "ftexp.train", *words, f"run.storage={storage}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = {}
    for name, overrides in FEATURES.items():
        taught = [f"distill.teacher={storage}/teacher"] if name.startswith("distill") else []
        config = composed("train.epochs=2000", "scaling.num_workers=1", *overrides, *taught)
        found[name] = with_teacher(config, Storage.at(storage, name))
    return found


def measure(settings: dict[str, Any]) -> dict[str, list[float]]:
    """Take turns on the worker; return the blocks of each feature."""
    from ftexp.job.build import build_job

    plain = pickle.loads(settings["spec"])
    jobs = {}
    for name, (config, teacher) in pickle.loads(settings["features"]).items():
        jobs[name] = build_job(dataclasses.replace(plain, config=config, teacher=teacher), {})
    batches = {name: job.data.feed.from_position(0) for name, job in jobs.items()}
    blocks: dict[str, list[float]] = {name: [] for name in jobs}
    for name in in_turns(jobs, settings["rounds"]):
        blocks[name] += turn(jobs[name], batches[name])
    for job in jobs.values():
        job.channel.close()
    return blocks


def turn(job: Any, batches: Any) -> list[float]:
    """Train for some blocks; return the milliseconds per step of each."""
    from ftexp.worker.loop import advance
    from ftexp.worker.step import train_step

    blocks = []
    for _ in range(1 + BLOCKS):
        some = [next(batches) for _ in range(STEPS)]
        began = time.perf_counter()
        for batch in some:
            train_step(job, batch)
            advance(job, batch)
        blocks.append(1000 * (time.perf_counter() - began) / STEPS)
    return blocks[1:]  # without the first block: caches are cold after another model


def report(console: Console, results: dict[str, list[float]]) -> None:
    """Print the table."""
    table = Table("", "ms a step: first quartile, median, third quartile", "more than plain, ms", box=None)
    plain_ms = quartiles(results[PLAIN])[0]
    for name, blocks in results.items():
        found = quartiles(blocks)
        more = "" if name == PLAIN else f"{found[0] - plain_ms:+.2f}"
        table.add_row(name, ", ".join(f"{each:.2f}" for each in found), more)
    console.print(table)
