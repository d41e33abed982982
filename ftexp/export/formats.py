"""Writing a model in each format, and reading it back as its user would.

The input of the graphs of torch_export and onnx is pixels, uint8 [batch, size, size, channels]. The graphs include the
scaling to 0..1 and the normalisation, so the user's code can't get mean and std wrong. Weights in safetensors are for
timm, which normalises by config.json. The output is always logits, float32 [batch, classes].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ftexp.data.feeds.feed import ToTensors
from ftexp.data.info import DataInfo
from ftexp.data.sources.arrays import UInt8s
from ftexp.registry import Registry

Answer = Callable[[UInt8s], npt.NDArray[np.float32]]  # pixels -> logits
Format = Callable[[nn.Module, DataInfo, dict[str, Any], Path], Answer]
formats: Registry[Format] = Registry("format")

_ABOUT = "about.json"  # name of a file inside a .pt2
_EXAMPLE_ROWS = 2  # one row would fix the batch size to one
_MAX_PROTOBUF_BYTES = 2**31 - 2**24  # limit of an ONNX file; larger weights are stored in a file next to it


class FromPixels(nn.Module):
    """The model with scaling and normalisation before it, as in ToTensors."""

    def __init__(self, model: nn.Module, info: DataInfo) -> None:
        super().__init__()
        self.model = model
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(info.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(info.std).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits of uint8 [batch, height, width, channels]."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32) / 255
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


def answers(model: nn.Module, info: DataInfo) -> Answer:
    """Return a function that computes a model's logits for pixels, prepared as in evaluation."""
    to_tensors = ToTensors(info, torch.device("cpu"), channels_last=False)

    def answer(pixels: UInt8s) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = model(to_tensors(pixels)).float().numpy()
        return logits

    return answer


@formats.register("safetensors")
def safetensors(model: nn.Module, info: DataInfo, about: dict[str, Any], directory: Path) -> Answer:
    """Write model.safetensors and config.json for timm.create_model("local-dir:<directory>", pretrained=True)."""
    import timm
    from safetensors.torch import save_model

    save_model(model, str(directory / "model.safetensors"), metadata={"format": "pt"})
    arguments = dict(about["arguments"])
    size = [info.channels, info.image_size, info.image_size]
    config = {
        "architecture": arguments.pop("model_name").partition(".")[0],
        "num_classes": arguments.pop("num_classes"),
        "model_args": arguments,
        "label_names": info.class_names,
        "pretrained_cfg": {
            "input_size": size,
            "num_classes": info.num_classes,
            "mean": info.mean,
            "std": info.std,
            "interpolation": info.interpolation,
            "crop_pct": info.crop_pct or 1.0,
            "crop_mode": info.crop_mode,
            "custom_load": False,
            **({"fixed_input_size": True} if "img_size" in arguments else {}),
        },
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return answers(timm.create_model(f"local-dir:{directory}", pretrained=True).eval(), info)


@formats.register("torch_export")
def torch_export(model: nn.Module, info: DataInfo, about: dict[str, Any], directory: Path) -> Answer:
    """Write model.pt2, a torch.export program; its extra file about.json has the metadata."""
    program = torch.export.export(
        FromPixels(model, info).eval(),
        (_example(info),),
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}},
    )
    path = directory / "model.pt2"
    torch.export.save(program, path, extra_files={_ABOUT: json.dumps(about)})
    loaded = torch.export.load(path).module()

    def answer(pixels: UInt8s) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = loaded(torch.from_numpy(pixels)).numpy()
        return logits

    return answer


@formats.register("onnx")
def onnx(model: nn.Module, info: DataInfo, about: dict[str, Any], directory: Path) -> Answer:
    """Write model.onnx, with input `pixels` and output `logits`; its metadata_props have the metadata."""
    import onnxruntime

    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    program = torch.onnx.export(
        FromPixels(model, info).eval(),
        (_example(info),),
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None, "dynamo gives one"
    for key, value in about.items():
        program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    path = directory / "model.onnx"
    program.save(path, external_data=num_bytes > _MAX_PROTOBUF_BYTES)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def answer(pixels: UInt8s) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = session.run(["logits"], {"pixels": pixels})[0]
        return logits

    return answer


def _example(info: DataInfo) -> Tensor:
    return torch.zeros(_EXAMPLE_ROWS, info.image_size, info.image_size, info.channels, dtype=torch.uint8)
