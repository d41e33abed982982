"""The teacher of a run, as far as its config alone tells. What it is made of is looked at by `ftexp.driver.teacher`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ftexp.config.checks.wording import unused, yaml_text
from ftexp.config.schema import FEATURES, SINGLE_LABEL, TOKEN, Config
from ftexp.config.timm_names import model_names
from ftexp.registry import did_you_mean

_OF_MODEL = {"num_classes": "the data", "in_chans": "the data", "img_size": "distill.image_size"}
_STATE = "distill"


def check_distill(config: Config) -> Iterator[str]:
    """The teacher, and fields that need one."""
    distill, names = config.distill, config.checkpoint.extra_state
    if distill.teacher is None:
        others = tuple(field.name for field in dataclasses.fields(distill) if field.name != "teacher")
        yield from unused(distill, "distill", others, "needs distill.teacher")
        return
    yield from _teacher_problems(config, distill.teacher)
    for key, value in distill.kwargs.items():
        if key in _OF_MODEL:
            yield f"distill.kwargs.{key}={value} follows {_OF_MODEL[key]}: take it out"
    if distill.kind != FEATURES and config.data.task != SINGLE_LABEL:
        yield (
            f"distill.kind={distill.kind} compares distributions over classes, and data.task={config.data.task}: take "
            f"distill.kind={FEATURES}"
        )
    if config.augment.splits > 1:
        yield f"augment.splits={config.augment.splits}: no teacher is compared with views of a sample; set 1"
    if distill.kind == FEATURES or distill.hard:
        why = "distill.hard=false" if distill.hard else "distill.kind=logits or token"
        yield from unused(distill, "distill", ("temperature",), f"needs {why}")
    if distill.kind != TOKEN:
        yield from unused(distill, "distill", ("hard",), f"needs distill.kind={TOKEN}")
    if distill.kind == FEATURES and _STATE not in names:
        yield f"checkpoint.extra_state={names} must hold {_STATE}, for the projection of distill.kind={FEATURES}"


def _teacher_problems(config: Config, teacher: str) -> Iterator[str]:
    """Yield the mistakes in where the teacher's weights are said to be."""
    distill = config.distill
    if is_timm_name(teacher, has_plugins=bool(config.plugins)):
        yield from unused(distill, "distill", ("checkpoint", "weights"), "is for a run as the teacher")
        pretrained = distill.pretrained
        if pretrained is not True and not isinstance(pretrained, str):
            yield f"distill.pretrained={yaml_text(pretrained)} must be true, or the path of a weights file"
        return
    yield from unused(distill, "distill", ("pretrained", "kwargs"), "is for a timm name as the teacher")
    # a path is looked at by `ftexp.driver.teacher`: a run that has finished is printed again without its teacher
    if "/" not in teacher and not Path(teacher).expanduser().exists():
        near = did_you_mean(teacher, model_names())
        yield f"distill.teacher={teacher} is no run, no weights file and no name of timm's.{near}"


def is_timm_name(teacher: str, has_plugins: bool) -> bool:
    """Whether `teacher` names an architecture; a directory or file of that name comes first.

    has_plugins: any word may be a name then.
    """
    if "://" in teacher or Path(teacher).expanduser().exists():
        return False
    return teacher.partition(".")[0] in model_names() or (has_plugins and "/" not in teacher)
