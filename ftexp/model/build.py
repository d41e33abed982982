"""Builds the timm model that a config names, sized to the data."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv, get_pretrained_cfg, is_model, load_state_dict_from_hf
from torch import nn

from ftexp.config.schema import DataConfig, ModelConfig
from ftexp.data.info import DataInfo
from ftexp.errors import ConfigError, DataError
from ftexp.model.weights import StateDict, load_weights, nothing_fits, without_prefix

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightsReport:
    """What became of pretrained weights. Names of tensors, as in the model's state dict."""

    source: str
    matched: list[str]
    resized: list[str]  # position embeddings and input convolutions, fitted by timm's own functions
    missing: list[str]  # of the model, not found in the weights: these start from scratch
    unused: list[str]  # of the weights, with no place in the model or another shape

    def __str__(self) -> str:
        total = len(self.matched) + len(self.resized) + len(self.missing)
        text = f"{self.source}: {len(self.matched) + len(self.resized)} of {total} tensors loaded"
        for title, names in (("resized", self.resized), ("from scratch", self.missing), ("unused", self.unused)):
            if names:
                text += f"; {title}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        return text


def timm_arguments(config: ModelConfig, info: DataInfo) -> dict[str, Any]:
    """The arguments with which a bare `timm.create_model(**arguments)` builds this model.

    Architectures with position embeddings get `img_size`, others adapt to any size.
    """
    arguments: dict[str, Any] = {
        "model_name": config.name,
        "num_classes": info.num_classes,
        "in_chans": info.channels,
        **config.all_kwargs(),
    }
    pretrained_cfg = get_pretrained_cfg(config.name.partition(".")[0]) if ":" not in config.name else None
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        arguments["img_size"] = info.image_size
    return arguments


def build_model(config: ModelConfig, info: DataInfo) -> tuple[nn.Module, WeightsReport | None]:
    """Create the model on the CPU, with pretrained weights if `config.pretrained` asks for them.

    Random initialisation draws from torch's global generator: seed it first. ConfigError if timm refuses the
    arguments.
    """
    arguments = timm_arguments(config, info)
    if ":" not in config.name and not is_model(config.name.partition(".")[0]):
        raise ConfigError(f"model.name='{config.name}' is unknown to timm, also after importing the plugins")
    try:
        model: nn.Module = timm.create_model(**arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"model.name={config.name} can't be built with {arguments}: {error}. See model.kwargs and data.image_size"
        ) from error
    if config.pretrained is False:
        return model, None
    if config.pretrained is True:
        source, weights = f"timm hub, {config.name}", _hub_weights(config.name)
    else:
        weights, source = load_weights(Path(config.pretrained).expanduser())
    return model, load_matching(model, weights, source)


def as_logits(output: Any, config: ModelConfig, num_classes: int) -> torch.Tensor:
    """Return what a model gave for some images; ConfigError if that isn't logits, [images, num_classes]."""
    if isinstance(output, torch.Tensor):
        if output.ndim == 2 and output.shape[1] == num_classes:
            return output
        found = f"a tensor of shape {list(output.shape)}"
    else:
        found = f"a {type(output).__name__}" + (f" of {len(output)}" if isinstance(output, (tuple, list, dict)) else "")
    given = ", ".join(f"model.kwargs.{key}={value}" for key, value in config.all_kwargs().items())
    raise ConfigError(
        f"model.name={config.name} returns {found}, not logits of shape [images, {num_classes}]: its forward must "
        "return those alone" + (f"; see {given}" if given else "")
    )


def _hub_weights(name: str) -> StateDict:
    pretrained_cfg = get_pretrained_cfg(name)
    if pretrained_cfg is None or not pretrained_cfg.has_weights:
        raise ConfigError(f"model.pretrained=true, but timm's hub has no weights for model.name={name}")
    try:
        if pretrained_cfg.hf_hub_id:
            return dict(load_state_dict_from_hf(pretrained_cfg.hf_hub_id, weights_only=True))
        return dict(torch.hub.load_state_dict_from_url(pretrained_cfg.url, map_location="cpu", weights_only=True))
    except Exception as error:  # hub clients raise their own types for being offline
        raise DataError(
            f"model.pretrained=true: the weights of {name} can't be fetched ({error}); "
            "without a network, give the path of a weights file"
        ) from error


def check_weights(config: ModelConfig, data: DataConfig) -> None:
    """ConfigError if the weights file can't be read or nothing in it fits the model; looks at names and shapes alone.

    The number of classes may not be known yet, but it decides about the head only.
    """
    names = [str(number) for number in range(data.num_classes or 2)]
    info = DataInfo(names, data.image_size, data.channels, data.mean, data.std, {})
    without = dataclasses.replace(config, pretrained=False)
    weights, source = load_weights(Path(config.pretrained).expanduser(), "meta")
    try:
        with torch.device("meta"):
            model, _ = build_model(without, info)
    except Exception:  # it can't do with shapes alone, or can't be built at all
        model, _ = build_model(without, info)
        model = model.to("meta")
    _matching(model, weights, source, "model.pretrained")


def load_matching(model: nn.Module, weights: StateDict, source: str, key: str = "model.pretrained") -> WeightsReport:
    """Load what fits into `model` and report the rest; ConfigError, which names `key`, if nothing fits.

    A position embedding is resampled and an input convolution adapted to the channels, as timm does. A head
    with another number of classes is left as it was initialised.
    """
    fitting, report = _matching(model, weights, source, key)
    model.load_state_dict(fitting, strict=False)
    return report


def _matching(model: nn.Module, weights: StateDict, source: str, key: str) -> tuple[StateDict, WeightsReport]:
    own: StateDict = model.state_dict()
    weights = without_prefix(weights, own)
    fitting, resized = {}, []
    for name, value in weights.items():
        if name not in own:
            continue
        fitted = _fit(model, name, value, own[name])
        if fitted.shape == own[name].shape:
            fitting[name] = fitted
            if fitted.shape != value.shape:
                resized.append(name)
    if not fitting:
        raise ConfigError(nothing_fits(key, source, weights, own))
    return fitting, WeightsReport(
        source=source,
        matched=[name for name in fitting if name not in resized],
        resized=resized,
        missing=[name for name in own if name not in fitting],
        unused=[name for name in weights if name not in fitting],
    )


def _fit(model: nn.Module, name: str, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    if value.shape == own.shape:
        return value
    if name == "pos_embed" and value.ndim == own.ndim == 3 and value.shape[-1] == own.shape[-1]:
        return _fit_positions(model, value, own)
    if value.ndim == own.ndim == 4 and value.shape[0] == own.shape[0] and value.shape[2:] == own.shape[2:]:
        if value.shape[1] == 3:
            adapted: torch.Tensor = adapt_input_conv(own.shape[1], value)
            return adapted
    return value


def _fit_positions(model: nn.Module, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Resample a square grid of positions; `value` as it is if it holds other prefix tokens than the model's."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None:
        return value
    prefix = own.shape[1] - grid[0] * grid[1]
    if not _is_square(value.shape[1] - prefix):
        if prefix or not _is_square(value.shape[1] - 1):
            return value
        value = value[:, 1:]  # a class token's, which a mean-pooling model doesn't have
    resampled: torch.Tensor = resample_abs_pos_embed(value, new_size=list(grid), num_prefix_tokens=prefix)
    return resampled


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
