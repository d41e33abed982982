"""Checks of the architecture, its arguments and its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from ftexp.config.checks.wording import unknown, yaml_text
from ftexp.config.schema import Config, config_dir
from ftexp.config.timm_names import model_names
from ftexp.registry import FROM_PLUGINS

_NO_LOGITS = {"features_only": "a list of feature maps", "aux_logits": "a tuple while it trains"}


def check_model(config: Config) -> Iterator[str]:
    """Check the name, arguments, patch size and weights."""
    model = config.model
    architecture = model.name.partition(".")[0]  # timm names read architecture.pretrained_tag
    # a plug-in may register models with timm; timm then reports an unknown name later
    if not config.plugins and ":" not in model.name and architecture not in model_names():
        groups = [file.stem for file in (config_dir() / "model").glob("*.yaml")]
        near_group = get_close_matches(model.name, groups, n=1, cutoff=0.85)
        there = f"timm has {len(model_names())} architectures; the config group model lists the usual ones."
        where = f"{there} {FROM_PLUGINS}"
        if near_group:
            yield (
                f"model.name='{model.name}' is unknown. Did you mean the config group option model={near_group[0]}? "
                f"{where}"
            )
        else:
            yield unknown("model.name", model.name, model_names(), where)
    for key, owner in (
        ("num_classes", "data.num_classes"),
        ("in_chans", "data.channels"),
        ("img_size", "data.image_size"),
    ):
        if key in model.kwargs:
            yield f"model.kwargs.{key}={model.kwargs[key]} is derived from the data: set {owner} instead"
    for key, owner in (
        ("model_name", "model.name"),
        ("pretrained", "model.pretrained"),
        ("checkpoint_path", "model.pretrained"),
    ):
        if key in model.kwargs:
            yield f"model.kwargs.{key}={model.kwargs[key]} conflicts with {owner}; set only {owner}"
    for key, output in _NO_LOGITS.items():
        if model.all_kwargs().get(key) and not config.plugins:  # for a plug-in it may mean something else
            given = f"model.kwargs.{key}={model.all_kwargs()[key]}"
            yield f"{given}: the model then returns {output}, not logits: remove it"
    in_name = re.search(r"patch(\d+)", model.name)
    patch = model.all_kwargs().get("patch_size", int(in_name[1]) if in_name else None)
    if isinstance(patch, int) and patch > 0 and config.data.image_size % patch:
        sizes = [size for size in (1, 2, 4, 7, 8, 14, 16, 32) if config.data.image_size % size == 0]
        yield (
            f"data.image_size={config.data.image_size} is not divisible by the patch size {patch} of "
            f"model.name={model.name}: set model.kwargs.patch_size to one of {sizes}, or another data.image_size"
        )
    if isinstance(model.pretrained, str):
        path = Path(model.pretrained).expanduser()
        if not path.is_file():
            found = "a directory" if path.is_dir() else "no such file"
            yield f"model.pretrained={model.pretrained}: {found}. Give a PyTorch or safetensors file, or true"
    elif not isinstance(model.pretrained, bool):
        yield f"model.pretrained={yaml_text(model.pretrained)} must be true, false, or the path of a weights file"
    elif model.pretrained_partial and not model.pretrained:
        yield "model.pretrained_partial=true needs model.pretrained: remove it, or set model.pretrained"
