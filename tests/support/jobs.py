"""A small job on generated data in this process, without Ray."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import torch

from ftexp.checkpoint.build import build_manager
from ftexp.checkpoint.store import CheckpointStore
from ftexp.config.schema import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    AugmentConfig,
    CheckpointConfig,
    Config,
    DistillConfig,
    EmaConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    StoppingConfig,
    TrainConfig,
)
from ftexp.data.augment.erasing import Erasing
from ftexp.data.augment.mixing import Mixing
from ftexp.data.augment.pixels import Augment
from ftexp.data.augment.resizing import Resizing
from ftexp.data.feeds.feed import CachedRows, IndexedFeed, ToTensors
from ftexp.data.info import DataInfo
from ftexp.data.order import SampleOrder
from ftexp.data.plan import ShardPlan
from ftexp.data.targets import packed
from ftexp.evaluation.meter import Meter
from ftexp.failure.nonfinite import NonFiniteRecovery
from ftexp.job.data import TrainingData
from ftexp.job.group import ProcessGroup
from ftexp.job.hooks import Hooks
from ftexp.job.job import Job, RunIdentity
from ftexp.job.learner import Learner
from ftexp.job.mfu import Utilisation
from ftexp.job.progress import Progress
from ftexp.job.stopwatch import Stopwatch
from ftexp.job.trained_model import TrainedModel, build_trained_model, prepare
from ftexp.model.build import as_logits, build_model
from ftexp.model.distillation import Distiller
from ftexp.model.freezing import Freezing
from ftexp.model.loss_registry import LossContext
from ftexp.model.losses import build_loss
from ftexp.model.optim import build_optimizer
from ftexp.model.schedule import build_scheduler
from ftexp.rundir.sample_ledger import SampleLedger
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.messages import Happened, Metrics
from ftexp.worker.loop import advance
from ftexp.worker.step import thaw, train_step

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL_VIT = ModelConfig(
    name="vit_tiny_patch16_224", kwargs={"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
)
RESNET = ModelConfig(name="resnet18")


class Lines:
    """Replaces a worker's channel: collects the messages to the driver."""

    def __init__(self):
        self.sent, self.found = [], {}

    def send(self, message):
        self.sent.append(message)

    def events(self, kind=events.Event):
        happened = [message.event for message in self.sent if isinstance(message, Happened)]
        return [event for event in happened if isinstance(event, kind)]

    def points(self):
        return [message for message in self.sent if isinstance(message, Metrics)]

    def sync(self):
        pass

    def evaluated(self, checkpoint):
        return self.found.get(checkpoint)

    def note_evaluated(self, message):
        self.found[message.checkpoint] = message


ALONE = ProcessGroup(rank=0, world_size=1, device=CPU)


def make_job(
    model=SMALL_VIT,
    num_samples=96,
    batch=24,
    optim=None,
    augment=None,
    ema=None,
    loss=None,
    stopping=None,
    hooks=None,
    group=ALONE,
    attempt=1,
    distill=None,
    teacher=None,
    info=None,
    parallel=None,
    **train,
):
    config = Config(
        parallel=parallel or ParallelConfig(),
        model=model,
        optim=optim or OptimConfig(name="adamw", lr=3e-3),
        schedule=ScheduleConfig(name="constant"),
        augment=augment or AugmentConfig(),
        loss=loss or LossConfig(),
        ema=ema or EmaConfig(),
        distill=distill or DistillConfig(),
        stopping=stopping or StoppingConfig(),
        hooks=hooks or {},
        train=TrainConfig(epochs=3, global_batch_size=batch, **train),
        checkpoint=CheckpointConfig(),
    )
    info = info or DataInfo(["dark", "light"], 8, 1, [0.5], [0.25], {})
    return job_of(config, info, num_samples, group, attempt, teacher)


def job_of(config, info, num_samples, group=ALONE, attempt=1, teacher=None):
    """Return one rank's job, on dark and light images in turns; see `_stored` for the labels of other tasks.

    With a `Teacher`, the model is distilled from it. With parallel.kind other than ddp, the model is sharded over
    torch's process group.
    """
    train, augment, size = config.train, config.augment, info.image_size
    batch, precision = train.global_batch_size, train.precision
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_samples) % info.num_classes
    pixels = torch.randint(0, 100, (num_samples, size, size, info.channels), generator=generator)
    pixels += 120 * (labels % 2).view(-1, 1, 1, 1)
    block = {
        "image": pixels.to(torch.uint8).numpy(),
        "label": _stored(info, labels.numpy(), pixels),
        "sample": torch.arange(num_samples).numpy(),
    }
    rows = CachedRows(SimpleNamespace(iter_batches=lambda **_: iter([block])))
    trained = _trained(config, info, group)
    built = trained.model
    distiller = Distiller(config.distill, built, teacher, seed=5) if teacher is not None else None
    trainable = built if distiller is None else distiller.trainable
    optimizer = build_optimizer(config.optim, train, trainable)
    total = train.epochs * num_samples
    to_tensors = ToTensors(info, CPU, train.channels_last)
    plan = ShardPlan(batch, train.accumulate_steps, total, group.rank, group.world_size, augment.mixes)
    mixed_to = augment.mixup_off_epoch * num_samples if augment.mixup_off_epoch else None
    freezing = Freezing(train.freeze, built)
    freezing.settle(epoch=0)
    loss_context = LossContext(config.loss, info.num_classes, train.label_smoothing, info.task, augment.splits)
    learner = Learner(
        model=built, wrapped=trainable, wrap=lambda model: model, optimizer=optimizer,
        scheduler=build_scheduler(config.schedule, optimizer, math.ceil(total / batch), num_samples / batch),
        scaler=torch.amp.GradScaler("cpu", enabled=precision == "fp16"),
        autocast=torch.autocast("cpu", dtype=DTYPES[precision], enabled=precision != "fp32"),
        as_logits=functools.partial(as_logits, config=config.model, num_classes=info.num_classes),
        loss=build_loss(loss_context, lambda: labels.bincount().tolist(), CPU),
        freezing=freezing, ema=trained.average(config), distiller=distiller,
        sharding=trained.sharding, counted=trained.counted,
    )  # fmt: skip
    mixing = None
    if augment.mixes:
        has_vectors = info.task != SINGLE_LABEL
        mixing = Mixing(augment, info.num_classes, train.label_smoothing, 0, mixed_to, has_vectors)
    data = TrainingData(
        feed=IndexedFeed(rows, SampleOrder(0, num_samples), plan, to_tensors, Augment(augment, 0, info.mean)),
        rows={"train": rows, "val": rows, "test": rows}, to_tensors=to_tensors,
        accumulate_steps=train.accumulate_steps,
        resizing=Resizing(config.resizing, size, total) if config.resizing.initial_scale else None,
        erasing=Erasing(augment, 0, CPU) if augment.erase_prob else None,
        mixing=mixing,
    )  # fmt: skip
    channel, progress = Lines(), Progress(Meter(CPU), total)
    return Job(
        config=config, info=info, run=RunIdentity("x", attempt, {}), channel=channel, group=group,
        learner=learner, data=data, progress=progress, ledger=SampleLedger(None, 0, 0),
        stopwatch=Stopwatch(), utilisation=Utilisation(CPU, precision, 1, (info.channels, size, size)),
        hooks=Hooks(config, group, learner, progress, channel),
    )  # fmt: skip


def _trained(config, info, group):
    if config.parallel.kind != "ddp":
        return build_trained_model(config, info, CPU, group.world_size)
    torch.manual_seed(0)
    built, _ = build_model(config.model, info)
    if config.train.channels_last:
        built = built.to(memory_format=torch.channels_last)
    prepare(built, config)
    return TrainedModel(model=built, report=None)


def _stored(info, labels, pixels):
    """Return the task's labels. Multi-label: the class and, for all, the last class; regression: the mean pixel."""
    rows = np.arange(len(labels))
    if info.task == MULTI_LABEL:
        classes = np.concatenate([labels % 2, np.full(len(rows), info.num_classes - 1)])
        return packed(np.tile(rows, 2), classes, len(rows), info.num_classes)
    if info.task == REGRESSION:
        return pixels.float().mean((1, 2, 3)).numpy()[:, None].repeat(info.num_classes, 1)
    return labels


def manager_of(job, directory, states=("progress",)):
    """Return a CheckpointManager that saves `job` to a directory, and its store."""
    job.channel.stop_requested = job.channel.save_requested = False
    job.config.checkpoint.extra_state = list(states)
    store = CheckpointStore(Storage.at(str(directory)))
    return build_manager(job, store), store


def recovery_of(job, checkpoints=None):
    return NonFiniteRecovery(job.config.failure, job.group, job.progress, job.data.skipped, job.channel, checkpoints)


def train(job):
    ends = []
    for batch in job.data.feed.from_position(job.progress.position):
        thaw(job)
        train_step(job, batch)
        ends.append(advance(job, batch))
    return ends


def copied(job):
    """Return clones of weights, buffers and optimiser state."""
    held = [value for state in job.learner.optimizer.state.values() for value in state.values()]
    return [value.clone() for value in (*job.learner.model.state_dict().values(), *held)]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def skipping_job(*arguments, most=10, **switches):
    job = make_job(*arguments, **switches)
    job.config.failure.on_nonfinite, job.config.failure.max_nonfinite_steps = "skip_step", most
    return job
