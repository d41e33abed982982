"""Run many trials at once on a simulated cluster: do all finish, is nothing left, does the driver's memory stay low?

    uv run python scripts/stress_sweep.py [--trials 50] [--at-once 50] [--check] [--json FILE]

A trial is one step of the smallest model on generated images. The cluster is `ray.cluster_utils.Cluster` with two nodes
of one CPU each; a trial takes a fraction of a CPU. Prints the duration, the largest number of trials that ran at once,
how many placement groups and CPUs were not released, and the driver's memory early and late.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import ray
from benching import finish
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from rich.console import Console

_MB = 1 << 20
_SAMPLE_EVERY_S = 0.5
SMALL = [
    *("model.kwargs.depth=1", "data=synthetic", "data.num_samples=64", "data.image_size=8", "data.val_fraction=0.25"),
    *("train.max_steps=1", "train.epochs=1", "schedule.warmup_epochs=0", "train.global_batch_size=8"),
]


def main() -> None:
    """Run and watch the sweep on the cluster, and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--check", action="store_true", help="exit with 1 if anything is off")
    parser.add_argument("--json", type=Path, help="keep the numbers in this file")
    options = parser.parse_args()
    console = Console(highlight=False, width=120)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        found = watch(cluster.address, options.trials, options.at_once)
    finally:
        cluster.shutdown()
    for name, value in found.items():
        console.print(f"{name}: {value}")
    finish(console, found, options.json, problems(found, options.trials), options.check)


def watch(address: str, trials: int, at_once: int) -> dict[str, Any]:
    """Run the command, sampling its memory and the sweep record; then count the resources still held by the cluster."""
    storage = Path(tempfile.mkdtemp(prefix="stress_"))
    # a whole number of trials fits on each node
    cpus = 1 / -(-at_once // 2)
    words = [f"seed=range({trials})", *SMALL, f"run.storage={storage}", "sweep.name=stress"]
    words += [f"scaling.address={address}", "scaling.num_workers=1", "scaling.use_gpu=false"]
    words += [f"scaling.resources_per_worker={{CPU: {cpus:.4f}}}"]
    began = time.monotonic()
    ledger = storage / "sweeps" / "stress" / "sweep.json"
    memory, running, ended = [], 0, 0.0
    with subprocess.Popen([sys.executable, "-m", "ftexp.train", "-m", *words]) as process:
        while process.poll() is None:
            time.sleep(_SAMPLE_EVERY_S)
            if ledger.exists():
                statuses = [trial["status"] for trial in json.loads(ledger.read_text())["trials"]]
                running = max(running, statuses.count("running"))
                if statuses.count("finished") and (mb := resident_mb(process.pid)) is not None:
                    memory.append(mb)
        ended = time.monotonic() - began
    statuses = [trial["status"] for trial in json.loads(ledger.read_text())["trials"]]
    ray.init(address=address, log_to_driver=False)
    groups = [group["state"] for group in placement_group_table().values()]
    free = ray.available_resources().get("CPU", 0) - ray.cluster_resources()["CPU"]
    ray.shutdown()
    return {
        "exit code": process.returncode,
        "finished": statuses.count("finished"),
        "seconds": round(ended, 1),
        "most at once": running,
        "placement groups left": len(groups) - groups.count("REMOVED"),
        "CPUs not given back": round(-free, 3),
        "driver MB, first and last quarter": quarters(memory),
    }


def resident_mb(pid: int) -> float | None:
    """Return a process's resident memory in MiB; None once it has exited."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MB
    except OSError:
        return None


def quarters(values: list[float]) -> tuple[float, float]:
    """Return the means of the first and of the last quarter of the samples."""
    size = max(1, len(values) // 4)
    first, last = values[:size], values[-size:]
    return round(sum(first) / size, 1), round(sum(last) / size, 1)


def problems(found: dict[str, Any], trials: int) -> list[str]:
    """Return a line for each failed check."""
    first, last = found["driver MB, first and last quarter"]
    return [
        text
        for text, is_off in (
            (f"finished: {found['finished']} of {trials}", found["finished"] != trials),
            (f"exit code {found['exit code']}", found["exit code"] != 0),
            (f"placement groups left: {found['placement groups left']}", found["placement groups left"] > 0),
            (f"CPUs not given back: {found['CPUs not given back']}", found["CPUs not given back"] > 0),
            (f"the driver grew from {first} to {last} MB", last > 1.1 * first),
        )
        if is_off
    ]


if __name__ == "__main__":
    main()
