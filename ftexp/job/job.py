"""Everything one worker holds while it trains, built from the config. States and loop work on this."""

from __future__ import annotations

import math
import os
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device, prepare_model
from torch import nn

from ftexp.cluster.hot_start.forker import MARK as HOT_START_MARK
from ftexp.config.schema import Config
from ftexp.data.augment.erasing import Erasing
from ftexp.data.augment.mixing import Mixing
from ftexp.data.augment.pixels import Augment
from ftexp.data.batches import Batch
from ftexp.data.feeds.decoding import refuse_bad
from ftexp.data.feeds.feed import CachedRows, Feed, IndexedFeed, Rows, ToTensors
from ftexp.data.feeds.streamed import StreamedRows, slow_reason
from ftexp.data.info import SPLITS, BadSample, DataInfo, IndexedSplit
from ftexp.data.order import derive_seed, run_order
from ftexp.data.plan import Plan
from ftexp.errors import RunFailedError
from ftexp.evaluation.meter import Meter, Progress
from ftexp.job.mfu import Utilisation
from ftexp.job.skipped_batches import Skips
from ftexp.job.spec import JobSpec
from ftexp.job.stopwatch import Stopwatch
from ftexp.model.build import WeightsReport, as_logits, build_model
from ftexp.model.ema import Average
from ftexp.model.freezing import Freezing
from ftexp.model.optim import build_optimizer
from ftexp.model.schedule import build_scheduler
from ftexp.rundir.sample_ledger import LEDGER, Ledger
from ftexp.storage.directory import Storage
from ftexp.wire.hub import Line

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INIT, _STEP = 2, 3  # streams of the run's seed; 1 is the order's


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


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
    total_positions: int  # of the whole run: samples of an epoch times epochs, or as far as train.max_steps goes
    progress: Progress
    wrap: Callable[[nn.Module], nn.Module] = _as_it_is  # makes `wrapped` of `model`; collective
    freezing: Freezing | None = None
    average: Average | None = None  # of the weights
    erasing: Erasing | None = None
    mixing: Mixing | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    accumulate_steps: int = 1  # micro-batches of a step: more than configured once memory has run out
    ledger: Ledger = field(default_factory=lambda: Ledger(None, 0, 0))
    weights_report: WeightsReport | None = None
    best: dict[str, Any] = field(default_factory=dict)  # {"metric": name, "value": float, "step": int}
    batch: Batch | None = None  # that is being trained on
    skips: Skips = field(default_factory=Skips)
    num_skipped: int = 0  # steps in a row
    num_rollbacks: int = 0  # since the last save
    num_overflows: int = 0  # steps that fp16's loss scaler left out, of the whole run
    poisoned: bool = False  # chaos: the coming step's loss is NaN on this rank
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    utilisation: Utilisation | None = None

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.progress.position >= self.total_positions

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return math.ceil(self.total_positions / self.config.train.global_batch_size)

    def agree(self, value: int) -> int:
        """Rank 0's `value`, on every rank; collective."""
        if not dist.is_initialized():
            return value
        box = torch.tensor([value], device=self.device)
        dist.broadcast(box, src=0)
        return int(box.item())

    def all_agree(self, holds: bool) -> bool:
        """Whether it holds on every rank; collective."""
        if not dist.is_initialized():
            return holds
        box = torch.tensor([int(holds)], device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return bool(box.item())

    def agree_on(self, value: Any) -> Any:
        """Rank 0's `value`, of any type that pickles, on every rank; collective."""
        return _agree_on(value)

    def as_logits(self, output: Any) -> torch.Tensor:
        """Return the model's `output` for some images; ConfigError if that isn't logits, [images, classes]."""
        return as_logits(output, self.config.model, self.info.num_classes)

    def autocast(self) -> torch.autocast:
        """The context in which forward passes run."""
        precision = self.config.train.precision
        return torch.autocast(self.device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")

    def seed_step(self) -> None:
        """Make what the coming step draws from torch, numpy or Python depend on (seed, step, rank) alone."""
        seed = derive_seed(self.config.seed, _STEP, self.progress.step, self.rank) % 2**63
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every backend, which takes longer
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)


def build_job(spec: JobSpec, streams: dict[str, IndexedSplit]) -> Job:
    """Connect to the driver and build this rank's job; collective."""
    context = ray.train.get_context()
    rank, world_size, device = context.get_world_rank(), context.get_world_size(), get_device()
    assert isinstance(device, torch.device)
    line = _connect(spec, rank, world_size)
    try:
        return _build(spec, streams, line, rank, world_size, device)
    except Exception:
        line.send("raised", rank=rank, step=0, position=0, samples=[], traceback=traceback.format_exc())
        line.close()
        raise


def _build(
    spec: JobSpec, streams: dict[str, IndexedSplit], line: Line, rank: int, world_size: int, device: torch.device
) -> Job:
    config, info = spec.config, spec.info
    answer = _agree_on(line.answer)
    if config.train.deterministic:
        settle_kernels(device)
    torch.manual_seed(derive_seed(config.seed, _INIT) % 2**63)
    model, report = build_model(config.model, info)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.train.compile:
        model.compile()
    model = model.to(device)
    optimizer = build_optimizer(
        config.optim, config.train, model
    )  # of all parameters, those that are frozen at first too
    average = Average(config.ema, model) if config.ema.decay is not None else None
    freezing = Freezing(config.train.freeze, model)
    freezing.settle(epoch=0)
    wrapped = _under_ddp(model)
    rows = _rows(spec, streams, line, rank, world_size)
    num_samples = len(rows["train"])
    global_batch_size, max_steps = config.train.global_batch_size, config.train.max_steps
    all_positions = num_samples * config.train.epochs
    total_positions = all_positions if max_steps is None else min(all_positions, max_steps * global_batch_size)
    steps_per_epoch = num_samples / global_batch_size
    to_tensors = ToTensors(info, device, config.train.channels_last)
    accumulate_steps = max(config.train.accumulate_steps, answer.get("accumulate_steps") or 1)
    augment = config.augment
    plan = Plan(global_batch_size, accumulate_steps, total_positions, rank, world_size, augment.mixes)
    ledger = Storage(spec.run_uri).child(LEDGER) if config.train.ledger else None
    return Job(
        config=config,
        info=info,
        run_name=spec.run_name,
        attempt=answer["attempt"],
        rank=rank,
        world_size=world_size,
        device=device,
        line=line,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=build_scheduler(
            config.schedule, optimizer, math.ceil(all_positions / global_batch_size), steps_per_epoch
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16"),
        feed=IndexedFeed(
            rows["train"],
            run_order(config.seed, num_samples, config.data.shuffle_window, spec.blocks),
            plan,
            to_tensors,
            Augment(augment, config.seed, info.mean),
        ),
        rows=rows,
        to_tensors=to_tensors,
        total_positions=total_positions,
        progress=Progress(Meter(device)),
        wrap=_under_ddp,
        freezing=freezing,
        average=average,
        erasing=Erasing(augment, config.seed, device) if augment.erase_prob else None,
        mixing=Mixing(augment, info.num_classes, config.train.label_smoothing, config.seed) if augment.mixes else None,
        fingerprint=spec.fingerprint,
        accumulate_steps=accumulate_steps,
        ledger=Ledger(ledger, answer["attempt"], rank),
        skips=Skips(answer.get("skipped", ())),
        weights_report=report,
        stopwatch=Stopwatch(device),
        utilisation=Utilisation(
            device, config.train.precision, world_size, (info.channels, info.image_size, info.image_size)
        ),
    )


def settle_kernels(device: torch.device) -> None:
    """Have a GPU's kernels give the same bits each time, as a CPU's do anyway; torch warns of those that can't."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first matrix product
    torch.backends.cudnn.benchmark = False  # it would choose a kernel by timing
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _under_ddp(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = prepare_model(model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})
    return wrapped


def _rows(spec: JobSpec, streams: dict[str, IndexedSplit], line: Line, rank: int, world_size: int) -> dict[str, Rows]:
    """Each split's rows: cached, or streamed if there are `streams`."""
    if not streams:
        return {split: CachedRows(ray.train.get_dataset_shard(split)) for split in SPLITS}
    data = spec.config.data
    told: set[str] = set()

    def on_bad(samples: list[BadSample]) -> None:
        refuse_bad(data, samples)
        if new := [sample for sample in samples if sample.where not in told]:
            told.update(sample.where for sample in new)
            line.send("event", name="bad_samples", count=len(new), samples=[vars(sample) for sample in new])

    def on_slow(seconds: float) -> None:
        free, there = (found.get("CPU", 0) for found in (ray.available_resources(), ray.cluster_resources()))
        line.send("event", name="slow_data", rank=rank, reason=slow_reason(seconds, free, there))

    num_tasks = max(1, spec.decode_cpus // world_size)
    return {split: StreamedRows(streams[split], spec.info, num_tasks, on_bad, on_slow) for split in SPLITS}


def _connect(spec: JobSpec, rank: int, world_size: int) -> Line:
    import socket

    hello = {"kind": "hello", "rank": rank, "world_size": world_size, "pid": os.getpid(), "node": socket.gethostname()}
    hello["hot_start"] = HOT_START_MARK in os.environ
    line = Line(spec.hub, hello)
    if "stop" in line.answer:
        line.close()
        raise RunFailedError(line.answer["stop"])
    return line


def _agree_on(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
