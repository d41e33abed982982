"""Reading of weights files as plain data, whatever wraps their state dict."""

from __future__ import annotations

import argparse
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ftexp.errors import ConfigError

StateDict = dict[str, torch.Tensor]

# keys under which training code stores its state dict; the first one found is used, an EMA before others, as in timm
_KEYS = (
    *("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "model_state", "ema"),
    *("teacher", "student", "module", "net", "network", "weights", "params"),
)
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # prefixes that DDP and torch.compile add to tensor names
_MAX_SHOWN = 3  # names of tensors, or keys, in a message
_RESAVE = "where you trust it, load it by torch.load(..., weights_only=False), and torch.save its state dict alone"


def load_weights(path: Path, device: str = "cpu", key: str = "model.pretrained") -> tuple[StateDict, str]:
    """Return (state dict, description of its source) of a PyTorch or safetensors file, without running code in it.

    The format is detected from the content, not from the file name. On the device "meta", tensors have shapes only.
    ConfigError, which names `key`, if the file can't be read or holds no state dict.
    """
    try:
        loaded = _read(path, device)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError, OSError, SafetensorError, ...
        reason = _reason(path, error)
        raise ConfigError(f"{key}={path} can't be loaded as plain weights: {reason}") from error
    source = str(path)
    while isinstance(loaded, dict) and (keys := _inside(loaded)):
        if len(keys) > 1:
            source += f" ({keys[0]}; also there: {', '.join(keys[1:])})"
        loaded = loaded[keys[0]]
    tensors = loaded.items() if isinstance(loaded, dict) else ()
    weights = {_WRAPPERS.sub("", str(name)): value for name, value in tensors if isinstance(value, torch.Tensor)}
    if not weights:
        found = f"a dict of {_some(list(loaded))}" if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise ConfigError(f"{key}={path} holds {found}, not a state dict: save only the state dict of a model")
    return weights, source


def nothing_fits(key: str, source: str, weights: StateDict, own: StateDict) -> str:
    """Return the message for weights of which no tensor fits the model."""
    same = [name for name in own if name in weights]
    detail = f"{key}={source}: 0 of the model's {len(own)} tensors can be taken from its {len(weights)}: "
    if same:
        shapes = f"{same[0]} is {list(weights[same[0]].shape)} there, {list(own[same[0]].shape)} in the model"
        return f"{detail}{len(same)} match by name, none by shape ({shapes}); use weights of a model of this size"
    names = f"it has {_some(list(weights))}, the model {_some(list(own))}"
    return f"{detail}none match by name ({names}); use weights of this architecture, or rename them as in the model"


def _read(path: Path, device: str) -> Any:
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # after 8 bytes with the header's length
    if not is_safetensors:
        # argparse.Namespace holds the training arguments, for example in files of DeiT, MAE and DINO: plain data
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns before it raises for the same reason
            return torch.load(path, map_location=device, weights_only=True)
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors:
        if device != "meta":
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no dict
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _inside(loaded: dict[Any, Any]) -> list[str]:
    """Return the keys of nested state dicts, the one to use first: known keys, else the only key with tensors."""
    if known := [key for key in _KEYS if isinstance(loaded.get(key), dict)]:
        return known
    if any(isinstance(value, torch.Tensor) for value in loaded.values()):
        return []
    holds = [key for key, value in loaded.items() if isinstance(value, dict) and _has_tensors(value)]
    return holds if len(holds) == 1 else []


def _has_tensors(value: dict[Any, Any]) -> bool:
    return any(isinstance(part, torch.Tensor) for part in value.values())


def _reason(path: Path, error: Exception) -> str:
    """Return one line about what is wrong with a file and what to do, without torch's advice to run its code."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if wanted := re.search(r"Unsupported (?:global|class|function|operand).*?GLOBAL (\S+)", text):
        return f"it holds {wanted[1]}, which is not plain data: loading it could run code; {_RESAVE}"
    if "TorchScript" in text:
        return f"it is a TorchScript archive, which holds code to run; {_RESAVE}"
    if isinstance(error, PermissionError):
        return "it may not be read by this user; change its permissions"
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        return "it is empty; fetch it again"
    if start.startswith(b"PK"):
        return "it is truncated or corrupt; fetch it again"
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    detail = f"{type(error).__name__}: {first}" if start[8:9] == b"{" else f"it begins with {start!r}"
    return f"it is not a PyTorch or safetensors file, or it is corrupt ({detail}); check what it is, or fetch it again"


def _some(names: list[Any]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(map(str, names[:_MAX_SHOWN])) + more if names else "nothing"
