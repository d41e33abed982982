"""timm's optimisers by name."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ftexp.config.schema import SGD_NAMES, OptimConfig, TrainConfig
from ftexp.errors import ConfigError
from ftexp.model.parallel.parts import is_sharded

# optimisers of torch with fused kernels, which update all parameters in one pass: on a CPU, 10 times faster than a loop
_FUSED = ("adam", "adamw", *SGD_NAMES)


def build_optimizer(config: OptimConfig, train: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimiser. ConfigError if timm refuses the arguments.

    Biases and norms get no weight decay, unless `config.filter_bias_and_bn` is false; nor does what the model excludes.
    With `config.layer_decay`, timm's groups carry an lr_scale, which its schedules respect.

    The fused kernel is used where torch has one and it is sound, unless `config.kwargs` says `fused: false`.
    """
    fused = config.name in _FUSED and not config.kwargs.get("foreach")  # torch refuses both together
    if config.name in SGD_NAMES:  # for shards, torch has no fused SGD either
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
    """Return whether a parameter's first step may be skipped, or come later than others'.

    torch's fused SGD takes neither: momentum then begins as whatever lay in memory, or the step raises.
    """
    return bool(train.freeze) or train.precision == "fp16"
