"""Every name of timm's that isn't public, in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import _builder, is_model, model_entrypoint
from torch import nn

Filter = Callable[..., dict[str, torch.Tensor]]  # filter of a state dict and a model, or of a state dict alone


def checkpoint_filter(arguments: dict[str, Any]) -> Filter | None:
    """Return what timm passes a file's state dict through before `create_model(**arguments)` loads it, if anything.

    It renames the tensors of the original authors' files, and resamples position tables for the model. A model's
    builder passes it to timm's `load_pretrained` and to nothing else, so the model is built a second time, without
    values, and the call is noted. None for a plug-in's model too: it may load weights by itself.
    """
    name = arguments["model_name"].partition(".")[0]
    if is_model(name) and not model_entrypoint(name).__module__.startswith("timm."):
        return None
    noted: list[Filter | None] = []

    def note(*_: Any, filter_fn: Filter | None = None, **__: Any) -> None:
        noted.append(filter_fn)

    before = _builder.load_pretrained
    _builder.load_pretrained = note
    try:
        try:
            with torch.device("meta"):
                timm.create_model(**arguments, pretrained=True)
        except Exception:  # it can't do with shapes alone
            timm.create_model(**arguments, pretrained=True)
    finally:
        _builder.load_pretrained = before
    return noted[-1] if noted else None


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the modules that give a timm model's logits; () for a model that doesn't say."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
