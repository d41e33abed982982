"""torch.compile, of the model or of its blocks, and where what it makes is kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ftexp.model.parallel.blocks import blocks_of


def compile_parts(model: nn.Module, setting: str, wrap: Sequence[str] = ()) -> None:
    """Have the model, or each of its blocks, compiled when it first runs; setting: `train.compiled`.

    Blocks that differ in their weights alone share what is compiled. wrap: see `blocks_of`.
    """
    if setting == "none":
        return
    keep_compiled()
    if setting == "model":
        model.compile()
        return
    blocks = blocks_of(model, wrap).values()
    # those of other shapes, or of another rate of stochastic depth, are compiled too; with and without gradients
    limits = torch.compiler.config
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(blocks))
    for block in blocks:
        block.compile()


def keep_compiled() -> None:
    """Have torch keep what it compiles in this user's cache, for workers that start again; not below /tmp, as it would.

    On this machine alone, and in no run directory: it is code that runs. TORCHINDUCTOR_CACHE_DIR names another place.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    directory = base / "ftexp" / "inductor"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # the home cannot be written to: torch then uses its own default
        return
    if os.access(directory, os.W_OK | os.X_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)
