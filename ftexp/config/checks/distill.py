"""Checks of the teacher that need only the config; `ftexp.driver.teacher` checks its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ftexp.config.checks.wording import unused, yaml_text
from ftexp.config.schema import FEATURES, SINGLE_LABEL, TOKEN, Config
from ftexp.config.timm_names import model_names
from ftexp.registry import FROM_PLUGINS, did_you_mean

_OF_MODEL = {"num_classes": "the data", "in_chans": "the data", "img_size": "distill.image_size"}
_STATE = "distill"


def check_distill(config: Config) -> Iterator[str]:
    """Check the teacher and the fields that need one."""
    distill, names = config.distill, config.checkpoint.extra_state
    if distill.teacher is None:
        others = tuple(field.name for field in dataclasses.fields(distill) if field.name != "teacher")
        yield from unused(distill, "distill", others, "needs distill.teacher")
        return
    yield from _teacher_problems(config, distill.teacher)
    for key, value in distill.kwargs.items():
        if key in _OF_MODEL:
            yield f"distill.kwargs.{key}={value} follows {_OF_MODEL[key]}: remove it"
    if distill.kind != FEATURES and config.data.task != SINGLE_LABEL:
        yield (
            f"distill.kind={distill.kind} compares distributions over classes, but data.task={config.data.task}: set "
            f"distill.kind={FEATURES}"
        )
    if config.augment.splits > 1:
        yield (
            f"augment.splits={config.augment.splits}: distillation does not support several views; set augment.splits=1"
        )
    if distill.kind == FEATURES or distill.hard:
        why = "distill.hard=false" if distill.hard else "distill.kind=logits or token"
        yield from unused(distill, "distill", ("temperature",), f"needs {why}")
    if distill.kind != TOKEN:
        yield from unused(distill, "distill", ("hard",), f"needs distill.kind={TOKEN}")
    if distill.kind == FEATURES and _STATE not in names:
        yield f"checkpoint.extra_state={names} must hold {_STATE}, for the projection of distill.kind={FEATURES}"


def _teacher_problems(config: Config, teacher: str) -> Iterator[str]:
    """Yield a message for each wrong setting of the teacher's weights."""
    distill = config.distill
    if is_timm_name(teacher, has_plugins=bool(config.plugins)):
        yield from unused(distill, "distill", ("checkpoint", "weights"), "is only for a teacher that is a run")
        pretrained = distill.pretrained
        if pretrained is not True and not isinstance(pretrained, str):
            yield f"distill.pretrained={yaml_text(pretrained)} must be true, or the path of a weights file"
        return
    yield from unused(distill, "distill", ("pretrained", "kwargs"), "is only for a teacher that is a timm name")
    # `ftexp.driver.teacher` checks paths later: the results of a finished run can be printed without its teacher
    if "/" not in teacher and not Path(teacher).expanduser().exists():
        near = did_you_mean(teacher, model_names())
        yield f"distill.teacher={teacher} is not a run, a weights file or a timm model name.{near} {FROM_PLUGINS}"


def is_timm_name(teacher: str, has_plugins: bool) -> bool:
    """Return whether `teacher` names an architecture; an existing directory or file of that name takes precedence.

    has_plugins: if true, any text without a slash may be a name.
    """
    if "://" in teacher or Path(teacher).expanduser().exists():
        return False
    return teacher.partition(".")[0] in model_names() or (has_plugins and "/" not in teacher)
