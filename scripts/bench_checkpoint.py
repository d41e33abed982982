"""Compare the cost of a checkpoint to training: ftexp's, and the blocking checkpoint of Ray Train's tutorials.

    uv run python scripts/bench_checkpoint.py [--sharded] [--rounds 5] [--window 20] [--check] [--json FILE]

Models: the default one, and ViT-S (22 million parameters with AdamW); one Ray Train job of two workers each. Both sides
save the same training state in turns; "blocked" is how long one checkpoint blocks the training thread of rank 0. ViT-S:
then windows of training take turns, one with a checkpoint every 5 s and one without. Default model: the time from a
start at a position to the first batch, at near and far positions. Takes 8 minutes on 2 cores.

--sharded: instead, compare checkpoints of sharded models with torch's own distributed save; see sharded_saves.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benching import Check, composed, describe_machine, finish, options_parser, print_targets, scratch_directory
from rich.console import Console
from rich.table import Table

SAVE_EVERY_S = 5.0
MODELS = {
    "default ViT": ["train.epochs=2000"],
    "ViT-S": [
        *(
            "model=vit_small",
            "++model.kwargs.patch_size=8",
            "data=synthetic",
            "data.image_size=32",
            "data.num_samples=512",
        ),
        *("train.global_batch_size=16", "train.epochs=2000"),
    ],
}


def main() -> None:
    """Measure, print tables, and exit with 1 under --check if a target is missed."""
    parser = options_parser(__doc__, 5, "saves of each side, and pairs of windows")
    parser.add_argument("--window", type=float, default=20.0, help="seconds of training in a window")
    parser.add_argument("--sharded", action="store_true", help="saves of sharded models, next to torch's own")
    options = parser.parse_args()
    console = Console(highlight=False, width=120)
    describe_machine(console)
    if options.sharded:
        compare_sharded(console, options)
        return
    results = {}
    for name, overrides in MODELS.items():
        window_s = options.window if name == "ViT-S" else 0
        results[name] = run_job(overrides, measure, {"rounds": options.rounds, "window_s": window_s})
        console.print(f"{name}: measured")
    misses = report(console, results)
    finish(console, results, options.json, misses, options.check)


def compare_sharded(console: Console, options: Any) -> None:
    """Measure checkpoints of sharded models, print tables, and exit with 1 under --check if a target is missed."""
    import sharded_saves

    results = sharded_saves.measured(options.rounds)
    table = Table("one save, ms blocked (slowest of 4 workers)", "ftexp", "torch save", "torch async_save", box=None)
    checks = sharded_saves.report(results, table, _spread)
    console.print(table)
    finish(console, results, options.json, print_targets(console, checks, digits=4), options.check)


def run_job(
    overrides: list[str], measuring: Callable[[dict[str, Any]], Any], settings: dict[str, Any], num_workers: int = 2
) -> Any:
    """Start Ray and a keeper of snapshots, run `measuring` in one Ray Train job, stop Ray; return rank 0's result."""
    from ftexp.cluster import ray_private
    from ftexp.cluster.ray_cluster import prepare_environment, quiet_data, start_ray
    from ftexp.cluster.resources import decide_workers

    storage = str(scratch_directory())
    words = [*overrides, f"run.storage={storage}", "checkpoint.every_epochs=null", f"scaling.num_workers={num_workers}"]
    config = composed(*words)
    prepare_environment(config)
    host = start_ray(config).host
    quiet_data(config)
    try:
        import ray
        from ray.train import DataConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from ftexp.checkpoint.memory.links import start_keepers
        from ftexp.data.build import build_data
        from ftexp.job.spec import JobSpec
        from ftexp.storage.directory import Storage
        from ftexp.wire.hub import Hub
        from ftexp.wire.messages import Begin, Sync, Synced

        workers, bundle = decide_workers(config.scaling), build_data(config.data)
        hub = Hub(host, lambda message: Synced(message.number) if isinstance(message, Sync) else Begin(attempt=1))
        spec = JobSpec(config, bundle.info, "bench", Storage.at(storage, "bench").uri, {}, hub.address)
        trainer = TorchTrainer(
            measuring,
            train_loop_config={"spec": pickle.dumps(spec), **settings},
            scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker=workers.resources_per_worker),
            run_config=RunConfig(name="bench", storage_path=storage),
            datasets=bundle.datasets,
            dataset_config=DataConfig(datasets_to_split=[]),
        )
        kept = start_keepers([ray.get_runtime_context().get_node_id()], None, {})
        result = ray_private.fitted(trainer).return_value
        hub.close()
        del kept  # Ray ends an actor when its last handle is gone
        return result
    finally:
        ray.shutdown()


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Take turns on each worker; return the times of this rank."""
    from ftexp.checkpoint.build import build_manager
    from ftexp.checkpoint.store import CHECKPOINTS, CheckpointStore
    from ftexp.job.build import build_job
    from ftexp.storage.directory import Storage

    spec = pickle.loads(settings["spec"])
    job = build_job(spec, {})
    store = CheckpointStore(Storage(spec.run_uri).child(CHECKPOINTS))
    checkpoints = build_manager(job, store)
    batches = job.data.feed.from_position(0)
    result: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in job.learner.model.parameters())}
    steps(job, batches, 3)
    ours, theirs, cpu = [], [], []
    for number in range(settings["rounds"] + 1):
        steps(job, batches, 3)
        began, cpu_began = time.perf_counter(), time.process_time()
        checkpoints.save()
        ours.append(time.perf_counter() - began)
        checkpoints.wait()
        cpu.append(time.process_time() - cpu_began)
        steps(job, batches, 3)
        began = time.perf_counter()
        tutorial_save(job, number)
        theirs.append(time.perf_counter() - began)
    # without the first checkpoint of each side, which allocates memory and sets up Ray
    result["ftexp_s"], result["tutorial_s"], result["ftexp_first_s"] = ours[1:], theirs[1:], ours[0]
    result["ftexp_cpu_s"] = cpu[1:]  # all threads of rank 0, which trains nothing meanwhile
    if settings["window_s"]:
        config = dataclasses.replace(job.config.checkpoint, every_seconds=SAVE_EVERY_S)
        job = dataclasses.replace(job, config=dataclasses.replace(job.config, checkpoint=config))
        saving = build_manager(job, store)
        pairs = [
            [window(job, batches, saving if saves else None, settings["window_s"]) for saves in (True, False)]
            for _ in range(settings["rounds"])
        ]
        result["saving"], result["not_saving"] = zip(*pairs, strict=True)
    else:
        result["first_batch_s"] = first_batches(job)
    job.channel.close()
    return result


def steps(job: Any, batches: Any, count: int) -> None:
    """Take `count` optimiser steps."""
    from ftexp.worker.loop import advance
    from ftexp.worker.step import train_step

    for _ in range(count):
        batch = next(batches)
        train_step(job, batch)
        advance(job, batch)


def window(job: Any, batches: Any, checkpoints: Any, seconds: float) -> dict[str, Any]:
    """Train for about `seconds`, saving when `checkpoints` is due; return steps per second and the times of the saves.

    Training continues until a checkpoint in flight is complete, so that its whole cost falls into this window.
    """
    began, count, saves = time.perf_counter(), 0, []
    while job.group.agree(int(time.perf_counter() - began < seconds or (checkpoints is not None and checkpoints.busy))):
        steps(job, batches, 1)
        count += 1
        if checkpoints is not None and checkpoints.due(False):
            checkpoints.save()
            saves.append(round(time.perf_counter() - began, 1))
    return {"steps_per_s": count / (time.perf_counter() - began), "saves": saves}


def tutorial_save(job: Any, number: int) -> None:
    """Save as Ray's tutorials do at the end of an epoch: torch.save into a temporary directory, a blocking report."""
    import ray.train
    import torch

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = None
        if job.group.rank == 0:
            torch.save(job.learner.model.state_dict(), Path(directory) / "model.pt")
            torch.save(job.learner.optimizer.state_dict(), Path(directory) / "optimizer.pt")
            torch.save({"epoch": number}, Path(directory) / "extra_state.pt")
            checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"epoch": number}, checkpoint=checkpoint)


def first_batches(job: Any) -> dict[str, list[float]]:
    """Return the seconds from a start of the feed at a position to its first batch; the positions take turns."""
    samples = len(job.data.rows["train"])
    places = {"position 0": 0, "half an epoch": samples // 2, "epoch 1,000": 1000 * samples + 7}
    times: dict[str, list[float]] = {name: [] for name in places}
    for _ in range(30):
        for name, position in places.items():
            began = time.perf_counter()
            with contextlib.closing(job.data.feed.from_position(position)) as batches:
                next(batches)
            times[name].append(time.perf_counter() - began)
    return times


def report(console: Console, results: dict[str, dict[str, Any]]) -> list[str]:
    """Print the tables; return a line for each target that is missed."""
    table = Table("one save, ms blocked", "ftexp", "tutorial", "ratio", "CPU-s of ftexp's", box=None)
    checks: list[Check] = []
    for name, result in results.items():
        ratio = statistics.median(result["ftexp_s"]) / statistics.median(result["tutorial_s"])
        cells = (_spread(result["ftexp_s"], 1e3), _spread(result["tutorial_s"], 1e3), f"{ratio:.4f}")
        cells = (*cells, _spread(result["ftexp_cpu_s"], 1))
        table.add_row(f"{name}, {result['parameters'] / 1e6:.1f} M parameters", *cells)
        checks.append((f"blocked, ftexp : tutorial, {name}", ratio, 0.1, False))
    console.print(table)
    windows = results["ViT-S"]
    rates = [[one["steps_per_s"] for one in windows[side]] for side in ("saving", "not_saving")]
    saves = sum(len(one["saves"]) for one in windows["saving"])
    table = Table("ViT-S, steps/s", f"a save every {SAVE_EVERY_S:.0f} s ({saves} saves)", "no save", "ratio", box=None)
    # the ratio within each pair of windows, because the speed of the machine drifts
    kept = statistics.median(one / other for one, other in zip(*rates, strict=True))
    table.add_row("median (range)", _spread(rates[0], 1), _spread(rates[1], 1), f"{kept:.3f}")
    console.print(table)
    checks.append((f"throughput with a save every {SAVE_EVERY_S:.0f} s", kept, 0.97, True))
    table = Table("resuming at", "ms to the first batch", box=None)
    firsts = results["default ViT"]["first_batch_s"]
    for name, times in firsts.items():
        table.add_row(name, _spread(times, 1e3))
    console.print(table)
    medians = [statistics.median(times) for times in firsts.values()]
    checks.append(("first batch, slowest position : fastest", max(medians) / min(medians), 1.25, False))
    return print_targets(console, checks, digits=4)


def _spread(values: list[float], scale: float) -> str:
    low, middle, high = min(values) * scale, statistics.median(values) * scale, max(values) * scale
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


if __name__ == "__main__":
    main()
