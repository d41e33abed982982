"""timm's optimisers by name."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ftexp.config.schema import SGD_NAMES, OptimConfig, TrainConfig
from ftexp.errors import ConfigError
from ftexp.model.parallel.parts import is_sharded

# torch's optimisers with fused kernels, which update all parameters in one pass: 10 times faster than a loop on a CPU
_FUSED = ("adam", "adamw", *SGD_NAMES)


def build_optimizer(config: OptimConfig, train: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimiser. ConfigError if timm rejects the arguments.

    Parameters that the model excludes get no weight decay; nor do biases and norms, unless `config.filter_bias_and_bn`
    is false. With `config.layer_decay`, timm's parameter groups have an lr_scale, which its schedulers apply.

    The fused kernel is used if torch has one that is correct here, unless `config.kwargs` has `fused: false`.
    """
    fused = config.name in _FUSED and not config.kwargs.get("foreach")  # torch rejects both together
    if config.name in SGD_NAMES:  # torch has no fused SGD for shards
        fused = fused and not begins_unevenly(train) and not is_sharded(model)
    kwargs = {"fused": True, **config.kwargs} if fused else config.kwargs
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            filter_bias_and_bn=config.filter_bias_and_bn,
            layer_decay=config.layer_decay,
            **kwargs,
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError) as error:
        raise ConfigError(f"optim.name={config.name} can't be built: {error}. See optim.kwargs") from error
    return optimizer


def begins_unevenly(train: TrainConfig) -> bool:
    """Return whether a parameter's first step may be skipped, or may be later than other parameters' first step.

    torch's fused SGD supports neither: momentum would start from uninitialised memory, or the step raises.
    """
    return bool(train.freeze) or train.precision == "fp16"
