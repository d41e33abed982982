"""The model that a rank trains: whole, or this rank's part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from ftexp.config.schema import DDP, Config
from ftexp.data.info import DataInfo
from ftexp.data.order import derive_seed
from ftexp.model.build import build_model, initialise_head
from ftexp.model.compiling import compile_parts
from ftexp.model.ema import ShardedEMA, WeightsEMA
from ftexp.model.matching import WeightsReport
from ftexp.model.parallel.blocks import blocks_of
from ftexp.model.parallel.drafting import copied, draft
from ftexp.model.recomputing import recompute

if TYPE_CHECKING:
    from ftexp.model.parallel.sharding import Sharding

_INIT = 2  # stream of the run's seed; see ftexp.job.build


@dataclass(kw_only=True)
class TrainedModel:
    """A model on this rank's device, and what was built with it."""

    model: nn.Module
    report: WeightsReport | None  # report of pretrained weights
    sharding: Sharding | None = None
    twin: nn.Module | None = None  # a sharded copy, for the EMA
    counted: nn.Module | None = None  # a sharded model's copy without values, to count FLOPs

    def average(self, config: Config) -> WeightsEMA | None:
        """Return the EMA of the weights; None if none is configured."""
        if config.ema.decay is None:
            return None
        return WeightsEMA(config.ema, self.model) if self.twin is None else ShardedEMA(config.ema, self.twin)


def build_trained_model(config: Config, info: DataInfo, device: torch.device, world_size: int) -> TrainedModel:
    """Build the model with the initial or pretrained weights that the config names; collective if it is sharded.

    Its weights are bitwise identical, however it is distributed over ranks.
    """
    if config.parallel.kind != DDP:
        from ftexp.model.parallel.sharding import Sharding  # FSDP2 takes time to import

        return _sharded(config, info, Sharding(config.parallel, device, world_size))
    model, report = _initialised(config, info)
    if config.train.sync_bn:
        model = convert_sync_batchnorm(model)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    prepare(model, config)
    return TrainedModel(model=model.to(device), report=report)


def _sharded(config: Config, info: DataInfo, sharding: Sharding) -> TrainedModel:
    reports: list[WeightsReport | None] = []

    def build() -> nn.Module:
        model, report = _initialised(config, info)
        reports.append(report)
        return model

    drafted = draft(build, sharding.cut)
    counted = copied(drafted).model
    twin = sharding.shard(copied(drafted)) if config.ema.decay is not None else None
    prepare(drafted.model, config)
    model = sharding.shard(drafted)
    return TrainedModel(model=model, report=reports[-1], sharding=sharding, twin=twin, counted=counted)


def _initialised(config: Config, info: DataInfo) -> tuple[nn.Module, WeightsReport | None]:
    torch.manual_seed(derive_seed(config.seed, _INIT) % 2**63)
    model, report = build_model(config.model, info)
    initialise_head(model, config.model)
    return model, report


def prepare(model: nn.Module, config: Config) -> None:
    """Set up recomputation, which trades time for memory, and compilation, which makes later steps faster."""
    train, wrap = config.train, config.parallel.wrap
    if train.checkpoint_activations != "none":
        recompute(list(blocks_of(model, wrap).values()), train.checkpoint_activations)
    compile_parts(model, train.compiled, wrap)
