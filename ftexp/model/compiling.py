"""torch.compile for the model or its blocks, and the location of its cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ftexp.model.parallel.blocks import blocks_of


def compile_parts(model: nn.Module, setting: str, wrap: Sequence[str] = ()) -> None:
    """Set the model, or each of its blocks, to be compiled at its first run.

    setting: `train.compiled`. wrap: see `blocks_of`. Blocks that differ only in their weights share the compiled code.
    """
    if setting == "none":
        return
    keep_compiled()
    if setting == "model":
        model.compile()
        return
    blocks = blocks_of(model, wrap).values()
    # blocks of different shapes or stochastic depth are compiled separately, each with and without gradients
    limits = torch.compiler.config
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(blocks))
    for block in blocks:
        block.compile()


def keep_compiled() -> None:
    """Set torch's compile cache to this user's cache directory instead of /tmp, so that restarted workers reuse it.

    The cache stays on this machine and outside of run directories, since it contains executable code.
    TORCHINDUCTOR_CACHE_DIR overrides the location.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    directory = base / "ftexp" / "inductor"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # the home directory is not writable: torch uses its own default
        return
    if os.access(directory, os.W_OK | os.X_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)
