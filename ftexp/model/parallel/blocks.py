"""The repeated blocks of a model: the units of gathering, compilation and recomputation."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import nn

from ftexp.errors import ConfigError
from ftexp.registry import did_you_mean

_MAX_SUGGESTED = 3


def blocks_of(model: nn.Module, wrap: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return the blocks by name, in the model's order; ConfigError if there are none.

    wrap: patterns of module names, where * matches one part between dots. Without patterns, the blocks are the modules
    that timm counts as layers: the model's `group_matcher` numbers them, and they have a forward pass.
    """
    modules = {name: module for name, module in model.named_modules() if name and _computes(module)}
    if wrap:
        names = {name for pattern in wrap for name in _matched(pattern, modules)}
    else:
        names = {name for name in modules if any(rule.fullmatch(name) for rule in timm_rules(model))}
        if not names:
            raise ConfigError(
                f"timm numbers no blocks of this model ({type(model).__name__}), so they must be named: "
                f"{_suggestion(modules)}"
            )
    return {name: module for name, module in modules.items() if name in names}


def timm_rules(model: nn.Module) -> list[re.Pattern[str]]:
    """Return the patterns of block names in a timm model's `group_matcher`; [] if the model has none.

    Entries with a suffix are omitted: they match modules between blocks, such as a stage's downsampling.
    """
    matcher = getattr(model, "group_matcher", None)
    found = matcher(coarse=False) if matcher is not None else {}
    entries = found.get("blocks") if isinstance(found, dict) else None
    if isinstance(entries, str):
        entries = [(entries, None)]
    return [re.compile(pattern) for pattern, suffix in entries or () if suffix is None]


def _computes(module: nn.Module) -> bool:
    """Return whether a module has parameters and its own forward pass."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward:
        return False
    return any(True for _ in module.parameters())


def _matched(pattern: str, modules: dict[str, nn.Module]) -> list[str]:
    parts = pattern.split(".")
    found = [name for name in modules if _fits(name.split("."), parts)]
    if not found:
        suggested = did_you_mean(pattern, modules)
        raise ConfigError(f"parallel.wrap: {pattern} matches no module of the model.{suggested} {_suggestion(modules)}")
    return found


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(parts) == len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern))


def _suggestion(modules: dict[str, nn.Module]) -> str:
    """Return advice that names patterns of the model's modules."""
    found = list(_repeated(modules))[:_MAX_SUGGESTED]
    options = " or ".join(f"'parallel.wrap=[{pattern}]'" for pattern in found)
    return f"try {options}" if found else "give parallel.wrap=[<pattern of module names>], or set parallel=ddp"


def _repeated(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Yield patterns that match several modules of one class, those with the most parameters first."""
    kinds: dict[str, list[nn.Module]] = defaultdict(list)
    for name, module in modules.items():
        *path, last = name.split(".")
        if last.isdigit():
            kinds[".".join("*" if part.isdigit() else part for part in (*path, last))].append(module)
    sizes = {
        pattern: sum(parameter.numel() for module in found for parameter in module.parameters())
        for pattern, found in kinds.items()
        if len(found) > 1 and len({type(module) for module in found}) == 1
    }
    yield from sorted(sizes, key=lambda pattern: (-sizes[pattern], pattern.count(".")))
