"""Measurements by the ranks of a worker group: arithmetic, network and clocks."""

from __future__ import annotations

import hashlib
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

_PRODUCT = 512  # rows and columns of the matrices
_NUM_PRODUCTS = 3  # repetitions of the product: a faulty unit doesn't err each time
_ALL_REDUCE_BYTES = 16 * 2**20
_NUM_ROUNDS = 7
_NUM_PINGS = 20


@dataclass(frozen=True)
class RankFacts:
    """Measurements of one rank; sent from the worker as a dict."""

    rank: int
    node: str
    device: str  # name of the GPU, or of the processor
    versions: dict[str, str]
    products: list[str]  # hash of each repetition
    all_reduce_s: float
    clock_ahead_s: float  # seconds by which the clock is ahead of rank 0's
    clock_error_s: float  # largest error of that


def measure(_: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure, on every worker of a Ray Train group; return the facts of all ranks."""
    from ray.train.torch import get_device

    from ftexp.config.versions import package_versions

    device = get_device()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    products = [product_hash(device) for _ in range(_NUM_PRODUCTS)]
    seconds = _all_reduce_s(device)
    ahead, error = _clock(rank, world_size, device)
    own = RankFacts(rank, platform.node(), _name(device), package_versions(), products, seconds, ahead, error)
    facts: list[Any] = [None] * world_size
    dist.all_gather_object(facts, asdict(own))
    return facts


def product_hash(device: torch.device) -> str:
    """Multiply two matrices that are the same on all ranks, and return a hash of the result's bits."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_PRODUCT, _PRODUCT, generator=generator).to(device) for _ in range(2))
    return hashlib.sha256((left @ right).cpu().numpy().tobytes()).hexdigest()


def _name(device: torch.device) -> str:
    from ftexp.worker.hardware import describe

    facts = describe(device)
    return str(facts.get("gpu", facts["processor"]))


def _all_reduce_s(device: torch.device) -> float:
    """Return the median time of an all-reduce; collective."""
    values, spent = torch.ones(_ALL_REDUCE_BYTES // 4, device=device), []
    for _ in range(_NUM_ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()  # waits for a GPU
        spent.append(time.perf_counter() - began)
        values.fill_(1)
    return statistics.median(spent[1:])  # the first round also connects


def _clock(rank: int, world_size: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds by which this rank's clock is ahead of rank 0's, and their largest error; collective."""
    found = torch.zeros(2, dtype=torch.float64, device=device)
    for other in range(1, world_size):
        if rank == 0:
            dist.send(torch.tensor(_ask(other, device), dtype=torch.float64, device=device), other)
        elif rank == other:
            _answer(device)
            dist.recv(found, 0)
    ahead, error = found.tolist()
    return ahead, error


def _ask(other: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds by which rank `other`'s clock is ahead, and their error, from the quickest round trip."""
    answer, best = torch.zeros(1, dtype=torch.float64, device=device), (0.0, float("inf"))
    for _ in range(_NUM_PINGS):
        sent = time.time()
        dist.send(answer, other)
        dist.recv(answer, other)
        read, half = answer.item(), (time.time() - sent) / 2
        if half < best[1]:
            best = (read - sent - half, half)
    return best


def _answer(device: torch.device) -> None:
    asked = torch.zeros(1, dtype=torch.float64, device=device)
    for _ in range(_NUM_PINGS):
        dist.recv(asked, 0)
        asked.item()  # waits for a GPU
        dist.send(torch.tensor([time.time()], dtype=torch.float64, device=device), 0)


def all_reduce_rate(seconds: float, world_size: int) -> float:
    """Return bytes/s on the wire of each rank, which is nccl-tests' bus bandwidth."""
    return 2 * (world_size - 1) / world_size * _ALL_REDUCE_BYTES / seconds
