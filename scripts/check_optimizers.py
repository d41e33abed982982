"""Find timm's optimisers that update the shards of a model exactly as they update whole tensors.

    uv run python scripts/check_optimizers.py [NAME ...]

Three ranks update a small ViT, whole and sharded, with the same gradients, and compare the weights after a few steps.
Half-way, the sharded optimiser's state is gathered whole and loaded into the shards of a new optimiser. Prints a line
for each optimiser and finally the names that agree: `SHARDED_OPTIMIZERS` in ftexp/config/checks/parallel.py. Takes
about 5 minutes for all.
"""

from __future__ import annotations

import copy
import datetime
import sys
import tempfile
import warnings
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
from timm.optim import list_optimizers
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException

from ftexp.config.schema import OptimConfig, ParallelConfig, TrainConfig
from ftexp.errors import ConfigError
from ftexp.model.optim import build_optimizer
from ftexp.model.parallel.drafting import draft
from ftexp.model.parallel.parts import like, whole
from ftexp.model.parallel.sharding import Sharding

_WORLD, _NUM_STEPS, _RTOL = 3, 6, 1e-4
_SIZE = {"patch_size": 4, "embed_dim": 40, "depth": 2, "num_heads": 2, "img_size": 8, "num_classes": 5}


def _build() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **_SIZE)
    return model


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = like(torch.randn(parameter.shape, generator=generator), parameter)
    optimizer.step()


def _problem(name: str, sharding: Sharding) -> str | None:
    """Return how an optimiser on shards differs from the same one on whole tensors; None if it agrees."""
    config, train = OptimConfig(name=name, lr=1e-2, weight_decay=0.01), TrainConfig(epochs=1, global_batch_size=8)
    alone, parts = _build(), sharding.shard(draft(_build, sharding.cut))
    optimizers = [build_optimizer(config, train, model) for model in (alone, parts)]
    for step in range(_NUM_STEPS):
        if step == _NUM_STEPS // 2:
            saved = copy.deepcopy(sharding.full_state(optimizers[1].state_dict(), keep=True))
            optimizers[1] = build_optimizer(config, train, parts)
            sharding.load_optimizer(optimizers[1], saved)
        for model, optimizer in zip((alone, parts), optimizers, strict=True):
            _step(model, optimizer, step)
    largest = 0.0
    for (where, own), sharded in zip(alone.named_parameters(), parts.parameters(), strict=True):
        found = whole(sharded.detach())
        largest = max(largest, ((found - own.detach()).abs().max() / own.detach().abs().max().clamp(min=1e-3)).item())
        if not torch.allclose(found, own, rtol=_RTOL, atol=1e-5):
            return f"{where} differs by {largest:.1e} of its largest"
    for state in optimizers[1].state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and not hasattr(value, "full_tensor"):
                return f"its state {key} is no shard"
    return None


def _check(rank: int, directory: str, name: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    meeting, wait = f"file://{directory}/{name}", datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", rank=rank, world_size=_WORLD, init_method=meeting, timeout=wait)
    try:
        problem = _problem(name, Sharding(ParallelConfig(kind="fsdp"), torch.device("cpu"), _WORLD))
    except (RuntimeError, ValueError, AssertionError, TypeError, ConfigError, LookupError) as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    (Path(directory) / f"{name}.{rank}").write_text(problem or "")
    dist.barrier()  # times out if another rank has failed


def _found(directory: str, name: str) -> str:
    """Check an optimiser on all ranks; return its problems, "" if there are none."""
    try:
        torch.multiprocessing.start_processes(_check, (directory, name), nprocs=_WORLD, start_method="fork")
    except ProcessException as error:
        return f"ranks end differently: {str(error).strip().splitlines()[-1][:80]}"
    return "; ".join(
        {problem for rank in range(_WORLD) if (problem := (Path(directory) / f"{name}.{rank}").read_text())}
    )


def main() -> None:
    """Check the named optimisers, or all of timm's."""
    agree = []
    with tempfile.TemporaryDirectory() as directory:
        for name in sys.argv[1:] or list_optimizers():
            problem = _found(directory, name)
            print(f"{name:24} {problem or 'agrees'}", flush=True)
            agree += [] if problem else [name]
    print(f"{len(agree)} agree: {' '.join(agree)}")


if __name__ == "__main__":
    main()
