"""Matching of weights with a model: timm's own filter, then names and shapes, with a report of what doesn't match."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import nn

from ftexp.errors import ConfigError
from ftexp.model.parallel.parts import load_weights
from ftexp.model.timm_private import Filter, classifier_names
from ftexp.model.weights import StateDict, nothing_fits

_MIN_SHARE = 0.5  # minimum share of the model's parameters, without the classifier's, that weights must provide


@dataclass(frozen=True)
class WeightsReport:
    """Result of loading pretrained weights. Tensors are named as in the model's state dict."""

    source: str
    matched: list[str]
    resized: list[str]  # position tables, patch embeddings and input convolutions, resized by timm's own functions
    missing: list[str]  # keys of the model that the weights lack; they start from scratch
    unused: list[str]  # keys of the weights that the model lacks, or has with another shape

    def __str__(self) -> str:
        total = len(self.matched) + len(self.resized) + len(self.missing)
        text = f"{self.source}: {len(self.matched) + len(self.resized)} of {total} tensors loaded"
        for title, names in (("resized", self.resized), ("from scratch", self.missing), ("unused", self.unused)):
            if names:
                text += f"; {title}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        return text


def load_matching(
    model: nn.Module, weights: StateDict, source: str, key: str, filter_fn: Filter | None
) -> WeightsReport:
    """Load the tensors that fit into `model` and report the rest; ConfigError, which names `key`, if none fits.

    filter_fn: timm's filter for this model. A head with another number of classes keeps its initialisation.
    """
    fitting, report = match(model, weights, source, key, filter_fn)
    load_weights(model, fitting, strict=False)
    return report


def match(
    model: nn.Module, weights: StateDict, source: str, key: str, filter_fn: Filter | None
) -> tuple[StateDict, WeightsReport]:
    """Return the tensors that fit into `model`, adapted to its shapes, and a report; ConfigError if none fits."""
    own: StateDict = model.state_dict()
    fitting: StateDict = {}
    offered, before, others = weights, weights, list[str]()
    for candidate, rest in _candidates(weights, len(own)):
        filtered = _filtered(filter_fn, candidate, model)
        found = _fitting(model, filtered, own)
        if len(found) > len(fitting):
            fitting, offered, before, others = found, filtered, candidate, rest
        if len(fitting) > len(own) / 2:
            break
    if not fitting:
        raise ConfigError(nothing_fits(key, source, weights, own))
    resized = [name for name, value in fitting.items() if _is_resized(name, value, before)]
    return fitting, WeightsReport(
        source=source,
        matched=[name for name in fitting if name not in resized],
        resized=resized,
        missing=[name for name in own if name not in fitting],
        unused=[*others, *(name for name in offered if name not in fitting)],
    )


def require_half(model: nn.Module, report: WeightsReport, key: str) -> None:
    """Raise ConfigError if the weights provide less than half of the model's parameters, without the classifier's."""
    heads = tuple(f"{name}." for name in classifier_names(model))
    sizes = {name: each.numel() for name, each in model.named_parameters() if not name.startswith(heads)}
    loaded = [name for name in (*report.matched, *report.resized) if name in sizes]
    total, taken = sum(sizes.values()), sum(sizes[name] for name in loaded)
    if taken < _MIN_SHARE * total:
        raise ConfigError(
            f"{key}={report.source} gives {len(loaded)} of the model's {len(sizes)} parameter tensors, {taken:,} of "
            f"{total:,} numbers ({taken / total:.0%}, the classifier's not counted), less than half: use weights of "
            "this architecture, or set model.pretrained_partial=true to train the rest from scratch"
        )


def _candidates(weights: StateDict, num_own: int) -> Iterator[tuple[StateDict, list[str]]]:
    """Yield (weights, names of the tensors that are not in them): first all weights, then those with a common prefix.

    A prefix such as net. or backbone. is removed if more names have it than half of the model's number of tensors.
    """
    yield weights, []
    prefixes = Counter(name[: dot.end()] for name in weights for dot in re.finditer(r"\.", name))
    for prefix, number in prefixes.items():
        if number > num_own / 2:
            stripped = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
            yield stripped, [name for name in weights if not name.startswith(prefix)]


def _filtered(filter_fn: Filter | None, weights: StateDict, model: nn.Module) -> StateDict:
    """Return the weights after timm's filter; unchanged if there is no filter or if it fails on them."""
    for arguments in ((model,), ()) if filter_fn is not None else ():  # some filters take only the state dict
        try:
            assert filter_fn is not None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about timm's interpolation
                filtered = filter_fn(dict(weights), *arguments)
            return {name: value for name, value in filtered.items() if isinstance(value, torch.Tensor)}
        except Exception:  # filters look up names, and resample assumed square grids: KeyError, RuntimeError, ...
            continue
    return weights


def _fitting(model: nn.Module, weights: StateDict, own: StateDict) -> StateDict:
    fitting = {}
    for name, value in weights.items():
        if name in own:
            fitted = _fit(model, name, value, own[name])
            if fitted.shape == own[name].shape:
                fitting[name] = fitted
    return fitting


def _is_resized(name: str, value: torch.Tensor, before: StateDict) -> bool:
    """Return whether `value` had another shape before; if a filter renamed it, whether no tensor had its shape."""
    if name in before:
        return before[name].shape != value.shape
    return all(each.shape != value.shape for each in before.values())


def _fit(model: nn.Module, name: str, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    if value.shape == own.shape:
        return value
    if name == "pos_embed" and value.ndim == own.ndim == 3 and value.shape[-1] == own.shape[-1]:
        return _fit_positions(model, value, own)
    if value.ndim == own.ndim == 4 and value.shape[0] == own.shape[0] and value.shape[2:] == own.shape[2:]:
        if value.shape[1] == 3:
            adapted: torch.Tensor = adapt_input_conv(own.shape[1], value)
            return adapted
    return value


def _fit_positions(model: nn.Module, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Resample a square grid of position embeddings in cases that timm's filter doesn't handle.

    These are models without a filter, and models without the class token that the weights have. Returns `value`
    unchanged if it has other prefix tokens than the model.
    """
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None:
        return value
    prefix = own.shape[1] - grid[0] * grid[1]
    if not _is_square(value.shape[1] - prefix):
        if prefix or not _is_square(value.shape[1] - 1):
            return value
        value = value[:, 1:]  # remove the class token, which a mean-pooling model doesn't have
    resampled: torch.Tensor = resample_abs_pos_embed(value, new_size=list(grid), num_prefix_tokens=prefix)
    return resampled


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
