"""The names that timm knows, read from its source files: importing timm takes seconds, this takes 0.1 s.

`tests/unit/test_models.py` compares the lists with `timm.list_models()` and `timm.optim.list_optimizers()`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path


def timm_directory() -> Path:
    """Return the directory of timm's source files."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None, "timm is a dependency of ftexp"
    assert spec.origin is not None
    return Path(spec.origin).parent


_REGISTERED = re.compile(r"^@register_model\ndef (\w+)\(", re.MULTILINE)
_OTHER_MODELS = re.compile(r"^from (?:\.|timm\.models\.)[a-z]", re.MULTILINE)  # imports of models from another file


def _model_files() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in (timm_directory() / "models").glob("*.py")]


@functools.cache
def model_names() -> frozenset[str]:
    """Return every architecture name that `timm.create_model` accepts."""
    return frozenset(name for text in _model_files() for name in _REGISTERED.findall(text))


@functools.cache
def without_drop_path() -> frozenset[str]:
    """Return the architectures known to have no stochastic depth; timm itself rejects it for some others."""
    files = [text for text in _model_files() if "drop_path" not in text and not _OTHER_MODELS.search(text)]
    return frozenset(name for text in files for name in _REGISTERED.findall(text))


@functools.cache
def optimizer_names() -> frozenset[str]:
    """Return every optimiser name that `timm.optim.create_optimizer_v2` accepts."""
    source = (timm_directory() / "optim" / "_optim_factory.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r"(?:OptimInfo|register_alias)\(\s*(?:name=)?'(\w+)'", source))
