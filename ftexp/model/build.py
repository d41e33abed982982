"""Building of the timm model that a config names, sized to the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, load_state_dict_from_hf
from torch import nn

from ftexp.config.schema import DataConfig, ModelConfig
from ftexp.data.info import DataInfo
from ftexp.errors import ConfigError, DataError
from ftexp.model.matching import WeightsReport, load_matching, match, require_half
from ftexp.model.timm_private import checkpoint_filter, classifier_names
from ftexp.model.weights import StateDict, load_weights

KEY = "model.pretrained"


def timm_arguments(config: ModelConfig, info: DataInfo) -> dict[str, Any]:
    """Return the arguments with which `timm.create_model(**arguments)` builds this model.

    Architectures with a fixed input size get `img_size`; others adapt to any size.
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


def build_model(config: ModelConfig, info: DataInfo, key: str = KEY) -> tuple[nn.Module, WeightsReport | None]:
    """Create the model on the CPU, with pretrained weights if `config.pretrained` asks for them.

    key: setting that errors about these weights name. Initialisation draws from torch's global generator: seed it
    first. ConfigError if timm rejects the arguments.
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
        source, weights = f"timm hub, {config.name}", _hub_weights(config.name, key)
    else:
        weights, source = load_weights(Path(config.pretrained).expanduser(), key=key)
    return model, load_matching(model, weights, source, key, checkpoint_filter(arguments))


def trained_model(config: ModelConfig, info: DataInfo, weights: StateDict) -> nn.Module:
    """Return the model on the CPU with the given weights; ignores `config.pretrained`."""
    model, _ = build_model(dataclasses.replace(config, pretrained=False), info)
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def initialise_head(model: nn.Module, config: ModelConfig, loaded: Collection[str] | None = None) -> None:
    """Scale the classifier and set its biases, as timm's train.py does; ConfigError if the model has no classifier.

    loaded: names of the tensors to scale, if the others are already scaled; None: all tensors of the classifier.
    """
    if config.head_init_scale is None and config.head_init_bias is None:
        return
    heads = {name: module for name, module in model.named_modules() if name in classifier_names(model)}
    heads = {name: head for name, head in heads.items() if getattr(head, "weight", None) is not None}
    heads = {name: head for name, head in heads.items() if head.bias is not None}
    if not heads:
        raise ConfigError(f"model.name={config.name} has no classifier with biases: remove model.head_init_*")
    for name, head in heads.items():
        for key, tensor in head.named_parameters(recurse=False):
            if config.head_init_scale is not None and (loaded is None or f"{name}.{key}" in loaded):
                tensor.mul_(config.head_init_scale)
        if config.head_init_bias is not None:
            nn.init.constant_(head.bias, config.head_init_bias)


def as_logits(output: Any, config: ModelConfig, num_classes: int) -> torch.Tensor:
    """Return a model's output; ConfigError if it is not logits of shape [images, num_classes]."""
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


def _hub_config(name: str, key: str = KEY) -> PretrainedCfg:
    """Return timm's config of a pretrained model; ConfigError if timm's hub has no weights for it."""
    pretrained_cfg = get_pretrained_cfg(name)
    if pretrained_cfg is None or not pretrained_cfg.has_weights:
        raise ConfigError(f"{key}=true, but timm's hub has no weights for model.name={name}")
    return pretrained_cfg


def _hub_weights(name: str, key: str) -> StateDict:
    pretrained_cfg = _hub_config(name, key)
    try:
        if pretrained_cfg.hf_hub_id:
            file = (pretrained_cfg.hf_hub_filename,) if pretrained_cfg.hf_hub_filename else ()
            return dict(load_state_dict_from_hf(pretrained_cfg.hf_hub_id, *file, weights_only=True))
        return dict(torch.hub.load_state_dict_from_url(pretrained_cfg.url, map_location="cpu", weights_only=True))
    except Exception as error:  # hub clients raise their own exception types when offline
        raise DataError(
            f"{key}=true: the weights of {name} can't be fetched ({error}); "
            "without a network, give the path of a weights file"
        ) from error


def check_weights(config: ModelConfig, data: DataConfig) -> None:
    """Raise ConfigError if the weights can't be read or don't fit the model. Uses only names and shapes.

    Weights of timm's hub aren't fetched; they are assumed to fit the model that timm builds by this name. The number of
    classes may not be known yet, but it affects only the head.
    """
    info = _assumed_info(data)
    if config.pretrained is True:
        _hub_config(config.name)
        source = f"timm hub, {config.name}"
        weights = without_values(lambda: timm.create_model(config.name)).state_dict()
    else:
        weights, source = load_weights(Path(config.pretrained).expanduser(), "meta")
    model = without_values_of(config, data)
    _, report = match(model, weights, source, KEY, checkpoint_filter(timm_arguments(config, info)))
    if not config.pretrained_partial:
        require_half(model, report, KEY)


def _assumed_info(data: DataConfig) -> DataInfo:
    """Return a DataInfo for building a model before the data are known; the number of classes may be wrong."""
    names = [str(number) for number in range(data.num_classes or 2)]
    return DataInfo(names, data.image_size, data.channels, data.mean, data.std, {})


def without_values_of(config: ModelConfig, data: DataConfig) -> nn.Module:
    """Return the configured model on the device meta; the number of classes of its head may be wrong."""
    info = _assumed_info(data)
    return without_values(lambda: build_model(dataclasses.replace(config, pretrained=False), info)[0])


def without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the built model on the device meta."""
    try:
        with torch.device("meta"):
            return build()
    except Exception:  # building needs values, or fails on any device
        return build().to("meta")
