"""What a worker holds under parallel=ddp and fsdp, and how far losses of ddp, fsdp and hsdp are apart.

    uv run python scripts/bench_parallel.py [--rounds 1] [--model vit_base] [--steps 50] [--check] [--json FILE]

Memory: workers build the model with AdamW and take 3 steps on two tiny images each; the peak of a worker's resident
memory above what it had before it built the model. 4 workers under fsdp, 2 under ddp, where a worker's share doesn't
depend on their number (and 4 would need twice the memory). Losses: 4 workers train the default model on made images,
under each of the three. A run of its own for each, on CPU. Takes some 3 minutes on 2 cores.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from benching import Check, composed, describe_machine, finish, options_parser, print_targets
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ftexp.config.schema import DDP, FSDP, HSDP
from ftexp.data.info import DataInfo
from ftexp.job.trained_model import build_trained_model
from ftexp.model.optim import build_optimizer
from ftexp.model.parallel.parts import whole

NUM_WORKERS, NUM_DDP_WORKERS = 4, 2
MEMORY_STEPS, ROWS = 3, 2
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
    for kind, workers in ((DDP, NUM_DDP_WORKERS), (FSDP, NUM_WORKERS)):
        peaks = [max(_ran(_memory, workers, [*of_model, *OVERRIDES[kind]], 0)) for _ in range(options.rounds)]
        results["memory_mib"][kind] = sorted(peaks)[len(peaks) // 2]
        console.print(f"{kind}, {workers} workers: {results['memory_mib'][kind]:.0f} MiB a worker at most")
    for kind, overrides in OVERRIDES.items():
        results["losses"][kind] = _ran(_losses, NUM_WORKERS, overrides, options.steps)[0]
        console.print(f"{kind}: loss {results['losses'][kind][0]:.6f} to {results['losses'][kind][-1]:.6f}")
    memory, losses = results["memory_mib"], results["losses"]
    checks: list[Check] = [("memory of a worker, fsdp / ddp", memory[FSDP] / memory[DDP], 0.35, False)]
    for kind in (FSDP, HSDP):
        apart = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses[kind], losses[DDP], strict=True))
        checks.append((f"losses of {kind} and ddp apart, x 1e-5", apart * 1e5, 1.0, False))
    finish(console, results, options.json, print_targets(console, checks), options.check)


def _ran(what: Any, workers: int, overrides: list[str], steps: int) -> list[Any]:
    """Return the results of each worker."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = (what, workers, overrides, steps, directory)
        torch.multiprocessing.start_processes(_worker, arguments, nprocs=workers, start_method="spawn")
        return [json.loads((Path(directory) / f"{rank}.json").read_text()) for rank in range(workers)]


def _worker(rank: int, what: Any, workers: int, overrides: list[str], steps: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=workers, init_method=f"file://{directory}/meeting")
    found = what(rank, workers, composed(*overrides), steps)
    (Path(directory) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _memory(rank: int, workers: int, config: Any, _: int) -> float:
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    model, optimizer = _made(config, workers)
    for step in range(MEMORY_STEPS):
        _step(model, optimizer, *_rows(config, rank, step, ROWS))
    return _resident_mib("VmHWM") - before


def _losses(rank: int, workers: int, config: Any, steps: int) -> list[float]:
    """The mean loss over workers of each step."""
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-3))
    model, optimizer = _made(config, workers)
    means = []
    for step in range(steps):
        loss = _step(model, optimizer, *_rows(config, rank, step, 8))
        dist.all_reduce(loss)
        means.append(loss.item() / workers)
    return means


def _made(config: Any, workers: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    info = DataInfo(["0", "1"], config.data.image_size, config.data.channels, config.data.mean, config.data.std, {})
    trained = build_trained_model(config, info, torch.device("cpu"), workers)
    optimizer = build_optimizer(config.optim, config.train, trained.model)
    if trained.sharding is None:
        return DistributedDataParallel(trained.model, gradient_as_bucket_view=True), optimizer
    return trained.model, optimizer


def _rows(config: Any, rank: int, step: int, count: int) -> tuple[Tensor, Tensor]:
    """Noise, with labels independent of it: the loss stays away from 0."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    labels = torch.randint(0, 2, (count,), generator=generator)
    shape = (count, config.data.channels, config.data.image_size, config.data.image_size)
    return torch.randn(shape, generator=generator), labels


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = whole(torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    optimizer.step()
    return loss.detach()


def _resident_mib(field: str) -> float:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


if __name__ == "__main__":
    main()
