"""Model FLOPs utilisation: what the model needs, by what the device could do. Unknown devices have none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ftexp.model.recomputing import computed_once

_ROWS = 2  # batch norm needs more than one

# FLOP/s of dense matrix products in bf16 and fp16, summed in fp32, by the name that torch.cuda.get_device_name tells.
# From NVIDIA's data sheets, halved where these count sparse products. fp32 isn't here: what it runs on (TF32 or not)
# is a matter of settings, and differs between convolutions and matrix products.
_PEAK = {
    "NVIDIA A10": 125e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of one device in bf16 or fp16; None where that isn't known."""
    return _PEAK.get(device_name) if precision in ("bf16", "fp16") else None


def flops_per_image(model: nn.Module, shape: tuple[int, int, int]) -> float:
    """FLOPs of matrix products and convolutions in a forward and backward pass, by image; a fma is two.

    Counted on the meta device: shapes alone, so that nothing is computed, and the model is left as it is.
    """
    from torch.func import functional_call
    from torch.utils.flop_counter import FlopCounterMode

    meta = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    images = torch.empty((_ROWS, *shape), device="meta")
    # a compiled model would be compiled anew for these shapes
    with torch.compiler.set_stance("force_eager"), computed_once(), FlopCounterMode(display=False) as counter:
        given = functional_call(model, meta, (images,))
        logits = given[0] + given[1] if isinstance(given, tuple) else given  # a distillation token's, too
        loss = F.cross_entropy(logits.float(), torch.zeros(_ROWS, dtype=torch.long, device="meta"))
        torch.autograd.grad(loss, [tensor for tensor in meta.values() if tensor.requires_grad], allow_unused=True)
    return float(counter.get_total_flops()) / _ROWS


class Utilisation:
    """Turns images/s into MFU, where the device's peak is known. The model is counted when first asked.

    `problem` tells why it can't be counted, if it can't.
    """

    def __init__(self, device: torch.device, precision: str, num_devices: int, shape: tuple[int, int, int]) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(name, precision)
        self._peak = peak * num_devices if peak is not None else None
        self._shape = shape  # of an image: channels, height, width
        self._flops: float | None = None
        self.problem: str | None = None

    def count_anew(self) -> None:
        """Other parts of the model are trained from now on."""
        self._flops = None

    def at(self, images_per_s: float, model: nn.Module) -> float | None:
        """The share of the devices' peak that so many images a second are; None where that isn't known."""
        if self._peak is None or self.problem is not None:
            return None
        if self._flops is None:
            try:
                self._flops = flops_per_image(model, self._shape)
            # models are other people's code, and some can't do with shapes alone: the run is as good without
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"
                return None
        return round(self._flops * images_per_s / self._peak, 4)
