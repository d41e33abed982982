"""Sharding of a model by torch's FSDP2, block by block."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.modules.batchnorm import _BatchNorm

from ftexp.config.schema import HSDP, ParallelConfig
from ftexp.errors import ConfigError
from ftexp.model.parallel.blocks import blocks_of
from ftexp.model.parallel.drafting import Draft
from ftexp.model.parallel.memory import return_freed_memory
from ftexp.model.parallel.parts import cut

_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Sharding:
    """The ranks over which parameters are sharded by rows, cut as by torch.chunk. Creating it is collective.

    ConfigError if the number of ranks is not a multiple of `config.shard_size`.
    """

    def __init__(self, config: ParallelConfig, device: torch.device, world_size: int) -> None:
        self._config, self._device = config, device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a mesh uses the current device
        else:
            return_freed_memory()
        self._placements: tuple[Replicate | Shard, ...] = (Shard(0),)
        if config.kind == HSDP:
            assert config.shard_size is not None, "checked with the config"
            if world_size % config.shard_size:
                raise ConfigError(
                    f"{world_size} workers are not a multiple of parallel.shard_size={config.shard_size}: "
                    f"change scaling.num_workers or parallel.shard_size"
                )
            sizes = (world_size // config.shard_size, config.shard_size)
            self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))
            self._placements = (Replicate(), Shard(0))
        else:
            self.mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
        self._num_shards, self._index = self.mesh["shard"].size(), self.mesh["shard"].get_local_rank()

    def cut(self, whole: Tensor) -> Tensor:
        """Return this rank's rows of a parameter, as a view; a scalar unchanged."""
        return cut(whole, self._num_shards, self._index) if whole.ndim else whole

    def shard(self, draft: Draft) -> nn.Module:
        """Shard the draft's model, load its kept values, and return it; ConfigError if it can't be sharded."""
        model = draft.model
        _require_shardable(model, self._config)
        policy = MixedPrecisionPolicy(_DTYPES[self._config.param_dtype], _DTYPES[self._config.reduce_dtype])
        reshard = self._config.reshard_after_forward
        for block in reversed(blocks_of(model, self._config.wrap).values()):
            fully_shard(block, mesh=self.mesh, mp_policy=policy, reshard_after_forward=reshard)
        # parameters outside of blocks are needed again at the start of the backward pass
        fully_shard(model, mesh=self.mesh, mp_policy=policy, reshard_after_forward=False)
        values = {name: self._sharded(parameter, draft.kept[name]) for name, parameter in model.named_parameters()}
        model.load_state_dict(values, strict=False, assign=True)
        return model

    def _sharded(self, parameter: nn.Parameter, rows: Tensor) -> DTensor:
        rows = rows.to(self._device)
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(rows, self.mesh, self._placements, run_check=False, shape=shape, stride=stride)

    def begin_step(self, model: nn.Module) -> None:
        """Broadcast rank 0's buffers, such as batch norm's statistics, as DDP does before a step; collective."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            kinds.setdefault(buffer.dtype, []).append(buffer)
        for buffers in kinds.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, src=0)
            for buffer, values in zip(buffers, torch.split(flat, [each.numel() for each in buffers]), strict=True):
                buffer.copy_(values.view_as(buffer))

    def sync_replicas(self, model: nn.Module, *, is_last: bool) -> None:
        """Set whether the next backward pass sums gradients over replicas (`is_last`), or only within each replica.

        Within a replica, gradients are always summed: otherwise each rank would hold the whole model's gradient.
        """
        if len(self._placements) > 1:
            model.set_requires_all_reduce(is_last)  # type: ignore[operator]


def _require_shardable(model: nn.Module, config: ParallelConfig) -> None:
    if scalars := [name for name, parameter in model.named_parameters() if parameter.ndim == 0]:
        raise ConfigError(
            f"parallel={config.kind}: the parameter {scalars[0]} of this model has no dimension to shard: set "
            "parallel=ddp"
        )
    if config.param_dtype not in (None, "fp32") and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ConfigError(
            f"parallel.param_dtype={config.param_dtype}: batch norm's statistics are float32: remove it, and set "
            "train.precision instead"
        )
