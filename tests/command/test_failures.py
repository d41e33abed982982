"""Failures of every kind, through Ray: their reported cause, their cost, and the state that is kept."""

import json
import signal
from pathlib import Path

import pytest

from ftexp.drill.report import compare
from ftexp.rundir.sample_ledger import problems, read_updates
from tests.support.processes import wait_until_none
from tests.support.reference import OPTIONS

BATCH = 32

PLUGIN = """
from ftexp.checkpoint.registry import register_state

@register_state("faulty")
class Faulty:
    version = 1

    def __init__(self, job):
        advance = job.scheduler.step_update

        def step_update(step):
            advance(step)
            return len(step) if step == 20 else None  # an int has no len()

        job.scheduler.step_update = step_update

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
"""


@pytest.mark.timeout(400)
def test_a_run_that_lost_ray_hung_lost_numbers_and_raised_ends_where_the_clean_run_ends(
    ftexp, run_folder, clean_run, pictures, tmp_path, alert_server
):
    (tmp_path / "slow").touch()  # so that there is no checkpoint before Ray is killed
    faults = "{kind: hang, step: 45, rank: 1}, {kind: nonfinite, step: 55}, {kind: raise, step: 65}"
    faults += ", {kind: flip_weight, step: 70, rank: 1}"
    alerts = [f"notify.urls=[{alert_server.url('ok')},{alert_server.url('hang')}]", "notify.max_recoveries=1"]
    command = ftexp(
        *(*OPTIONS, *pictures, *alerts, "run.name=faulty", f"chaos.faults=[{faults}]", "notify.timeout_s=1"),
        *("failure.hang_timeout_s=15", "failure.check_replicas_every_steps=4", "failure.max_failures=4"),
        "failure.repeat_step_every=3",
        "failure.memory_every_steps=4",
        own_ray=True,
    )
    run = run_folder("faulty")
    command.wait_until(lambda: run.events("ready"))
    pids = run.events("ready")[0]["pids"]
    command.wait_until(lambda: (run.path / "metrics.jsonl").exists() and run.metrics())
    command.kill_in_own_ray("gcs_server")
    command.wait_until(lambda: len(run.events("ready")) == 2)
    (tmp_path / "slow").unlink()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert command.wait() == 0, command.output
    assert len(run.events("command_started")) == 1
    record = run.record
    ray, *failures = record["failures"]
    assert (ray["cause"], ray["rank"]) == ("ray", None)
    assert f"✗ Ray failed after step {ray['step']} [ray]: Ray's GCS process was killed by SIGKILL" in command.output
    assert "new Ray 1 of 3 allowed, not charged to failure.max_failures: starting a new Ray" in ray["decision"]
    assert ray["steps_replayed"] == ray["step"]
    assert [failure["cause"] for failure in failures] == ["hang", "non_finite", "crash", "corruption"]
    assert [failure["decision"] for failure in failures] == [
        f"failure {number} of 4 allowed: restarting the workers" for number in (1, 2, 3, 4)
    ]
    assert all(failure["progressed"] for failure in failures)
    # after non-finite values and corruption, the run resumes from a verified checkpoint, never from memory
    assert [failure["recovery"] for failure in failures if failure["cause"] in ("non_finite", "corruption")] == [
        "storage", "storage"
    ]  # fmt: skip
    assert {failure["recovery"] for failure in failures} <= {"memory", "storage"}
    # rank 0 waits for rank 1 in the next step's all-reduce, and reports that
    assert failures[0]["rank"] == 1
    assert failures[0]["error"].startswith("no progress for ")
    stacks = run.path / "hangs" / "a2.r1.txt"
    assert f"stack traces: {stacks}" in failures[0]["error"]
    assert "strike.py" in stacks.read_text()
    assert failures[2]["step"] == 65
    assert "ChaosError" in failures[2]["error"]
    assert (failures[3]["rank"], failures[3]["step"]) == (None, 72)  # of two ranks, it is unknown which one is right
    assert failures[3]["error"].startswith("silent corruption: the weights after step 72: ranks differ, none is in")
    assert failures[3]["error"].partition("minority, in ")[2].startswith("pos_embed")
    assert "replicas compared every 4 steps and before each checkpoint: " in command.output
    assert "repeat   one step in 3 is computed twice: " in command.output
    assert [body["alert"] for body in alert_server.taken] == ["recoveries", "finished"]
    assert {event["to"] for event in run.events("alert_failed")} == {f"http://{alert_server.address}/***"}
    for file in ("config.yaml", "overrides.yaml", "events.jsonl", "run.json"):
        assert "very-secret" not in (run.path / file).read_text()
    assert 0 < record["goodput"] <= 1
    assert record["goodput"] == pytest.approx(record["productive_s"] / record["seconds"], abs=1e-4)
    assert "on steps that were kept" in command.output
    report = compare(clean_run.storage, run.storage, BATCH, 0)
    assert (report.differences, report.identical) == ([], True)


def test_a_bug_ends_the_run_at_once_and_says_where_it_was(ftexp, run_folder, tmp_path):
    (tmp_path / "my_states.py").write_text(PLUGIN)
    extra = "checkpoint.extra_state=[progress,scheduler,scaler,rng,best,faulty]"
    command = ftexp("run.name=bug", "model.kwargs.depth=1", "plugins=[my_states]", extra, "report.enabled=true")
    run = run_folder("bug")
    assert command.wait() == 1, command.output
    record = run.record
    assert (record["status"], record["attempts"]) == ("failed", 1)
    assert ">failed<" in (run.path / "report.html").read_text()
    (failure,) = record["failures"]
    assert (failure["cause"], failure["step"]) == ("bug", 20)
    assert failure["error"] == "TypeError: object of type 'int' has no len()"
    assert "a restart does not fix a bug: stopping" in record["error"]
    assert record["error"] in command.output
    (line,) = [line for line in command.lines if "with samples" in line]
    samples = line.partition("with samples ")[2].partition(";")[0].split(", ")
    assert f"was at step 20, position {20 * BATCH}, with samples" in line
    assert len({int(sample) for sample in samples}) == BATCH / 2  # the half of this rank
    assert (
        "Fix the cause. To start again (there is no checkpoint), run the same command with run.name=bug"
        in command.output
    )
    (where,) = [line for line in command.lines if "raised at" in line]
    assert "my_states.py:" in where, where
    raised = run.events("raised")
    assert any("has no len()" in event["traceback"] for event in raised)
    assert "Traceback" not in command.output


@pytest.mark.timeout(400)
def test_a_run_that_is_told_to_stop_saves_the_step_it_stopped_at_and_goes_on_from_it(ftexp, run_folder):
    options = ["run.name=stopped", "data=synthetic", "data.image_size=8", "data.num_samples=600", "train.epochs=300"]
    options += ["model.kwargs.depth=1", "train.eval_every_epochs=5", "checkpoint.every_epochs=99", "train.eval=beside"]
    run, steps = run_folder("stopped"), [0]
    for number, code, epoch in ((signal.SIGINT, 130, 5), (signal.SIGTERM, 75, 10)):
        command = ftexp(*options)
        command.wait_for(f"epoch {epoch}/300")
        pids = run.events("ready")[-1]["pids"]
        command.process.send_signal(number)
        assert command.wait() == code, command.output
        assert "stopping after a final checkpoint" in command.output
        assert "the same command with run.name=stopped" in command.output
        assert "Traceback" not in command.output
        wait_until_none(lambda pids=pids: [pid for pid in pids if Path(f"/proc/{pid}").exists()])
        assert (run.record["status"], run.record["failures"]) == ("interrupted", [])
        saved = run.checkpoints[-1]
        assert saved == run.record["checkpoint"]
        steps.append(json.loads((run.path / "checkpoints" / saved / "manifest.json").read_text())["step"])
        assert steps[-2] < steps[-1] < 3900
        assert run.record["farthest_step"] <= steps[-1]  # steps after the last tick were saved too
    assert f"at step {steps[1]} from step_{steps[1]:08d}.a1" in command.output
    assert [event["step"] for event in run.events("restored")] == [steps[1]]
    evaluated = [(point["epoch"], point["step"]) for point in run.metrics() if point["split"] == "val"]
    assert [epoch for epoch, _ in evaluated][:2] == [5, 10]
    assert evaluated == sorted(set(evaluated))
    saved = {event["step"]: event["reasons"] for event in run.events("checkpoint_saved")}
    assert all("evaluation" in saved[step] for _, step in evaluated)


HUNGRY = """
import torch
from ftexp.checkpoint.registry import register_state

@register_state("hungry")
class Hungry:
    version = 1

    def __init__(self, job):
        def take(model, arguments):
            images = len(arguments[0])
            sizes.append(images)
            if model.training and images > 8:
                torch.empty(images << 44)  # more than there is

        sizes = self.sizes = []
        job.model.register_forward_pre_hook(take)

    def state_dict(self):
        return {"largest": max(self.sizes)}

    def load_state_dict(self, state):
        pass
"""


def test_micro_batches_that_do_not_fit_are_halved(ftexp, run_folder, tmp_path):
    (tmp_path / "my_states.py").write_text(HUNGRY)
    extra = "checkpoint.extra_state=[progress,scheduler,scaler,rng,best,hungry]"
    options = ["train.max_steps=20", "train.ledger=true", "failure.on_out_of_memory=halve_micro_batch"]
    options += ["model.kwargs.depth=1", "data.val_fraction=0"]
    command = ftexp("run.name=hungry", "plugins=[my_states]", extra, *options)
    run = run_folder("hungry")
    assert command.wait() == 0, command.output
    record = run.record
    assert [failure["cause"] for failure in record["failures"]] == ["out_of_memory"]
    assert "can't allocate memory" in record["failures"][0]["error"]
    assert "with micro-batches of 8 images, not 16, at the same global batch" in record["failures"][0]["decision"]
    assert record["accumulate_steps"] == 2
    updates = read_updates(run.storage)
    assert len(updates) == 20
    assert list(problems(updates, record["data"]["num_samples"]["train"], BATCH)) == []
