"""Every file under conf/experiment/: it composes to what is kept here, and it trains."""

import dataclasses
import difflib
import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ftexp.cli.compose import to_config
from ftexp.config.schema import Config, config_dir
from tests.support.command import Command, RunFolder
from tests.support.small_cifar import SMALL_CIFAR, write_small_cifar

GOLDEN = Path(__file__).parent / "golden"
EXPERIMENTS = sorted(file.stem for file in (config_dir() / "experiment").glob("*.yaml"))
UPDATE = "FTEXP_UPDATE_GOLDEN"  # environment variable
SHORT = ["train.max_steps=2", "schedule.warmup_epochs=0", "train.eval_every_epochs=1", "scaling.num_workers=1"]
SYNTHETIC = ["data=synthetic", "data.root=null", "train.precision=fp32"]
# where a preset is for larger models and data than a test has
TINY = {
    "fault_tolerant_cifar_vit": ["train.global_batch_size=64"],  # its own, and a crash: test_end_to_end
    "finetune_vit": [
        *SYNTHETIC, "model.pretrained=false", "model.kwargs={patch_size: 4, embed_dim: 64, depth: 2, num_heads: 2}",
        "train.global_batch_size=16",
    ],
    "photos_resnet50": [*SYNTHETIC, "model=resnet18", "train.global_batch_size=16"],
}  # fmt: skip


def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}: {value!r}\n"


def composed(experiment):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = to_config(compose("config", [f"experiment={experiment}"]))
    assert isinstance(config, Config)
    return list(flat(OmegaConf.to_container(OmegaConf.create(dataclasses.asdict(config)))))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_composes_to_what_it_was_when_it_was_reviewed(experiment):
    file, now = GOLDEN / f"{experiment}.yaml", composed(experiment)
    if os.environ.get(UPDATE):
        file.write_text("".join(now))
    kept = file.read_text().splitlines(keepends=True) if file.exists() else []
    changes = "".join(difflib.unified_diff(kept, now, f"{file.name}, as kept", f"{file.name}, as composed", n=0))
    assert not changes, f"\n{changes}If that is meant: {UPDATE}=1 pytest tests/unit/test_experiments.py, and commit it"


def test_nothing_is_kept_of_an_experiment_that_is_gone():
    assert sorted(file.stem for file in GOLDEN.glob("*.yaml")) == EXPERIMENTS


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_for_two_steps(experiment, tmp_path):
    words = [f"experiment={experiment}", *SHORT, *TINY.get(experiment, []), f"run.storage={tmp_path}"]
    words += ["run.name=short", "report.enabled=false"]
    if "data.name: 'cifar10'\n" in composed(experiment):
        write_small_cifar(tmp_path / "cifar", num_train=160, num_test=20)
        (tmp_path / "small_cifar.py").write_text(SMALL_CIFAR.format(root=str(tmp_path / "cifar")))
        words += ["plugins=[small_cifar]", f"data.root={tmp_path / 'cifar'}", "data.download=false"]
    command = Command("train", words, tmp_path)
    assert command.wait() == 0, command.output
    record = RunFolder(tmp_path / "short").record
    assert (record["status"], record["step"]) == ("finished", 2)
