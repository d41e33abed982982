"""Everything one worker holds while it trains, built from the config. States and loop work on this."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device, prepare_model
from torch import nn

from ftexp.config import Config
from ftexp.data.augment import Augment
from ftexp.data.feeds import CachedFeed, Feed, Plan, Rows, ToTensors
from ftexp.data.order import Order, derive_seed
from ftexp.data.splits import SPLITS, DataInfo
from ftexp.models import WeightsReport, build_model
from ftexp.optim import build_optimizer, build_scheduler
from ftexp.progress import Meter, Progress
from ftexp.wire import HubAddress, Line

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ORDER, _INIT, _STEP = 1, 2, 3  # streams of the run's seed


@dataclass(frozen=True)
class JobSpec:
    """What the driver sends to every worker."""

    config: Config
    info: DataInfo
    run_name: str
    checkpoints_uri: str
    hub: HubAddress


@dataclass(kw_only=True)
class Job:
    """One rank's part of a run. `best` is empty until the first evaluation."""

    config: Config
    info: DataInfo
    run_name: str
    attempt: int  # worker groups of this run so far, this one included
    rank: int
    world_size: int
    device: torch.device
    line: Line
    model: nn.Module  # the bare model: what is saved
    wrapped: nn.Module  # the same under DDP: what is trained
    optimizer: torch.optim.Optimizer
    scheduler: Any  # timm's; step_update(n) after n steps
    scaler: torch.amp.GradScaler  # disabled unless fp16
    feed: Feed
    rows: dict[str, Rows]  # by split, for evaluation
    to_tensors: ToTensors
    total_positions: int  # of the whole run: samples of an epoch times epochs
    progress: Progress
    weights_report: WeightsReport | None = None
    best: dict[str, Any] = field(default_factory=dict)  # {"metric": name, "value": float, "step": int}

    def autocast(self) -> torch.autocast:
        """The context in which forward passes run."""
        precision = self.config.train.precision
        return torch.autocast(self.device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")

    def seed_step(self) -> None:
        """Make dropout and the like of the coming step depend on (seed, step, rank) alone."""
        seed = derive_seed(self.config.seed, _STEP, self.progress.step, self.rank) % 2**63
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every backend, which takes longer
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)


def build_job(spec: JobSpec) -> Job:
    """Connect to the driver and build this rank's job; collective."""
    config, info, context = spec.config, spec.info, ray.train.get_context()
    rank, world_size, device = context.get_world_rank(), context.get_world_size(), get_device()
    assert isinstance(device, torch.device)
    line = _connect(spec, rank, world_size)
    attempt = _agree(line.answer.get("attempt"))
    torch.manual_seed(derive_seed(config.seed, _INIT) % 2**63)
    model, report = build_model(config.model, info)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.train.compile:
        model.compile()
    wrapped = prepare_model(model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})
    model = wrapped.module if world_size > 1 else wrapped
    rows = {split: Rows(ray.train.get_dataset_shard(split)) for split in SPLITS}
    num_samples = len(rows["train"])
    total_positions = num_samples * config.train.epochs
    steps_per_epoch = num_samples / config.train.global_batch_size
    optimizer = build_optimizer(config.optim, model)
    to_tensors = ToTensors(info, device, config.train.channels_last)
    plan = Plan(config.train.global_batch_size, config.train.accumulate_steps, total_positions, rank, world_size)
    return Job(
        config=config,
        info=info,
        run_name=spec.run_name,
        attempt=attempt,
        rank=rank,
        world_size=world_size,
        device=device,
        line=line,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=build_scheduler(
            config.schedule, optimizer, math.ceil(total_positions / config.train.global_batch_size), steps_per_epoch
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16"),
        feed=CachedFeed(
            rows["train"],
            Order(derive_seed(config.seed, _ORDER), num_samples),
            plan,
            to_tensors,
            Augment(config.augment, config.seed),
        ),
        rows=rows,
        to_tensors=to_tensors,
        total_positions=total_positions,
        progress=Progress(Meter(device)),
        weights_report=report,
    )


def _connect(spec: JobSpec, rank: int, world_size: int) -> Line:
    import os
    import socket

    hello = {"kind": "hello", "rank": rank, "world_size": world_size, "pid": os.getpid(), "node": socket.gethostname()}
    return Line(spec.hub, hello)


def _agree(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
