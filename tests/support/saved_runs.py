"""Run directories like those of a trained run, made without training."""

import dataclasses
import json

import numpy as np
import timm
import torch
from omegaconf import OmegaConf

from ftexp.checkpoint.manifest import Manifest
from ftexp.checkpoint.staging import writer
from ftexp.checkpoint.store import CheckpointStore
from ftexp.cli.trained_run import SavedRun
from ftexp.data.info import DataInfo
from ftexp.model.build import timm_arguments
from ftexp.rundir.names import CHECKPOINTS, RUN_FILE
from ftexp.storage.directory import Storage
from tests.support.configs import composed

CLASSES = ["ant", "bee", "cow"]
CHECKPOINT = "step_00000007.a1"


def saved_run(directory, *overrides, channels=3, size=8, average=None):
    """Write a run with random weights, including batch norms, and one checkpoint; `average`: its EMA weights."""
    storage = Storage.at(str(directory))
    config = composed("augment=none", *overrides)
    info = DataInfo(CLASSES, size, channels, [0.4] * channels, [0.25] * channels, {"train": 1})
    storage.write_bytes("config.yaml", OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))).encode())
    arguments = timm_arguments(config.model, info)
    record = {"name": "run", "data": {"name": config.data.name, **vars(info)}, "model": {"arguments": arguments}}
    storage.write_bytes(RUN_FILE, json.dumps(record).encode())
    state = random_weights(timm.create_model(**arguments)).state_dict()
    extra = {"ema": {"weights": average}} if average is not None else {"ema": {}}
    parts = {"model.pt": state, "optimizer.pt": {}, "extra_state.pt": extra}
    manifest = Manifest(CHECKPOINT, 7, 2, 70, 1, 1, {"val_accuracy": 0.5}, {}, "a test", 0.0, {}, {})
    CheckpointStore(storage.child(CHECKPOINTS)).save(manifest, {name: writer(part) for name, part in parts.items()})
    return SavedRun.at(storage.uri)


def random_weights(model):
    """Replace all initial values by random ones: a zero or a one could hide a bug."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.05
                tensor.copy_(1 + noise if "var" in name else tensor + noise)
    return model


def pictures(count, size=8, channels=3):
    return np.random.default_rng(1).integers(0, 256, (count, size, size, channels), np.uint8)
