"""The names timm knows, read from its source files: importing timm takes seconds, this takes 0.1 s.

`tests/test_models.py` holds the lists against `timm.list_models()` and `timm.optim.list_optimizers()`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path


def _timm_folder() -> Path:
    spec = importlib.util.find_spec("timm")
    assert spec is not None, "timm is a dependency of ftexp"
    assert spec.origin is not None
    return Path(spec.origin).parent


@functools.cache
def model_names() -> frozenset[str]:
    """Every architecture name `timm.create_model` takes."""
    pattern = re.compile(r"^@register_model\ndef (\w+)\(", re.MULTILINE)
    files = (_timm_folder() / "models").glob("*.py")
    return frozenset(name for file in files for name in pattern.findall(file.read_text(encoding="utf-8")))


@functools.cache
def optimizer_names() -> frozenset[str]:
    """Every optimiser name `timm.optim.create_optimizer_v2` takes."""
    source = (_timm_folder() / "optim" / "_optim_factory.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r"(?:OptimInfo|register_alias)\(\s*(?:name=)?'(\w+)'", source))
