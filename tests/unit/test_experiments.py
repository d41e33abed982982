"""Every file under conf/experiment/ composes to its config in golden/, and trains."""

import dataclasses
import difflib
import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ftexp.config.schema import config_dir
from ftexp.data.info import DataInfo
from ftexp.worker.evaluation import evaluate
from ftexp.worker.loop import advance
from ftexp.worker.step import thaw, train_step
from tests.support.configs import composed
from tests.support.jobs import job_of

GOLDEN = Path(__file__).parent / "golden"
EXPERIMENTS = sorted(file.stem for file in (config_dir() / "experiment").glob("*.yaml"))
UPDATE = "FTEXP_UPDATE_GOLDEN"  # environment variable
# overrides for presets whose models and images are too large for a test
TINY = {
    "deit_small": [
        "data.image_size=32", "++model.kwargs.patch_size=4", "++model.kwargs.embed_dim=64", "++model.kwargs.depth=2",
        "++model.kwargs.num_heads=2",
    ],
    "finetune_convnext": ["data.image_size=32", "model.pretrained=false", "model.name=test_convnext"],
    "finetune_vit": [
        "data.image_size=32", "model.pretrained=false", "++model.kwargs.patch_size=4", "++model.kwargs.embed_dim=64",
        "++model.kwargs.depth=2", "++model.kwargs.num_heads=2",
    ],
    "photos_resnet50": ["data.image_size=32", "model=resnet18"],
}  # fmt: skip


def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}: {value!r}\n"


def lines(config):
    return list(flat(OmegaConf.to_container(OmegaConf.create(dataclasses.asdict(config)))))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_composes_to_what_it_was_when_it_was_reviewed(experiment):
    file, now = GOLDEN / f"{experiment}.yaml", lines(composed(f"experiment={experiment}"))
    if os.environ.get(UPDATE):
        file.write_text("".join(now))
    kept = file.read_text().splitlines(keepends=True) if file.exists() else []
    changes = "".join(difflib.unified_diff(kept, now, f"{file.name}, as kept", f"{file.name}, as composed", n=0))
    assert not changes, f"\n{changes}If that is meant: {UPDATE}=1 pytest tests/unit/test_experiments.py, and commit it"


def test_nothing_is_kept_of_an_experiment_that_is_gone():
    assert sorted(file.stem for file in GOLDEN.glob("*.yaml")) == EXPERIMENTS


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_takes_two_steps_and_is_evaluated(experiment):
    config = composed(f"experiment={experiment}", "train.global_batch_size=8", *TINY.get(experiment, []))
    data = config.data
    names = [f"class {number}" for number in range(10)]
    info = DataInfo(names, data.image_size, data.channels, data.mean, data.std, {})
    job = job_of(config, info, num_samples=16)
    before = [weights.clone() for weights in job.learner.model.parameters()]
    for batch in itertools.islice(job.data.feed.from_position(0), 2):
        thaw(job)
        assert train_step(job, batch)
        advance(job, batch)
    assert not all(torch.equal(*pair) for pair in zip(before, job.learner.model.parameters(), strict=True))
    evaluate(job, "val")
    assert math.isfinite(job.progress.metrics["val_loss"])
