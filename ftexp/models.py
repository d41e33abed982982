"""Builds the timm model that a config names, sized to the data."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv, get_pretrained_cfg, is_model, load_state_dict_from_hf
from torch import nn

from ftexp.config import ModelConfig
from ftexp.data.splits import DataInfo
from ftexp.errors import ConfigError, DataError

log = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # what DDP and torch.compile put before a tensor's name


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
        source, weights = str(config.pretrained), load_weights(Path(config.pretrained))
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


def load_weights(path: Path) -> StateDict:
    """Read a state dict from .safetensors, or from .pt/.pth without running any code in it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, OSError or SafetensorError, by what is wrong
        raise DataError(f"model.pretrained={path} can't be loaded as plain weights: {error}") from error
    for key in ("state_dict", "model"):  # how Lightning and timm, and DeiT, wrap theirs
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise DataError(f"model.pretrained={path} holds no state dict")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    return {_WRAPPERS.sub("", name): value for name, value in tensors.items()}


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


def load_matching(model: nn.Module, weights: StateDict, source: str) -> WeightsReport:
    """Load what fits into `model` and report the rest; ConfigError if nothing fits.

    A position embedding is resampled and an input convolution adapted to the channels, as timm does. A head
    with another number of classes is left as it was initialised.
    """
    own, fitting, resized = model.state_dict(), {}, []
    for name, value in weights.items():
        if name not in own:
            continue
        fitted = _fit(model, name, value, own[name])
        if fitted.shape == own[name].shape:
            fitting[name] = fitted
            if fitted.shape != value.shape:
                resized.append(name)
    if not fitting:
        raise ConfigError(f"model.pretrained={source}: none of its tensors fits the model; is it another architecture?")
    model.load_state_dict(fitting, strict=False)
    return WeightsReport(
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
