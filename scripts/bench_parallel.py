"""Measure a worker's memory under parallel=ddp and fsdp, and compare the losses of ddp, fsdp and hsdp.

    uv run python scripts/bench_parallel.py [--rounds 1] [--model vit_base] [--steps 50] [--check] [--json FILE]

Memory: workers build the model with AdamW and take 3 steps on two tiny images each; the figure is a worker's peak
resident memory minus its memory before the model was built. 4 workers under fsdp, 2 under ddp, where a worker's memory
doesn't depend on their number (4 would need twice as much in all). Under fsdp, the peak is also measured while workers
save and continue to train, and in new workers that build the model and restore the checkpoint. Losses: 4 workers train
the default model on generated images, under each of the three. Every measurement has its own processes, on CPU. Takes
about 5 minutes on 2 cores.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from benching import Check, composed, describe_machine, finish, options_parser, print_targets
from pyarrow import fs  # noqa: F401 - a worker loads it anyway
from rich.console import Console
from sharded_saves import manager_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ftexp.checkpoint.manager import CheckpointManager
from ftexp.checkpoint.store import CheckpointStore
from ftexp.config.schema import DDP, FSDP, HSDP
from ftexp.data.info import DataInfo
from ftexp.job.group import ProcessGroup
from ftexp.job.trained_model import build_trained_model
from ftexp.model.optim import build_optimizer
from ftexp.model.parallel.parts import whole

NUM_WORKERS, NUM_DDP_WORKERS = 4, 2
MEMORY_STEPS, ROWS, NUM_SAVES = 3, 2, 3
UNDER_DDP, TRAINING = "MiB of a worker, 2 under ddp", "MiB of a worker, 4 under fsdp"
SAVING, RESTORING, WAITED = "MiB while saving", "MiB while restoring", "ms that training waits for a checkpoint"
OVERRIDES = {DDP: [], FSDP: ["parallel=fsdp"], HSDP: ["parallel=hsdp", "parallel.shard_size=2"]}


def main() -> None:
    """Measure, print the targets, and exit with 1 under --check if one is missed."""
    parser = options_parser(__doc__, 1, "runs of each, of which the median counts")
    parser.add_argument("--model", default="vit_base", help="of which memory is measured")
    parser.add_argument("--steps", type=int, default=50, help="of the losses")
    options = parser.parse_args()
    console = Console(highlight=False, width=120)
    describe_machine(console)
    results: dict[str, Any] = {"memory_mib": {}, "losses": {}}
    of_model = [f"model={options.model}", "data=cifar10", "data.image_size=32"]
    for _ in range(options.rounds):
        for name, found in _peaks(of_model).items():
            results["memory_mib"].setdefault(name, []).append(found)
    memory = {name: statistics.median(found) for name, found in results["memory_mib"].items()}
    for name, found in memory.items():
        console.print(f"{name}: {found:.0f}")
    for kind, overrides in OVERRIDES.items():
        results["losses"][kind] = _ran(_losses, NUM_WORKERS, overrides, options.steps)[0]
        console.print(f"{kind}: loss {results['losses'][kind][0]:.6f} to {results['losses'][kind][-1]:.6f}")
    losses, training = results["losses"], memory[TRAINING]
    checks: list[Check] = [
        ("memory of a worker, fsdp / ddp", training / memory[UNDER_DDP], 0.35, False),
        ("while saving / while training", memory[SAVING] / training, 1.1, False),
        ("while restoring / while training", memory[RESTORING] / training, 1.15, False),
    ]
    for kind in (FSDP, HSDP):
        apart = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses[kind], losses[DDP], strict=True))
        checks.append((f"losses of {kind} and ddp apart, x 1e-5", apart * 1e5, 1.0, False))
    finish(console, results, options.json, print_targets(console, checks), options.check)


def _peaks(overrides: list[str]) -> dict[str, float]:
    """Return the largest figure of any worker, by name."""
    under_ddp = _ran(_training, NUM_DDP_WORKERS, [*overrides, *OVERRIDES[DDP]])
    with tempfile.TemporaryDirectory(prefix="bench_") as directory:
        under_fsdp = [
            _ran(what, NUM_WORKERS, [*overrides, *OVERRIDES[FSDP]], directory) for what in (_saving, _restoring)
        ]
    found = {UNDER_DDP: max(each[TRAINING] for each in under_ddp)}
    for name in (TRAINING, SAVING, WAITED, RESTORING):
        found[name] = max(each[name] for workers in under_fsdp for each in workers if name in each)
    return found


def _ran(what: Any, workers: int, overrides: list[str], of: Any = None) -> list[Any]:
    """Run `what` in new processes; return the result of each."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = (what, workers, overrides, of, directory)
        torch.multiprocessing.start_processes(_worker, arguments, nprocs=workers, start_method="spawn")
        return [json.loads((Path(directory) / f"{rank}.json").read_text()) for rank in range(workers)]


def _worker(rank: int, what: Any, workers: int, overrides: list[str], of: Any, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=workers, init_method=f"file://{directory}/meeting")
    found = what(rank, workers, composed(*overrides), of)
    (Path(directory) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _training(rank: int, workers: int, config: Any, _: Any) -> dict[str, float]:
    before = _from_here()
    learner = _learner(config, workers)
    for step in range(MEMORY_STEPS):
        _step(learner, *_rows(config, rank, step, ROWS))
    return {TRAINING: _peak_mib() - before}


def _saving(rank: int, workers: int, config: Any, directory: str) -> dict[str, float]:
    import ray.train

    ray.train.report = lambda _: None
    before = _from_here()
    learner = _learner(config, workers)
    for step in range(MEMORY_STEPS):
        _step(learner, *_rows(config, rank, step, ROWS))
    training = _peak_mib() - before
    checkpoints: CheckpointManager = manager_of(rank, directory, learner)
    waited = []
    _from_here()
    for number in range(NUM_SAVES):
        dist.barrier()
        began = time.perf_counter()
        checkpoints._progress.step = number
        checkpoints.save()
        waited.append(time.perf_counter() - began + _step(learner, *_rows(config, rank, number, ROWS))[1])
        while learner.group.agree(int(checkpoints.busy)):
            _step(learner, *_rows(config, rank, number, ROWS))
    # without the first checkpoint, which allocates memory
    return {TRAINING: training, SAVING: _peak_mib() - before, WAITED: statistics.median(waited[1:]) * 1e3}


def _restoring(rank: int, workers: int, config: Any, directory: str) -> dict[str, float]:
    before = _from_here()
    checkpoints = manager_of(rank, directory, _learner(config, workers))
    manifest = CheckpointStore(checkpoints._store.storage).manifests(lambda *_: None)[0]
    assert checkpoints.restore(manifest) is None
    return {RESTORING: _peak_mib() - before}


def _losses(rank: int, workers: int, config: Any, steps: int) -> list[float]:
    """Return the mean loss over workers of each step."""
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-3))
    learner = _learner(config, workers)
    means = []
    for step in range(steps):
        loss, _ = _step(learner, *_rows(config, rank, step, 8))
        dist.all_reduce(loss)
        means.append(loss.item() / workers)
    return means


def _learner(config: Any, workers: int) -> Any:
    info = DataInfo(["0", "1"], config.data.image_size, config.data.channels, config.data.mean, config.data.std, {})
    trained = build_trained_model(config, info, torch.device("cpu"), workers)
    optimizer = build_optimizer(config.optim, config.train, trained.model)
    wrapped = trained.model
    if trained.sharding is None:
        wrapped = DistributedDataParallel(trained.model, gradient_as_bucket_view=True)
    group = ProcessGroup(dist.get_rank(), workers, torch.device("cpu"))
    return SimpleNamespace(
        model=trained.model, wrapped=wrapped, optimizer=optimizer, group=group, before_change=lambda: None
    )


def _rows(config: Any, rank: int, step: int, count: int) -> tuple[Tensor, Tensor]:
    """Return noise and labels that are independent of it, so that the loss stays away from 0."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    labels = torch.randint(0, 2, (count,), generator=generator)
    shape = (count, config.data.channels, config.data.image_size, config.data.image_size)
    return torch.randn(shape, generator=generator), labels


def _step(learner: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Take a step; return the loss and the seconds that the optimiser waited for a checkpoint."""
    learner.optimizer.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(learner.wrapped(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = list(learner.model.parameters())
    norm = whole(torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    began = time.perf_counter()
    learner.before_change()
    waited = time.perf_counter() - began
    learner.optimizer.step()
    return loss.detach(), waited


def _from_here() -> float:
    """Reset the peak to the current resident memory; return it in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident_mib("VmRSS")


def _peak_mib() -> float:
    return _resident_mib("VmHWM")


def _resident_mib(field: str) -> float:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


if __name__ == "__main__":
    main()
