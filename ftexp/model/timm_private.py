"""All uses of timm's private names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import _builder, is_model, model_entrypoint
from torch import nn

Filter = Callable[..., dict[str, torch.Tensor]]  # filter of a state dict and a model, or of a state dict alone


def checkpoint_filter(arguments: dict[str, Any]) -> Filter | None:
    """Return timm's filter of a file's state dict for `create_model(**arguments)`; None if there is none.

    The filter renames the tensors of the original authors' files and resamples position embeddings. A model's builder
    passes it only to timm's `load_pretrained`. So the model is built again, without values, and that call is recorded.
    None also for a plug-in's model, which may load weights itself.
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
        except Exception:  # building needs values
            timm.create_model(**arguments, pretrained=True)
    finally:
        _builder.load_pretrained = before
    return noted[-1] if noted else None


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that compute a timm model's logits; () if the model doesn't name them."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
