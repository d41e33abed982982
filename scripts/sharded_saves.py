"""Measurements of `bench_checkpoint.py --sharded`: the cost of a sharded model's checkpoint, ftexp's and torch's.

Four processes share a model with AdamW under `fully_shard`: in four shards, or in two replicas of two shards. In turns,
they save it with ftexp, with torch.distributed.checkpoint.save and with its async_save, all to the same disk.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NUM_WORKERS = 4
MODELS = {"ViT-S": "vit_small_patch16_224", "ViT-B": "vit_base_patch16_224"}
MESHES = {"fsdp": (4,), "hsdp": (2, 2)}


def measured(rounds: int) -> dict[str, Any]:
    """Measure; return {"<model>, <mesh>": {side: seconds of each round, and the keys of `_facts`}}."""
    import torch.multiprocessing

    results = {}
    for model, name in MODELS.items():
        for mesh, sizes in MESHES.items():
            with tempfile.TemporaryDirectory(prefix="bench_") as directory:
                torch.multiprocessing.start_processes(
                    _on_rank, args=(directory, name, sizes, rounds), nprocs=NUM_WORKERS, start_method="fork"
                )
                results[f"{model}, {mesh}"] = torch.load(Path(directory) / "result.pt", weights_only=True)
    return results


def _on_rank(rank: int, directory: str, name: str, sizes: tuple[int, ...], rounds: int) -> None:
    import ray.train
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    ray.train.report = lambda _: None  # neither side measures it
    dist.init_process_group("gloo", rank=rank, world_size=NUM_WORKERS, init_method=f"file://{directory}/meeting")
    learner = _learner(name, sizes)
    sides = _sides(rank, directory, learner)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, save in sides.items():
            dist.barrier()
            began = time.perf_counter()
            wait = save(number)
            blocked = torch.tensor([time.perf_counter() - began])
            wait()
            dist.all_reduce(blocked, op=dist.ReduceOp.MAX)  # training runs at the pace of the slowest rank
            dist.barrier()
            times[side].append(blocked.item())
    if rank == 0:
        facts = _facts(directory, learner, sizes)
        # without the first checkpoint of each side, which allocates memory
        torch.save({**facts, **{side: found[1:] for side, found in times.items()}}, Path(directory) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def _learner(name: str, sizes: tuple[int, ...]) -> Any:
    import timm
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = timm.create_model(name, num_classes=10)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return SimpleNamespace(model=model, optimizer=optimizer)


def _sides(rank: int, directory: str, learner: Any) -> dict[str, Any]:
    """Return {side: save}; save(number) blocks as in training, and returns a function that waits for the rest."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    checkpoints = manager_of(rank, directory, learner)

    def ours(number: int) -> Any:
        checkpoints._progress.step = number
        checkpoints.save()
        return checkpoints.wait

    def state() -> dict[str, Any]:
        model, optimizer = get_state_dict(learner.model, learner.optimizer)
        return {"model": model, "optimizer": optimizer}

    def at(side: str, number: int) -> str:
        if rank == 0 and number:
            shutil.rmtree(Path(directory, side, str(number - 1)))
        return str(Path(directory, side, str(number)))

    def theirs(number: int) -> Any:
        dcp.save(state(), checkpoint_id=at("torch", number))
        return lambda: None

    def theirs_async(number: int) -> Any:
        return dcp.async_save(state(), checkpoint_id=at("async", number)).result

    return {"ftexp": ours, "torch save": theirs, "torch async_save": theirs_async}


def manager_of(rank: int, directory: str, learner: Any) -> Any:
    """Return a CheckpointManager that saves a learner to `directory` and restores it; collective."""
    import torch

    from ftexp.checkpoint.manager import CheckpointManager
    from ftexp.checkpoint.store import CheckpointStore
    from ftexp.config.schema import Config
    from ftexp.evaluation.meter import Meter
    from ftexp.job.group import ProcessGroup
    from ftexp.job.job import RunIdentity
    from ftexp.job.progress import Progress
    from ftexp.storage.directory import Storage

    progress = Progress(Meter(torch.device("cpu")), 10**9)
    extra = SimpleNamespace(state_dict=lambda: {"progress": progress.state_dict()}, versions=lambda: {"progress": 1})
    extra.load = lambda *_: None
    channel = SimpleNamespace(sync=lambda: None, send=lambda _: None, stop_requested=False, save_requested=False)
    return CheckpointManager(
        config=Config(),
        run=RunIdentity("bench", 1, {}),
        group=ProcessGroup(rank, NUM_WORKERS, torch.device("cpu")),
        learner=learner,
        progress=progress,
        ledger=None,
        channel=channel,
        store=CheckpointStore(Storage.at(directory, "ftexp")),
        extra=extra,
    )


def _facts(directory: str, learner: Any, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Return the sizes of the model's tensors and of the newest checkpoint, in bytes."""
    from ftexp.checkpoint.store import CheckpointStore
    from ftexp.storage.directory import Storage

    newest = CheckpointStore(Storage.at(directory, "ftexp")).manifests(lambda *_: None)[0]
    parameters = sum(parameter.numel() for parameter in learner.model.parameters())
    shards = [each for each in newest.files.values() if "header_bytes" in each]
    assert newest.num_shards == sizes[-1]
    return {
        "parameters": parameters,
        "tensor_bytes": 3 * 4 * parameters,  # float32 parameters and AdamW's two moments
        "written_bytes": sum(each["bytes"] - each["header_bytes"] for each in shards),
        "num_files": len(newest.files),
    }


def report(results: dict[str, dict[str, Any]], table: Any, spread: Any) -> list[tuple[str, float, float, bool]]:
    """Fill a table of four columns; return the figures and their targets."""
    checks: list[tuple[str, float, float, bool]] = []
    for name, result in results.items():
        cells = [spread(result[side], 1e3) for side in ("ftexp", "torch save", "torch async_save")]
        table.add_row(f"{name}, {result['parameters'] / 1e6:.0f} M parameters", *cells)
        ratio = statistics.median(result["ftexp"]) / statistics.median(result["torch save"])
        checks.append((f"blocked, ftexp : torch's save, {name}", ratio, 0.1, False))
        written = result["written_bytes"] / result["tensor_bytes"]
        checks.append((f"times that each byte is written, {name}", written, 1, False))
    return checks
