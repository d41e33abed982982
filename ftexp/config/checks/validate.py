"""Validation of what types can't express: ranges, choices, names, and conflicts between groups.

`validate` runs before torch or Ray is imported. It reports all mistakes, one line each, with the key, the value, what
is allowed and the nearest valid name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ftexp.config.checks.checkpoint import check_checkpoint
from ftexp.config.checks.data import check_data
from ftexp.config.checks.distill import check_distill
from ftexp.config.checks.failure import check_chaos, check_failure
from ftexp.config.checks.metrics import check_metrics
from ftexp.config.checks.model import check_model
from ftexp.config.checks.notify import check_notify
from ftexp.config.checks.parallel import check_computing, check_parallel
from ftexp.config.checks.pictures import check_augment, check_pictures, check_repeats, check_splits
from ftexp.config.checks.recipe import (
    check_average,
    check_batch_norm,
    check_drop_path,
    check_freeze,
    check_loss,
    check_lr_base,
    check_optim,
    check_schedule,
)
from ftexp.config.checks.resizing import check_resizing
from ftexp.config.checks.run import check_run
from ftexp.config.checks.scaling import check_batch, check_scaling
from ftexp.config.checks.stopping import check_hooks, check_stopping
from ftexp.config.checks.sweep import check_sweep
from ftexp.config.checks.tasks import check_task
from ftexp.config.checks.trackers import tracker_problems
from ftexp.config.fields import field_problems
from ftexp.config.machine import check_compiler
from ftexp.config.schema import Config
from ftexp.errors import ConfigError


def validate(config: Config, trains: bool = True) -> None:
    """Raise ConfigError with all mistakes in `config`.

    trains: whether the command trains; if not, only model, data and scaling are checked.
    """
    wrong = dict(field_problems(config, ""))
    problems = list(wrong.values())
    # a check is skipped if a field that it reads is invalid
    for check, fields in _CHECKS.items():
        if (trains or check in (check_model, check_data, check_scaling)) and wrong.keys().isdisjoint(fields):
            problems += check(config)
    if problems:
        raise ConfigError("\n".join(problems))


# {check: fields that must be valid for it to run}
_CHECKS: dict[Callable[[Config], Iterator[str]], tuple[str, ...]] = {
    check_run: (),
    check_sweep: (),
    check_model: ("model.name", "data.image_size"),
    check_data: (
        *("data.name", "data.image_size", "data.channels", "data.mean", "data.std"),
        *("data.val_fraction", "data.test_fraction", "augment.pad_px"),
    ),
    check_task: ("data.name", "data.task", "data.sampling", "data.num_classes"),
    check_augment: (
        *("train.global_batch_size", "train.epochs", "data.channels"),
        *("augment.mixup_alpha", "augment.cutmix_alpha", "augment.mixup_off_epoch"),
    ),
    check_repeats: ("train.global_batch_size", "augment.repeats"),
    check_splits: ("augment.splits", "loss.name"),
    check_pictures: ("data.channels", "augment.crop"),
    check_resizing: ("data.image_size", "resizing.initial_scale", "resizing.size_increment"),
    check_loss: ("augment.mixup_alpha", "augment.cutmix_alpha", "loss.gamma", "loss.gamma_pos", "loss.gamma_neg"),
    check_optim: ("optim.name",),
    check_lr_base: ("optim.name", "optim.lr", "optim.lr_base", "train.global_batch_size"),
    check_batch_norm: (),
    check_schedule: (
        "schedule.warmup_epochs",
        "schedule.cooldown_epochs",
        "schedule.min_lr",
        "train.epochs",
        "optim.lr",
    ),
    check_average: (),
    check_distill: ("distill.pretrained", "distill.kind"),
    check_drop_path: ("model.name",),
    check_freeze: ("train.epochs",),
    check_scaling: (),
    check_parallel: ("parallel.kind", "parallel.shard_size", "parallel.param_dtype", "train.precision", "optim.name"),
    check_computing: (),
    check_compiler: (),
    check_batch: ("train.global_batch_size", "train.accumulate_steps"),
    check_metrics: (),
    check_stopping: ("train.epochs", "stopping.patience_epochs", "stopping.mode"),
    check_hooks: (),
    check_checkpoint: ("checkpoint.checkpoint_score_order",),
    check_chaos: ("chaos.kind",),
    tracker_problems: (),
    check_notify: (),
    check_failure: ("failure.backoff_s", "failure.max_backoff_s"),
}
