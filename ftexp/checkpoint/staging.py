"""State on its way between a job and bytes: copied to the CPU, checked, serialised, and read back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

from ftexp.errors import CheckpointError
from ftexp.storage.directory import Writer


class Staging:
    """Copies state to the CPU, into memory that is kept: new memory costs several times as long as the copy."""

    def __init__(self, device: torch.device) -> None:
        self._pin = device.type == "cuda"
        self._kept: dict[tuple[Any, ...], torch.Tensor] = {}  # by their path in the tree

    def copy(self, value: Any) -> Any:
        """A deep copy whose tensors later steps don't change; it holds until the next call."""
        copied = self._copy(value, ())
        if self._pin:
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value.detach(), path)
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self._copy(item, (*path, number)) for number, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def _copy_tensor(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> torch.Tensor:
        kept = self._kept.get(path)
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
            pin = self._pin and tensor.is_cuda
            kept = self._kept[path] = torch.empty_like(tensor, device="cpu", pin_memory=pin)
        return kept.copy_(tensor, non_blocking=True)


def writer(part: Any) -> Writer:
    """What writes one file of a checkpoint."""

    def write(stream: Any) -> None:
        # the zip's own checksums would be computed beside the SHA-256 of every byte; torch.load doesn't read them
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(part, stream)
        finally:
            torch.serialization.set_crc32_options(before)

    return write


def load_part(name: str, content: bytes) -> Any:
    """Read one file of a checkpoint onto the CPU without running code in it; CheckpointError if it has any."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError or EOFError, by what is wrong
        raise CheckpointError(f"{name} can't be loaded as plain data: {error}") from error


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.is_floating_point():
        return True
    # one pass and no copy: NaN and infinity survive a sum
    narrow = tensor.dtype in (torch.float16, torch.bfloat16)
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32 if narrow else tensor.dtype)))
