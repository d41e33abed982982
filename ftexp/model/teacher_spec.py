"""The description of a teacher, made by the driver, from which workers build it. Imports neither torch nor timm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftexp.config.schema import FEATURES, ModelConfig
from ftexp.data.info import DataInfo
from ftexp.errors import ConfigError

KEY = "distill.teacher"
_ADVICE = "choose a teacher of these classes, or set distill.kind=features, which needs none"
_MAX_SHOWN = 3  # names of classes in a message


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """A frozen model: its architecture, the location of its weights, and its preprocessing."""

    model: ModelConfig  # `pretrained`: true for timm's hub, or the path of a file; false for weights of a run
    source: str  # the teacher's name in messages
    class_names: list[str] | None  # None: not known
    num_classes: int | None  # None: not known
    image_size: int
    channels: int
    mean: list[float]
    std: list[float]
    plugins: tuple[str, ...] = ()  # plug-ins that the model needs
    uri: str | None = None  # URI of a run's checkpoint, which contains `file`
    file: str = "model.pt"  # or extra_state.pt, for the EMA
    # hash of the weights file, as in a run's manifest (BLAKE3 or SHA-256); None: weights of timm's hub
    sha256: str | None = None
    # (uri, file) -> state dict and hash of the file; passed in, since ftexp.model does not import ftexp.checkpoint
    read: Callable[[str, str], tuple[dict[str, Any], str]] | None = None

    def definition_sha256(self) -> str:
        """Return the hash of everything but the weights that affects the teacher's outputs."""
        default = ModelConfig()
        # defaults are omitted, so that a field added later doesn't change the hash
        model = {name: value for name, value in vars(self.model).items() if value != getattr(default, name)}
        model.pop("pretrained", None)  # only the location of the weights
        facts = [model, self.mean, self.std, self.image_size, self.channels, self.class_names]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def require_same_classes(spec: TeacherSpec, info: DataInfo, kind: str) -> None:
    """Raise ConfigError if the teacher's classes differ from the data's; distill.kind=features needs no classes."""
    if kind == FEATURES:
        return
    if spec.class_names is not None and sorted(spec.class_names) != sorted(info.class_names):
        lacks = _some(set(info.class_names) - set(spec.class_names), "it lacks")
        more = _some(set(spec.class_names) - set(info.class_names), "the data lack")
        found = "; ".join(each for each in (lacks, more) if each)
        raise ConfigError(f"{KEY}={spec.source} has other classes than the data: {found}; {_ADVICE}")
    if spec.num_classes is not None and spec.num_classes != info.num_classes:
        raise ConfigError(
            f"{KEY}={spec.source} has {spec.num_classes:,} classes, but the data have {info.num_classes:,}: {_ADVICE}"
        )


def _some(names: set[str], title: str) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return f"{title} {', '.join(sorted(names)[:_MAX_SHOWN])}{more}" if names else ""
