"""Construction of one worker's job from the driver's message."""

from __future__ import annotations

import functools
import math
import os
import traceback
from collections.abc import Callable
from typing import Any

import ray.train
import torch
from ray.train.torch import get_device, prepare_model
from torch import nn

from ftexp.cluster.hot_start.forker import MARK as HOT_START_MARK
from ftexp.config.schema import MULTI_LABEL, SINGLE_LABEL, Config
from ftexp.data.augment.erasing import Erasing
from ftexp.data.augment.mixing import Mixing
from ftexp.data.augment.picture import PictureAugment
from ftexp.data.augment.pixels import Augment
from ftexp.data.augment.resizing import Resizing
from ftexp.data.feeds.decoding import refuse_bad
from ftexp.data.feeds.feed import CachedRows, IndexedFeed, Rows, ToTensors
from ftexp.data.feeds.streamed import StreamedRows, slow_reason
from ftexp.data.info import BadSample, DataInfo, IndexedSplit
from ftexp.data.order import derive_seed
from ftexp.data.plan import ShardPlan
from ftexp.data.sampling import run_order
from ftexp.data.targets import class_counts
from ftexp.errors import RunFailedError
from ftexp.evaluation.meter import Meter
from ftexp.job.data import TrainingData
from ftexp.job.group import ProcessGroup
from ftexp.job.hooks import Hooks
from ftexp.job.job import Job, RunIdentity
from ftexp.job.learner import Learner
from ftexp.job.mfu import Utilisation
from ftexp.job.progress import Progress
from ftexp.job.skipped_batches import SkippedBatches
from ftexp.job.spec import JobSpec
from ftexp.job.stopwatch import Stopwatch
from ftexp.job.trained_model import TrainedModel, build_trained_model
from ftexp.model.build import as_logits
from ftexp.model.distillation import Distiller
from ftexp.model.freezing import Freezing
from ftexp.model.loss_registry import Loss, LossContext
from ftexp.model.losses import build_loss
from ftexp.model.optim import build_optimizer
from ftexp.model.schedule import build_scheduler
from ftexp.model.teacher import Teacher, build_teacher
from ftexp.model.teacher_spec import TeacherSpec
from ftexp.rundir.names import LEDGER
from ftexp.rundir.sample_ledger import SampleLedger
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.channel import Channel
from ftexp.wire.messages import Begin, Happened, Hello, Raised, Stop

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# random stream of the run's seed. Others: 1 the order, 2 the model (ftexp.job.trained_model), 3 the steps
_PROJECTION = 4


def build_job(spec: JobSpec, streams: dict[str, IndexedSplit]) -> Job:
    """Connect to the driver and build this rank's job; collective."""
    context = ray.train.get_context()
    device = get_device()
    assert isinstance(device, torch.device)
    group = ProcessGroup(context.get_world_rank(), context.get_world_size(), device)
    channel = _connect(spec, group)
    try:
        return _build(spec, streams, channel, group)
    except Exception:
        channel.send(Raised(group.rank, 0, 0, [], traceback.format_exc()))
        channel.close()
        raise


def _build(spec: JobSpec, streams: dict[str, IndexedSplit], channel: Channel, group: ProcessGroup) -> Job:
    config, info, device = spec.config, spec.info, group.device
    begin = group.agree_on(channel.answer)
    assert isinstance(begin, Begin), "rank 0 gets Begin or Stop, and so does who replaces another"
    if config.train.deterministic:
        settle_kernels(device)
    trained = build_trained_model(config, info, device, group.world_size)
    rows = _rows(spec, streams, channel, group)
    teacher = spec.teacher
    distiller = _distiller(config, info, trained.model, device, teacher) if teacher is not None else None
    learner = _learner(config, info, trained, device, rows["train"], distiller, group.is_awaited)
    plan = _plan(config, group, len(rows["train"]), begin.accumulate_steps or 1)
    ledger = Storage(spec.run_uri).child(LEDGER) if config.train.ledger else None
    shape = (info.channels, info.image_size, info.image_size)
    progress = Progress(Meter(device), plan.total_positions)
    return Job(
        config=config,
        info=info,
        run=RunIdentity(spec.run_name, begin.attempt, spec.fingerprint, lineage_of(begin)),
        channel=channel,
        group=group,
        learner=learner,
        data=_data(spec, rows, plan, device, SkippedBatches(begin.skipped)),
        progress=progress,
        ledger=SampleLedger(ledger, begin.attempt, group.rank),
        stopwatch=Stopwatch(device),
        utilisation=Utilisation(device, config.train.precision, group.world_size, shape),
        hooks=Hooks(config, group, learner, progress, channel),
    )


def _distiller(config: Config, info: DataInfo, model: nn.Module, device: torch.device, spec: TeacherSpec) -> Distiller:
    distill, train = config.distill, config.train
    taught_by = build_teacher(spec, info, distill.kind, device)
    if train.channels_last:
        taught_by = taught_by.to(memory_format=torch.channels_last)
    teacher = Teacher(taught_by, spec, info, autocast_of(device, distill.precision or train.precision))
    distiller = Distiller(distill, model, teacher, derive_seed(config.seed, _PROJECTION) % 2**63)
    distiller.trainable.to(device)
    if train.compiled == "model" and distiller.trainable is not model:
        distiller.trainable.compile()
    return distiller


def autocast_of(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of forward passes in a precision."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")


def _learner(
    config: Config,
    info: DataInfo,
    trained: TrainedModel,
    device: torch.device,
    rows: Rows,
    distiller: Distiller | None,
    awaited: bool,
) -> Learner:
    """Build everything around the model; collective, unless this rank is `awaited`. rows: the training split."""
    train, precision, model = config.train, config.train.precision, trained.model
    # all parameters, including those that are frozen at first
    trainable = model if distiller is None else distiller.trainable
    optimizer = build_optimizer(config.optim, train, trainable)
    ema = trained.average(config)
    freezing = Freezing(train.freeze, model)
    freezing.settle(epoch=0)
    wrap = _under_ddp if trained.sharding is None else _as_it_is
    return Learner(
        model=model,
        wrapped=trainable if awaited else wrap(trainable),
        wrap=wrap,
        optimizer=optimizer,
        scheduler=scheduler_of(config, optimizer, len(rows)),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        autocast=autocast_of(device, precision),
        as_logits=functools.partial(as_logits, config=config.model, num_classes=info.num_classes),
        loss=_loss(config, info, rows, device),
        freezing=freezing,
        ema=ema,
        distiller=distiller,
        weights_report=trained.report,
        sharding=trained.sharding,
        counted=trained.counted,
    )


def scheduler_of(config: Config, optimizer: torch.optim.Optimizer, num_samples: int) -> Any:
    """Return the scheduler of a run with `num_samples` samples per epoch.

    The learning rate falls for as many steps as a run without the cooldown epochs has, so that adding cooldown epochs
    doesn't change the rates before them.
    """
    batch = config.train.global_batch_size
    falling_steps = math.ceil(num_samples * (config.train.epochs - config.schedule.cooldown_epochs) / batch)
    return build_scheduler(config.schedule, optimizer, falling_steps, num_samples / batch)


def _loss(config: Config, info: DataInfo, rows: Rows, device: torch.device) -> Loss:
    # multi-label targets are smoothed when they are mixed
    smoothing = 0.0 if info.task == MULTI_LABEL and config.augment.mixes else config.train.label_smoothing
    context = LossContext(config.loss, info.num_classes, smoothing, info.task, config.augment.splits)
    return build_loss(context, lambda: class_counts(rows.labels, info.num_classes).tolist(), device)


def _plan(config: Config, group: ProcessGroup, num_samples: int, min_accumulate_steps: int) -> ShardPlan:
    """Return the plan of the positions that this rank trains on; an epoch has `num_samples`."""
    train = config.train
    total_positions = num_samples * train.epochs
    if train.max_steps is not None:
        total_positions = min(total_positions, train.max_steps * train.global_batch_size)
    return ShardPlan(
        train.global_batch_size,
        max(train.accumulate_steps, min_accumulate_steps),
        total_positions,
        group.rank,
        group.world_size,
        config.augment.mixes,
    )


def _data(
    spec: JobSpec, rows: dict[str, Rows], plan: ShardPlan, device: torch.device, skipped: SkippedBatches
) -> TrainingData:
    config, info, augment = spec.config, spec.info, spec.config.augment
    to_tensors = ToTensors(info, device, config.train.channels_last)
    num_samples = len(rows["train"])
    mixed_to = augment.mixup_off_epoch * num_samples if augment.mixup_off_epoch else None
    order = run_order(config, num_samples, spec.blocks, spec.classes.get() if spec.classes is not None else None)
    on_tensors = Augment(augment, config.seed, info.mean)
    return TrainingData(
        feed=IndexedFeed(rows["train"], order, plan, to_tensors, on_tensors, augment.splits),
        rows=rows,
        to_tensors=to_tensors,
        accumulate_steps=plan.accumulate_steps,
        resizing=_resizing(config, info, num_samples),
        erasing=Erasing(augment, config.seed, device) if augment.erase_prob else None,
        mixing=_mixing(config, info, mixed_to) if augment.mixes else None,
        splits=augment.splits,
        skipped=skipped,
    )


def _resizing(config: Config, info: DataInfo, num_samples: int) -> Resizing | None:
    if config.resizing.initial_scale is None:
        return None
    return Resizing(config.resizing, info.image_size, num_samples * config.train.epochs)


def _mixing(config: Config, info: DataInfo, end: int | None) -> Mixing:
    smoothing, has_vectors = config.train.label_smoothing, info.task != SINGLE_LABEL
    return Mixing(config.augment, info.num_classes, smoothing, config.seed, end, has_vectors)


def settle_kernels(device: torch.device) -> None:
    """Make a GPU's kernels deterministic, as a CPU's always are; torch warns about those that can't be."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
    torch.backends.cudnn.benchmark = False  # it would choose a kernel by timing
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _under_ddp(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = prepare_model(model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})
    return wrapped


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _rows(spec: JobSpec, streams: dict[str, IndexedSplit], channel: Channel, group: ProcessGroup) -> dict[str, Rows]:
    """Return each split's rows: streamed if the split is in `streams`, else cached."""
    data = spec.config.data
    logged: set[str] = set()

    def on_bad(samples: list[BadSample]) -> None:
        refuse_bad(data, samples)
        if new := [sample for sample in samples if sample.where not in logged]:
            logged.update(sample.where for sample in new)
            channel.send(Happened(events.BadSamples(len(new), [vars(sample) for sample in new])))

    def on_slow(seconds: float) -> None:
        free, there = (found.get("CPU", 0) for found in (ray.available_resources(), ray.cluster_resources()))
        channel.send(Happened(events.SlowData(group.rank, slow_reason(seconds, free, there))))

    num_tasks = max(1, spec.decode_cpus // group.world_size)

    def rows(split: str) -> Rows:
        if split not in streams:
            return CachedRows(ray.train.get_dataset_shard(split))
        augment = picture_augment(spec.config, spec.info) if split == "train" else None
        return StreamedRows(streams[split], spec.info, num_tasks, on_bad, on_slow, augment)

    return _WhenAsked(rows)


class _WhenAsked(dict[str, Rows]):
    """Rows by split, each read at its first use: to start, an attempt needs only the training split's."""

    def __init__(self, read: Callable[[str], Rows]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, split: str) -> Rows:
        self[split] = found = self._read(split)
        return found


def picture_augment(config: Config, info: DataInfo) -> PictureAugment | None:
    """Return the configured augmentation of single images; None without one."""
    if not config.augment.changes_pictures:
        return None
    return PictureAugment(config.augment, config.seed, info.fit, config.plugins)


def lineage_of(begin: Begin) -> dict[int, int | None]:
    """Return {attempt: last step whose state in memory the run descends from}; None: any step."""
    return {attempt: limit for attempt, limit in begin.lineage if attempt is not None}


def _connect(spec: JobSpec, group: ProcessGroup) -> Channel:
    import socket

    is_forked = HOT_START_MARK in os.environ
    node = ray.get_runtime_context().get_node_id()
    place = (group.rank, group.world_size, os.getpid(), socket.gethostname())
    hello = Hello(*place, is_forked, node, group.is_awaited)
    channel = Channel(spec.hub, hello)
    if isinstance(channel.answer, Stop):
        channel.close()
        raise RunFailedError(channel.answer.reason)
    return channel
