"""Preprocessing of a model's pretrained weights, from timm's config of the model."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg

from ftexp.config.schema import INTERPOLATIONS, ModelConfig

_CONFIG_FILE = "config.json"  # next to weights, as on timm's hub and by `python -m ftexp.export format=safetensors`


def preprocessing_of(config: ModelConfig, channels: int) -> tuple[dict[str, Any], str]:
    """Return {field of DataConfig: value} that the weights were trained with, and the origin of these values.

    timm's config.json next to a weights file takes precedence over timm's registered config of `config.name`. {} if
    there is neither, as for a plug-in's model. For images of one channel, mean and std are averaged over the colours;
    for two or four channels they are absent.
    """
    found, origin = _config_next_to_weights(config), _CONFIG_FILE + " next to the weights"
    if found is None:
        registered = get_pretrained_cfg(config.name) if ":" not in config.name else None
        found, origin = registered and registered.to_dict(), f"timm's config of {config.name}"
    if not found:
        return {}, origin
    known = resolve_data_config(pretrained_cfg=found)
    values: dict[str, Any] = {"crop_pct": float(known["crop_pct"]), "crop_mode": known["crop_mode"]}
    if known["interpolation"] in INTERPOLATIONS:
        values["interpolation"] = known["interpolation"]
    for name in ("mean", "std"):
        per_colour = [float(value) for value in known[name]]
        if channels == len(per_colour):
            values[name] = per_colour
        elif channels == 1:
            values[name] = [round(statistics.fmean(per_colour), 6)]
    return values, origin


def _config_next_to_weights(config: ModelConfig) -> dict[str, Any] | None:
    """Return the pretrained config in timm's config.json next to the weights file; None if there is none."""
    if not isinstance(config.pretrained, str):
        return None
    try:
        content = json.loads(Path(config.pretrained).expanduser().with_name(_CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # other libraries use this file name too
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        return None
    found = content.get("pretrained_cfg", content)
    return found if isinstance(found, dict) and "mean" in found else None
