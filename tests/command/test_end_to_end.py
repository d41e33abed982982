"""The command, through Ray, on real images: it finishes, and recovers from kills."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from ftexp.report.source import read_run
from ftexp.report.timeline import build_timeline
from tests.support.events import problems
from tests.support.processes import wait_until_none
from tests.support.reference import EVERY_FEW_STEPS, OPTIONS, STATES, STEPS

SNAPSHOT_EVERY = 2

PLUGIN = """
from ftexp.checkpoint.registry import register_state

@register_state("counter")
class Counter:
    version = 1

    def __init__(self, job):
        self.job, self.restored = job, 0

    def state_dict(self):
        return {"restored": self.restored, "saved_at": self.job.progress.step}

    def load_state_dict(self, state):
        assert state["saved_at"] == self.job.progress.step
        self.restored = state["restored"] + 1
"""

LOAD_WITHOUT_FTEXP = """
import sys
for name in [*sys.modules]:  # a fork has imported them
    if name.partition(".")[0] in ("ftexp", "ray"):
        del sys.modules[name]
sys.modules.update(ftexp=None, ray=None)  # nothing can import them
import json, os, timm, torch
run, checkpoint = sys.argv[1:]
arguments = json.load(open(f"{run}/run.json"))["model"]["arguments"]
model = timm.create_model(**arguments)
model.load_state_dict(torch.load(f"{run}/checkpoints/{checkpoint}/model.pt", weights_only=True))
print(sum(p.numel() for p in model.parameters()), flush=True)
os._exit(0)  # what Ray does at an exit would import it
"""


def load(run, checkpoint, name):
    return torch.load(run.path / "checkpoints" / checkpoint / name, weights_only=True)


def assert_same_tree(first, second, where=""):
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_same_tree(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_same_tree(*pair, f"{where}/{number}")
    else:
        assert first == second, where


def has_steps_since_a_save(run):
    """Return whether a few steps follow the second checkpoint, so that a snapshot is newer."""
    saved = run.events("checkpoint_saved")
    return len(saved) >= 2 and run.metrics()[-1]["step"] >= saved[-1]["step"] + SNAPSHOT_EVERY + 2


def points(run):
    keys = ("split", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss", "test_accuracy")
    return [{key: point[key] for key in keys if key in point} for point in run.metrics()]


def test_a_killed_run_ends_exactly_where_the_clean_run_ends(
    ftexp, run_folder, clean_run, pictures, tmp_path, preloaded
):
    (tmp_path / "my_states.py").write_text(PLUGIN)
    (tmp_path / "slow").touch()  # so that it doesn't end before the kill
    clean, killed = clean_run, run_folder("killed")
    killed_command = ftexp(
        *OPTIONS, *EVERY_FEW_STEPS, *pictures, "failure.max_failures=1", "plugins=[obedient,my_states]",
        f"checkpoint.extra_state=[{STATES},counter]", "run.name=killed", "report.enabled=true",
        f"failure.memory_every_steps={SNAPSHOT_EVERY}", as_typed=True,
    )  # fmt: skip
    killed_command.wait_until(lambda: has_steps_since_a_save(killed))
    killed.kill_worker(rank=1)
    (tmp_path / "slow").unlink()
    before = killed.events("checkpoint_saved")[-1]
    counter = load(killed, before["checkpoint"], "extra_state.pt")["counter"]
    assert counter == {"restored": 0, "saved_at": before["step"]}
    assert killed_command.wait() == 0, killed_command.output

    last = clean.record["checkpoint"]
    assert last == f"step_{STEPS:08d}.a1"
    again = killed.record["checkpoint"]
    assert again == f"step_{STEPS:08d}.a2"
    for name in ("model.pt", "optimizer.pt"):
        assert_same_tree(load(clean, last, name), load(killed, again, name))
    ours, theirs = load(clean, last, "extra_state.pt"), load(killed, again, "extra_state.pt")
    assert theirs.pop("counter") == {"restored": 1, "saved_at": STEPS}
    assert_same_tree({k: v for k, v in ours.items() if k != "rng"}, {k: v for k, v in theirs.items() if k != "rng"})
    assert points(clean) == points(killed)

    (failure,) = killed.record["failures"]
    assert (failure["cause"], failure["rank"]) == ("crash", 1)
    (restored,) = killed.events("restored")
    assert failure["steps_replayed"] == failure["step"] - restored["step"] <= SNAPSHOT_EVERY
    assert (failure["recovery"], restored["source"]) == ("memory", "memory")
    assert restored["step"] > before["step"]
    (recovered,) = killed.events("recovered")
    assert recovered["seconds_to_new_step"] == failure["seconds_to_new_step"] > 0
    assert f"{restored['checkpoint']} from memory, replaying" in killed_command.output
    (keeper,) = {event["pid"] for event in killed.events("snapshots_begun")}
    wait_until_none(lambda: [keeper] if Path(f"/proc/{keeper}").exists() else [])
    assert killed.record["snapshots"]["every_steps"] == SNAPSHOT_EVERY
    assert "✗ rank 1 failed" in killed_command.output
    assert "failure 1 of 1 allowed: restarting the workers" in killed_command.output
    assert "↻ training again after" in killed_command.output
    assert clean.record["status"] == killed.record["status"] == "finished"
    assert killed.record["world_sizes"] == [2, 2]
    assert {"config.yaml", "overrides.yaml", "run.json", "metrics.jsonl", "events.jsonl"} <= {
        path.name for path in killed.path.iterdir()
    }
    assert [problem for run in (clean, killed) for line in run.events() for problem in problems(line)] == []
    (finished,), saved = killed.events("finished"), killed.events("checkpoint_saved")
    assert finished["time"] - saved[-1]["time"] < 9  # Ray Train waits 12 s for an actor that can't do its work
    noise = [line for line in killed_command.lines if "raylet" in line or "WARNING" in line or "ray." in line]
    assert noise == []

    # the checkpoint can be loaded without ftexp, and the evaluation agrees with the run
    (tmp_path / "load.py").write_text(LOAD_WITHOUT_FTEXP)
    bare = [*preloaded.python, str(tmp_path / "load.py"), str(killed.path), again]
    loaded = subprocess.run(bare, env=preloaded.environment(), capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(loaded.stdout) == killed.record["model"]["num_parameters"]
    left = [json.loads((run.path / "evaluation_test.json").read_text()) for run in (clean, killed)]
    assert left[0] == {**left[1], "run": str(clean.path)}  # including the most confident mistakes with their pictures
    evaluation = ftexp(f"run={killed.path}", "checkpoint=latest", module="evaluate")
    assert evaluation.wait() == 0, evaluation.output
    result = json.loads((killed.path / "evaluation_test.json").read_text())
    assert result["confusion"] == left[1]["confusion"]
    assert result["accuracy"] == killed.record["metrics"]["last"]["test_accuracy"]
    assert sum(row["num_samples"] for row in result["classes"]) == result["num_samples"] == 360

    # the run's report shows the kill with the durations of the records
    timeline = build_timeline(read_run(killed.storage))
    (told,) = timeline.interruptions
    assert (told.cause, told.step, told.rank) == ("crash", failure["step"], 1)
    for phase, key in (("detecting", "detect"), ("restarting", "restart"), ("restoring", "restore")):
        assert told.seconds[phase] == pytest.approx(failure[f"seconds_to_{key}"], abs=0.002)  # the record is rounded
    assert timeline.total_s == pytest.approx(killed.record["seconds"], abs=0.5)
    report = (killed.path / "report.html").read_text()
    assert f"report         {killed.path}/report.html" in killed_command.output
    for text in ("<h1>killed", "crash of rank 1", f">{before['checkpoint']}<", ">plugins<", "my_states"):
        assert text in report, text
