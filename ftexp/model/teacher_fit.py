"""Checks of a teacher before any worker starts: its weights, its classes, and the student."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from timm.models import get_pretrained_cfg
from torch import nn

from ftexp.config.schema import FEATURES, LOGITS, TOKEN, Config
from ftexp.data.info import DataInfo
from ftexp.errors import ConfigError
from ftexp.model.build import build_model, timm_arguments, without_values, without_values_of
from ftexp.model.matching import match
from ftexp.model.teacher import own_info, require_whole
from ftexp.model.teacher_spec import KEY, TeacherSpec
from ftexp.model.timm_private import checkpoint_filter, classifier_names
from ftexp.model.weights import load_weights
from ftexp.registry import load_plugins


def check_teacher(spec: TeacherSpec, config: Config) -> TeacherSpec:
    """Return the spec with the teacher's number of classes; ConfigError if the teacher doesn't fit the student.

    Uses only names and shapes. Weights of timm's hub aren't fetched.
    """
    load_plugins([*config.plugins, *spec.plugins])
    kind, data = config.distill.kind, config.data
    if spec.channels != data.channels:
        raise ConfigError(
            f"{KEY}={spec.source} takes {spec.channels} channels, but data.channels={data.channels}: choose a "
            f"teacher with as many"
        )
    own = own_info(spec, 2)
    model = without_values(lambda: build_model(dataclasses.replace(spec.model, pretrained=False), own)[0])
    if spec.model.pretrained is True:
        spec = dataclasses.replace(spec, num_classes=_check_hub(spec))
    elif isinstance(spec.model.pretrained, str):
        spec = dataclasses.replace(spec, num_classes=_check_file(spec, model, own, kind))
    if kind != LOGITS:
        _check_student(config)
    if kind == FEATURES:
        _require_features(model, f"{KEY}={spec.source}")
    return spec


def _check_hub(spec: TeacherSpec) -> int:
    """Return the number of classes of timm's weights for the teacher; ConfigError if timm has none."""
    pretrained_cfg = get_pretrained_cfg(spec.model.name)
    if pretrained_cfg is None or not pretrained_cfg.has_weights:
        raise ConfigError(f"{KEY}={spec.model.name}: timm's hub has no weights for it; set distill.pretrained=<file>")
    return int(pretrained_cfg.num_classes)


def _check_file(spec: TeacherSpec, model: nn.Module, own: DataInfo, kind: str) -> int | None:
    """Return the number of classes of a file's weights; None if it can't be determined."""
    weights, source = load_weights(Path(spec.model.pretrained), "meta", KEY)
    _, report = match(model, weights, source, KEY, checkpoint_filter(timm_arguments(spec.model, own)))
    # a classifier of another shape is not missing; the number of classes is checked once the data are known
    require_whole(model, dataclasses.replace(report, missing=sorted({*report.missing} - {*report.unused})), kind)
    shapes = [weights[f"{name}.weight"].shape for name in classifier_names(model) if f"{name}.weight" in weights]
    return int(shapes[0][0]) if shapes else spec.num_classes


def _check_student(config: Config) -> None:
    model = without_values_of(config.model, config.data)
    if config.distill.kind == FEATURES:
        _require_features(model, f"model.name={config.model.name}")
    elif not hasattr(model, "set_distilled_training"):
        raise ConfigError(
            f"distill.kind={TOKEN}: model.name={config.model.name} has no distillation token; choose one with it, "
            "such as deit_tiny_distilled_patch16_224, or distill.kind=logits"
        )


def _require_features(model: nn.Module, given: str) -> None:
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head") and hasattr(model, "num_features")):
        raise ConfigError(
            f"distill.kind={FEATURES}: {given} has no pooled features (forward_features, forward_head, num_features): "
            "set distill.kind=logits"
        )
