"""Model FLOPs utilisation (MFU): the model's FLOP/s as a share of the device's peak. Unknown devices have none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ftexp.model.recomputing import computed_once

_ROWS = 2  # batch norm needs more than one

# FLOP/s of dense matrix products in bf16 and fp16, accumulated in fp32, by the name from torch.cuda.get_device_name.
# From NVIDIA's data sheets, halved where they count sparse products. fp32 is missing: whether it runs as TF32 depends
# on settings, and differs between convolutions and matrix products.
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
    """Return the FLOP/s of one device in bf16 or fp16; None if unknown."""
    return _PEAK.get(device_name) if precision in ("bf16", "fp16") else None


def flops_per_image(model: nn.Module, shape: tuple[int, int, int]) -> float:
    """Return the FLOPs per image of matrix products and convolutions in a forward and backward pass; an FMA is two.

    Counted on the meta device, from shapes alone: nothing is computed, and the model stays unchanged.
    """
    from torch.func import functional_call
    from torch.utils.flop_counter import FlopCounterMode

    meta = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    images = torch.empty((_ROWS, *shape), device="meta")
    # a compiled model would be compiled again for these shapes
    with torch.compiler.set_stance("force_eager"), computed_once(), FlopCounterMode(display=False) as counter:
        given = functional_call(model, meta, (images,))
        logits = given[0] + given[1] if isinstance(given, tuple) else given  # the head of a distillation token, too
        loss = F.cross_entropy(logits.float(), torch.zeros(_ROWS, dtype=torch.long, device="meta"))
        torch.autograd.grad(loss, [tensor for tensor in meta.values() if tensor.requires_grad], allow_unused=True)
    return float(counter.get_total_flops()) / _ROWS


class Utilisation:
    """Converts images/s to MFU, if the device's peak is known. The model's FLOPs are counted at the first use.

    `problem`: the reason if they can't be counted.
    """

    def __init__(self, device: torch.device, precision: str, num_devices: int, shape: tuple[int, int, int]) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(name, precision)
        self._peak = peak * num_devices if peak is not None else None
        self._shape = shape  # shape of an image: channels, height, width
        self._flops: dict[tuple[int, int, int], float] = {}  # by the shape of an image
        self.problem: str | None = None

    def restart_count(self) -> None:
        """Count the FLOPs again at the next use, since other parts of the model are trained from now on."""
        self._flops.clear()

    def at(self, images_per_s: float, model: nn.Module, image_size: int | None = None) -> float | None:
        """Return the MFU at `images_per_s`, as a share of all devices' peak; None if unknown.

        image_size: pixels; None: those of full size.
        """
        if self._peak is None or self.problem is not None:
            return None
        shape = self._shape if image_size is None else (self._shape[0], image_size, image_size)
        if shape not in self._flops:
            try:
                self._flops[shape] = flops_per_image(model, shape)
            # some models can't run on shapes alone, and raise anything; the run then has no MFU
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"
                return None
        return round(self._flops[shape] * images_per_s / self._peak, 4)
