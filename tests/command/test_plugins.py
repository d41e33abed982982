"""A run with a plug-in of every kind is killed and stops early: no state is lost, and the result doesn't differ."""

import json

import pytest
import torch

from tests.support.command import RunFolder

PLUGIN = """
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import ray
import torch.nn.functional as F

from ftexp import plugins


@plugins.register_source("stripes")
def stripes(config):
    labels = np.arange(config.kwargs["count"]) % 3
    images = np.random.default_rng(0).integers(0, 100, (len(labels), 8, 8, 1))
    images[np.arange(len(labels)), labels] += 120
    return plugins.bundle_from_arrays(config, images.astype(np.uint8), labels, class_names=["a", "b", "c"])


@plugins.register_augmentation("dim")
def dim(pixels, draws):
    return (pixels * draws.uniform(0.5, 1)).astype(np.uint8)


@plugins.register_loss("hinge")
def hinge(context):
    def losses(logits, targets):
        return F.multi_margin_loss(logits, targets, margin=context.config.kwargs["margin"], reduction="none")

    return losses


@plugins.register_metric("num_classes", better="min")
class NumClasses:  # which never improves
    def __init__(self, context):
        self.count = context.num_classes

    def update(self, logits, targets):
        assert logits.shape == (len(targets), self.count)

    def compute(self):
        return self.count


@plugins.register_hook("sum_up")
class SumUp(plugins.Hook):
    def __init__(self, context, every):
        super().__init__(context)
        self.every, self.steps = every, []

    def after_step(self):
        if self.context.progress.step % self.every == 0:
            self.steps.append(self.context.progress.step)

    def at_end(self):
        if self.context.rank == 0:
            Path(__file__).with_name("summed_up.json").write_text(json.dumps(self.steps))
            Path(__file__).with_name("imported.json").write_text(json.dumps(self.imported()))

    def imported(self):
        # what this worker has imported itself: a fork of the same process doesn't have it
        script = Path(__file__).with_name("list_modules.py")
        script.write_text("import sys; print(*sys.modules)")
        words = shlex.split(ray.get_runtime_context().runtime_env["py_executable"])
        forked = subprocess.run([*words, str(script)], check=True, capture_output=True, text=True).stdout.split()
        return sorted(set(sys.modules) - set(forked))

    def state_dict(self):
        return {"steps": list(self.steps)}

    def load_state_dict(self, state):
        self.steps = list(state["steps"])


@plugins.register_state("steps")
class Steps:
    version = 1

    def __init__(self, context):
        self.context, self.weight = context, 0.0

    def state_dict(self):
        return {"weight": float(next(self.context.model.parameters()).sum())}

    def load_state_dict(self, state):
        self.weight = state["weight"]


@plugins.register_tracker("lines")
class Lines:
    def __init__(self, config, run):
        self.path = Path(config.kwargs["folder"]) / f"{run.name}.jsonl"
        self.where = str(self.path)

    def held(self):
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {(name, step) for name, step in map(json.loads, lines)}

    def log(self, points):
        with self.path.open("a") as file:
            file.writelines(json.dumps([name, point.step]) + "\\n" for point in points for name in point.values)

    def close(self, outcome):
        os.kill(os.getpid(), signal.SIGTERM)  # the run has ended: its exit code stays
"""
WORDS = [
    "plugins=[mine]", "data=synthetic", "data.name=stripes", "data.num_samples=null", "data.num_classes=null",
    "data.image_size=8", "data.channels=1", "data.mean=[0.5]", "data.std=[0.25]", "data.kwargs.count=150",
    "data.val_fraction=0.2", "augment=none", "augment.custom=[dim]", "model.kwargs.depth=1", "loss.name=hinge",
    "loss.kwargs.margin=1", "train.metrics=[num_classes,f1_macro]", "hooks.sum_up.every=2",
    "stopping.metric=val_num_classes", "stopping.patience_epochs=1", "train.epochs=4", "schedule.warmup_epochs=0",
    "train.global_batch_size=32", "checkpoint.extra_state=[progress,scheduler,scaler,ema,rng,best,steps]",
    "tracker.use.lines=true",
]  # fmt: skip
STOPS_AT = 7  # the end of the second epoch of 105 samples


@pytest.mark.timeout(600)
def test_a_run_with_a_plug_in_of_every_kind_is_killed_and_stops_early_bitwise_as_the_clean_one(ftexp, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    command = ftexp(
        *WORDS, f"tracker.kwargs.folder={tmp_path}", "drill.faults=[{kind: kill_worker, step: 5}]",
        f"run.storage={tmp_path / 'runs'}", module="drill",
    )  # fmt: skip
    assert command.wait() == 0, command.output
    assert command.lines[-1].startswith("bitwise identical: model.pt, optimizer.pt, extra_state.pt")
    (directory,) = (tmp_path / "runs").iterdir()
    runs = [RunFolder(directory / name) for name in ("clean", "broken")]
    assert [run.record["failures"] != [] for run in runs] == [False, True]
    for run in runs:
        (stopped,) = run.events("stopped_early")
        assert (stopped["step"], stopped["epoch"]) == (STOPS_AT, 2)
        reason = "val_num_classes has not improved for 1 epoch (best 3.0000 at epoch 1)"
        assert run.record["status"] == "finished"
        assert run.record["stopped"] == {key: stopped[key] for key in ("step", "epoch", "reason", "rules")}
        assert run.record["stopped"]["reason"] == reason
        assert {"test_num_classes", "test_f1_macro"} <= run.record["metrics"]["last"].keys()
        checkpoint = run.path / "checkpoints" / run.record["checkpoint"]
        state = torch.load(checkpoint / "extra_state.pt", weights_only=True)
        assert state["hooks"]["hooks"]["sum_up"] == {"steps": [2, 4, 6]}
        tracked = (tmp_path / f"{run.path.name}.jsonl").read_text()
        assert '["test_num_classes", 7]' in tracked
        assert (
            f"stopped early at step {STOPS_AT}, epoch 2: {reason}" in (directory / f"{run.path.name}.log").read_text()
        )
    assert json.loads((tmp_path / "summed_up.json").read_text()) == [2, 4, 6]
    imported = json.loads((tmp_path / "imported.json").read_text())
    assert "mine" in imported
    late = [name for name in imported if name.startswith(("ray.", "pydantic", "pyarrow", "ftexp."))]
    assert len(late) < 40, late  # modules that every worker imports should be in WITH_THE_CLUSTER

    # the same command prints the result again, and doesn't train
    words = [*WORDS, f"tracker.kwargs.folder={tmp_path}", f"run.storage={directory}", "run.name=broken"]
    before = runs[1].events()
    again = ftexp(*words, "train.ledger=true", "train.log_every_steps=1")
    assert again.wait() == 0, again.output
    assert f"stopped early  at step {STOPS_AT}, epoch 2: {reason}" in again.output
    assert runs[1].record["attempts"] == 2
    assert runs[1].events() == before
