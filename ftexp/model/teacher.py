"""The teacher: a frozen model in evaluation mode, whose inputs are a student's batches in its own preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftexp.config.schema import FEATURES
from ftexp.data.info import DataInfo
from ftexp.errors import ConfigError
from ftexp.model.build import build_model
from ftexp.model.matching import WeightsReport
from ftexp.model.teacher_spec import KEY, TeacherSpec
from ftexp.model.timm_private import classifier_names
from ftexp.model.weights import StateDict
from ftexp.registry import load_plugins


class Teacher:
    """A frozen model and the preparation of a student's batch for it."""

    def __init__(self, model: nn.Module, spec: TeacherSpec, info: DataInfo, autocast: torch.autocast) -> None:
        """info: the student's data. A teacher from a run may have the classes in another order."""
        self.model = model.eval().requires_grad_(False)
        self._autocast = autocast
        self._size = spec.image_size
        device = next(model.parameters()).device
        own, students = (_constants(each.mean, each.std, device) for each in (spec, info))
        self._constants = None if (spec.mean, spec.std) == (info.mean, info.std) else (*students, *own)
        names = spec.class_names or info.class_names
        order = [names.index(name) for name in info.class_names] if sorted(names) == sorted(info.class_names) else []
        self._order = None if order == sorted(order) else torch.tensor(order, device=device)

    @torch.no_grad()
    def __call__(self, images: Tensor, features: bool = False) -> Tensor:
        """Return the logits of the student's classes, or pooled features; images are normalised for the student."""
        with self._autocast:
            if features:
                return self.model.forward_head(self.model.forward_features(self.prepared(images)), pre_logits=True)  # type: ignore[operator, no-any-return]
            logits: Tensor = self.model(self.prepared(images))
        return logits if self._order is None else logits[:, self._order]

    def prepared(self, images: Tensor) -> Tensor:
        """Return the student's images with the teacher's normalisation and size."""
        if self._constants is not None:
            mean, std, own_mean, own_std = self._constants
            images = (images * std + mean - own_mean) / own_std  # as timm's DistillationTeacher does
        if images.shape[-1] == self._size:
            return images
        return F.interpolate(images, size=(self._size, self._size), mode="bicubic", antialias=True)


def _constants(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))  # type: ignore[return-value]


def build_teacher(spec: TeacherSpec, info: DataInfo, kind: str, device: torch.device) -> nn.Module:
    """Build the teacher with its weights, for a student on `info`; ConfigError if the weights don't match the spec."""
    load_plugins(spec.plugins)
    model, report = build_model(spec.model, own_info(spec, info.num_classes), KEY)
    if spec.uri is not None:
        model.load_state_dict(_saved_weights(spec))
    elif report is not None:
        if isinstance(spec.model.pretrained, str):
            _require_same(spec, sha256_of(Path(spec.model.pretrained)))
        require_whole(model, report, kind)
    return model.to(device)


def own_info(spec: TeacherSpec, num_classes: int) -> DataInfo:
    """Return the DataInfo to build a teacher with; num_classes: used if the spec has none."""
    names = spec.class_names or [str(number) for number in range(spec.num_classes or num_classes)]
    return DataInfo(names, spec.image_size, spec.channels, spec.mean, spec.std, {})


def _saved_weights(spec: TeacherSpec) -> StateDict:
    assert spec.uri is not None
    assert spec.read is not None, "whoever describes a run's checkpoint says how it is read"
    weights, digest = spec.read(spec.uri, spec.file)
    _require_same(spec, digest)
    return weights


def _require_same(spec: TeacherSpec, sha256: str) -> None:
    if spec.sha256 != sha256:
        raise ConfigError(f"{KEY}={spec.source} has changed since the run began: restore its weights")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_whole(model: nn.Module, report: WeightsReport, kind: str) -> None:
    """Raise ConfigError if the weights lack a part of the teacher, which would be random.

    For distill.kind=features the classifier may be missing.
    """
    heads = tuple(f"{name}." for name in classifier_names(model)) if kind == FEATURES else ()
    if missing := [name for name in report.missing if not name.startswith(heads)]:
        raise ConfigError(
            f"{KEY}={report.source}: {len(missing)} of its tensors are missing or have another shape (for example "
            f"{missing[0]}): give complete weights of this architecture, with the classes of the data"
        )


def num_features(model: nn.Module) -> int:
    """Return the width of a timm model's pooled features, as timm's FeatureDistillationTask determines it."""
    return int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]
