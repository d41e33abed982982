"""Messages from a worker to the driver while it trains."""

from __future__ import annotations

import time

from ftexp.errors import NonFiniteError
from ftexp.evaluation.tasks import named_means
from ftexp.job.job import Job
from ftexp.model.build import timm_arguments
from ftexp.wire.messages import Metrics, Ready, Tick
from ftexp.worker.hardware import describe
from ftexp.worker.ranks import RankTimes
from ftexp.worker.speed import speeds

_TICK_INTERVAL_S = 0.1  # minimum between messages that only move the progress bar


def announce(job: Job, source: str) -> None:
    """Report the model, the hardware and the initial step to the driver, once everything is ready to train.

    source: source of the state, see `Ready`.
    """
    if job.group.rank == 0:
        ready = Ready(
            arguments=timm_arguments(job.config.model, job.info),
            num_parameters=sum(parameter.numel() for parameter in job.learner.model.parameters()),
            device=str(job.group.device),
            hardware=describe(job.group.device),
            total_steps=job.total_steps,
            step=job.progress.step,
            weights=str(job.learner.weights_report) if job.learner.weights_report else None,
            source=source,
        )
        job.channel.send(ready)


def log_train(job: Job, ranks: RankTimes | None = None) -> None:
    """Log the mean training loss, and the accuracy if the task has one, since the last point; collective.

    NonFiniteError if a loss was not finite, or if fp16 gradients overflow at any loss scale.
    """
    learner, progress = job.learner, job.progress
    totals, times = progress.train.totals_with(ranks.own() if ranks is not None else [])
    if totals[3]:
        raise NonFiniteError(f"{totals[3]} losses were NaN or infinite by step {progress.step}")
    progress.train.reset()
    # with layer-wise decay, each group has its own rate; the head has the largest
    rate = max(group["lr"] for group in learner.optimizer.param_groups)
    values = {**named_means("train", totals, job.info.task), "lr": rate}
    if job.data.image_size is not None:
        values["image_size"] = job.data.image_size
    if learner.scaler.is_enabled():
        values |= {"loss_scale": learner.scaler.get_scale(), "num_overflows": progress.num_overflows}
    log_point(job, "train", values, speeds(job) | (ranks.take(times) if ranks is not None else {}))
    if values.get("loss_scale", 1) < 1:
        raise NonFiniteError(
            f"gradients overflow in fp16 whatever the loss scale, which has come down to {values['loss_scale']} by "
            f"step {progress.step}: lower optim.lr, clip gradients, or take train.precision=bf16"
        )


def log_point(job: Job, split: str, values: dict[str, float], measured: dict[str, float] | None = None) -> None:
    """Log a point. `measured`: speeds and times, which checkpoints don't hold."""
    progress = job.progress
    progress.metrics.update(values)
    if job.group.rank == 0:
        values = {**values, **(measured or {})}
        job.channel.send(Metrics(split, progress.step, progress.epoch, values))


class Ticker:
    """Reports steps for the driver's progress bar, at a limited rate."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last = 0.0

    def tick(self, at_once: bool = False) -> None:
        """Report the step to the driver: at most once per _TICK_INTERVAL_S, unless `at_once`."""
        now = time.monotonic()
        if self._job.group.rank == 0 and (at_once or now - self._last >= _TICK_INTERVAL_S):
            self._last = now
            progress = self._job.progress
            self._job.channel.send(Tick(progress.step, progress.epoch))
