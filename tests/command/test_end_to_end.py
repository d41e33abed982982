"""The command, through Ray, on real images: it finishes, and what dies comes back."""

import json
import subprocess
import sys

import pytest
import torch

from ftexp.report.source import read_run
from ftexp.report.timeline import build_timeline
from tests.support.reference import EVERY_FEW_STEPS, OPTIONS, STATES, STEPS
from tests.support.small_cifar import SMALL_CIFAR, write_small_cifar

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
import json, sys, timm, torch
run, checkpoint = sys.argv[1:]
arguments = json.load(open(f"{run}/run.json"))["model"]["arguments"]
model = timm.create_model(**arguments)
model.load_state_dict(torch.load(f"{run}/checkpoints/{checkpoint}/model.pt", weights_only=True))
assert "ftexp" not in sys.modules and "ray" not in sys.modules
print(sum(p.numel() for p in model.parameters()))
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


def points(run):
    keys = ("split", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss", "test_accuracy")
    return [{key: point[key] for key in keys if key in point} for point in run.metrics()]


def test_a_killed_run_ends_exactly_where_the_clean_run_ends(ftexp, run_folder, clean_run, pictures, tmp_path):
    (tmp_path / "my_states.py").write_text(PLUGIN)
    (tmp_path / "slow").touch()  # so that it does not end before it is killed
    clean, killed = clean_run, run_folder("killed")
    killed_command = ftexp(
        *OPTIONS, *EVERY_FEW_STEPS, *pictures, "failure.max_failures=1", "plugins=[obedient,my_states]",
        f"checkpoint.extra_state=[{STATES},counter]", "run.name=killed", "report.enabled=true",
    )  # fmt: skip
    killed_command.wait_until(lambda: len(killed.events("checkpoint_saved")) >= 2)
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
    assert failure["steps_replayed"] == failure["step"] - killed.events("restored")[0]["step"]
    assert "✗ rank 1 failed" in killed_command.output
    assert "failure 1 of 1 allowed: restarting the workers" in killed_command.output
    assert "↻ training again after" in killed_command.output
    assert clean.record["status"] == killed.record["status"] == "finished"
    assert killed.record["world_sizes"] == [2, 2]
    assert {"config.yaml", "overrides.yaml", "run.json", "metrics.jsonl", "events.jsonl"} <= {
        path.name for path in killed.path.iterdir()
    }
    noise = [line for line in killed_command.lines if "raylet" in line or "WARNING" in line or "ray." in line]
    assert noise == []

    # the checkpoint stands on its own, and the evaluation agrees with the run
    bare = [sys.executable, "-c", LOAD_WITHOUT_FTEXP, str(killed.path), again]
    loaded = subprocess.run(bare, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(loaded.stdout) == killed.record["model"]["num_parameters"]
    left = [json.loads((run.path / "evaluation_test.json").read_text()) for run in (clean, killed)]
    assert left[0] == {**left[1], "run": str(clean.path)}  # its surest mistakes with their pictures, too
    evaluation = ftexp(f"run={killed.path}", "checkpoint=latest", module="evaluate")
    assert evaluation.wait() == 0, evaluation.output
    result = json.loads((killed.path / "evaluation_test.json").read_text())
    assert result["confusion"] == left[1]["confusion"]
    assert result["accuracy"] == killed.record["metrics"]["last"]["test_accuracy"]
    assert sum(row["num_samples"] for row in result["classes"]) == result["num_samples"] == 360

    # the report that the run wrote shows the kill, with what the records say that it took
    timeline = build_timeline(read_run(killed.storage))
    (told,) = timeline.interruptions
    assert (told.cause, told.step, told.rank) == ("crash", failure["step"], 1)
    for phase, key in (("detecting", "detect"), ("restarting", "restart"), ("restoring", "restore")):
        assert told.seconds[phase] == pytest.approx(failure[f"seconds_to_{key}"], abs=0.002)  # which is rounded
    assert timeline.total_s == pytest.approx(killed.record["seconds"], abs=0.5)
    report = (killed.path / "report.html").read_text()
    assert f"report         {killed.path}/report.html" in killed_command.output
    for text in ("<h1>killed", "crash of rank 1", f">{before['checkpoint']}<", ">plugins<", "my_states"):
        assert text in report, text


def test_spent_failures_end_the_run_with_its_cause_and_the_same_command_goes_on(ftexp, run_folder):
    options = ["train.epochs=8", "failure=fail_fast", "run.name=spent", "data=synthetic", "data.num_samples=400"]
    first, run = ftexp(*options, "report.enabled=true"), run_folder("spent")
    first.wait_until(lambda: run.events("checkpoint_saved"))
    run.kill_worker(rank=0)
    assert first.wait() == 1, first.output
    assert run.record["status"] == "failed"
    assert ">failed<" in (run.path / "report.html").read_text()
    assert "the process died" in run.record["error"]
    assert "giving up" in first.output
    assert "Traceback" not in first.output
    assert run.checkpoints

    saved = run.checkpoints[-1]
    second = ftexp(*options)
    assert second.wait() == 0, second.output
    assert f"from {saved}" in second.output
    assert run.events("restored")[-1]["step"] > 0
    assert run.record["status"] == "finished"
    assert run.record["attempts"] == 2
    keys = [(point["split"], point["step"]) for point in run.metrics()]
    assert len(keys) == len(set(keys))

    before = (run.path / "run.json").stat().st_mtime_ns
    third = ftexp(*options)
    assert third.wait() == 0
    assert "test accuracy" in third.output
    assert (run.path / "run.json").stat().st_mtime_ns == before

    changed = ftexp(*options, "optim.lr=0.5")
    assert changed.wait() == 2
    assert "optim.lr was 0.002, and is 0.5 now" in changed.output


@pytest.mark.timeout(400)
def test_the_tutorials_run_survives_a_crash_on_a_set_of_cifar10s_shape(ftexp, run_folder, tmp_path):
    write_small_cifar(tmp_path / "cifar", num_train=580, num_test=20)
    (tmp_path / "small_cifar.py").write_text(SMALL_CIFAR.format(root=str(tmp_path / "cifar")))
    command = ftexp(
        "experiment=fault_tolerant_cifar_vit", "plugins=[small_cifar]", f"data.root={tmp_path / 'cifar'}",
        "data.download=false", "train.epochs=2", "schedule.warmup_epochs=0", "model.kwargs.depth=2",
    )  # fmt: skip
    run = run_folder("fault-tolerant-cifar-vit")
    command.wait_until(lambda: run.events("checkpoint_saved"))
    run.kill_worker(rank=1)
    assert command.wait() == 0, command.output
    record = run.record
    assert record["status"] == "finished"
    assert [failure["cause"] for failure in record["failures"]] == ["crash"]
    assert record["step"] == 3  # 2 epochs of 522 samples in global batches of 512
    assert record["data"]["class_names"][0] == "airplane"
    states = load(run, record["checkpoint"], "extra_state.pt")
    assert states["progress"]["epoch"] == 2
