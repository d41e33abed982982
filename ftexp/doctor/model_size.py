"""Size of the model, without allocating its weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ftexp.config.schema import Config

_CLASSES = 1000  # assumed number of classes if the config has none: it is known only once the data is read
_BYTES = 4  # bytes of a weight
# size of the optimiser's state, in copies of the weights; unlisted optimisers: 2, as for adamw
_STATES = {"sgd": 1, "momentum": 1, "nesterov": 1, "lion": 1, "adafactor": 0}


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the model, for checks of disks and networks."""

    num_parameters: int
    checkpoint_bytes: int


def model_size(config: Config) -> ModelSize:
    """Count the model's weights on torch's meta device; ConfigError if timm refuses the model."""
    from ftexp.data.info import DataInfo
    from ftexp.model.build import build_model, without_values
    from ftexp.registry import load_plugins

    load_plugins(config.plugins)
    data, model = config.data, dataclasses.replace(config.model, pretrained=False)
    names = list(map(str, range(data.num_classes or _CLASSES)))
    info = DataInfo(names, data.image_size, data.channels, list(data.mean), list(data.std), {})
    built = without_values(lambda: build_model(model, info)[0])
    count = sum(parameter.numel() for parameter in built.parameters())
    copies = 1 + _STATES.get(config.optim.name, 2) + (config.ema.decay is not None)
    return ModelSize(count, _BYTES * count * copies)
