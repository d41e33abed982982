"""Check whether a model accepts the image sizes of progressive resizing."""

from __future__ import annotations

import torch
from torch import nn

from ftexp.config.schema import Config
from ftexp.data.augment.resizing import sizes
from ftexp.errors import ConfigError
from ftexp.model.build import without_values_of


def check_sizes(config: Config) -> None:
    """Raise ConfigError if the model rejects an image size that the run may train on. Uses only shapes."""
    model, data = without_values_of(config.model, config.data), config.data
    if _refusal(model, data.channels, data.image_size) is not None:
        return  # the size is not the cause: for example, the forward pass needs values
    for size in sizes(config.resizing, data.image_size):
        if error := _refusal(model, data.channels, size):
            raise ConfigError(
                f"resizing.initial_scale={config.resizing.initial_scale} trains on images of {size} px, which "
                f"model.name={config.model.name} refuses ({error}). For a ViT, set model.kwargs.dynamic_img_size=true "
                "and resizing.size_increment to its patch size; otherwise set resizing=none"
            )


def _refusal(model: nn.Module, channels: int, size: int) -> str | None:
    try:
        model(torch.empty((2, channels, size, size), device="meta"))
    except Exception as error:  # code of timm or a plug-in may raise anything
        return str(error).partition("\n")[0] or type(error).__name__
    return None
