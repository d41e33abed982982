"""A real sweep of six trials, one of which fails; its driver is killed in the middle, and the sweep is resumed."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ftexp.checkpoint.store import CheckpointStore
from ftexp.rundir.names import CHECKPOINTS
from ftexp.rundir.sweep_record import look
from ftexp.storage.directory import Storage
from tests.support.command import WRITE_REPORT, Command, RunFolder, process
from tests.support.processes import descendants_with, wait_until_none

RATES = ["0.001", "0.01", "0.03"]
MODELS = ["vit", "vit_tiny"]
DOOMED = "model=vit,optim.lr=0.01"
NUM_FINISHED = 2  # number of finished trials at which the driver is killed
WORDS = [
    "-m", f"model={','.join(MODELS)}", "optim.lr=1e-3,1e-2,3e-2", "sweep.name=grid", "plugins=[doom]",
    "train.epochs=3", "schedule.warmup_epochs=0", "sweep.max_concurrent=2", "data.val_fraction=0.3",
    "data.test_fraction=0.5", "train.eval_every_epochs=3", "model.kwargs={patch_size: 4, depth: 1, embed_dim: 48}",
    "scaling.num_workers=1", "report.enabled=false",
    "checkpoint.extra_state=[progress,scheduler,scaler,rng,best,doom]",
]  # fmt: skip

# while the file `on` exists, one trial fails, and the next one pauses in its third epoch, after a checkpoint
PLUGIN = """
from pathlib import Path

from ftexp.checkpoint.registry import register_state
from tests.support.processes import wait_until_none

@register_state("doom")
class Doom:
    version = 1

    def __init__(self, job):
        on, rate = Path(__file__).with_name("on"), job.config.optim.lr
        if on.exists() and rate == 0.01 and job.config.model.preset:
            raise TypeError("doomed")
        advance = job.scheduler.step_update

        def step_update(step):
            advance(step)
            if step == 24 and rate == 0.03:
                wait_until_none(on.exists)

        job.scheduler.step_update = step_update

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
"""


def files(directory):
    return {path: path.stat().st_mtime_ns for path in Path(directory).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def story(tmp_path_factory, preloaded):
    """Run the command, kill it, and run it again; record the state in between."""
    directory = tmp_path_factory.mktemp("sweep")
    (directory / "doom.py").write_text(PLUGIN)
    (directory / "on").touch()
    mark = f"FTEXP_SWEEP_TEST={directory}"
    sweep = directory / "sweeps" / "grid"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*mark.split("=", 1))
        first = Command("train", [*WORDS, f"run.storage={directory}"], directory, preloaded)
        first.wait_for(f"failed      {DOOMED}")  # printed after the sweep record is written
        first.wait_until(lambda: is_in_the_middle(sweep))
        os.kill(first.process.pid, signal.SIGKILL)
        first.wait()
        wait_until_none(lambda: descendants_with(mark))
        told = {each.trial.name: each for each in look(Storage.at(str(sweep)))[1]}
        before = {name: files(sweep / name) for name, each in told.items() if each.status == "finished"}
        saved = {name: newest_step(sweep / name) for name in told}
        (directory / "on").unlink()
        second = Command("train", [*WORDS, f"run.storage={directory}"], directory, preloaded)
        try:
            code = second.wait()
        finally:
            second.process.kill()
    assert code == 0, second.output
    return {
        "sweep": sweep, "told": told, "before": before, "saved": saved, "first": first.output, "second": second.output,
    }  # fmt: skip


def newest_step(run):
    """Return the step of the newest checkpoint on disk, whether or not it was recorded; None if there is none."""
    newest = CheckpointStore(Storage.at(str(run), CHECKPOINTS)).latest(lambda *_: None)
    return newest.step if newest is not None else None


def trials_with(sweep, status):
    if not (sweep / "sweep.json").exists():
        return []
    trials = json.loads((sweep / "sweep.json").read_text())["trials"]
    return [RunFolder(sweep / trial["name"]) for trial in trials if trial["status"] == status]


def is_in_the_middle(sweep):
    """Return whether enough trials have finished, one has failed, and a running one has a checkpoint."""
    has_enough = trials_with(sweep, "failed") and len(trials_with(sweep, "finished")) >= NUM_FINISHED
    return has_enough and any(
        run.events("checkpoint_saved") and run.record["status"] == "running" for run in trials_with(sweep, "running")
    )


def test_a_failed_trial_leaves_the_others_alone_and_its_reason_is_kept(story):
    doomed = story["told"][DOOMED]
    assert doomed.status == "failed"
    assert "TypeError: doomed" in doomed.trial.error
    assert f"failed      {DOOMED}: rank 0 failed after step 0 [bug]: TypeError: doomed" in story["first"]
    assert [each.status for each in story["told"].values()].count("failed") == 1
    note = story["sweep"].parents[1] / "runs" / ".multirun"  # Hydra's directory, whose files would contain secrets
    assert list(note.iterdir()) == []


def test_the_ledger_is_right_after_a_sigkill_and_nothing_runs_on(story):
    statuses = [each.status for each in story["told"].values()]
    assert "running" not in statuses
    assert "interrupted" in statuses
    for name, each in story["told"].items():
        assert (each.status == "finished") == (name in story["before"])


def test_the_same_command_leaves_finished_trials_untouched(story):
    assert len(story["before"]) >= NUM_FINISHED
    for name, seen in story["before"].items():
        assert files(story["sweep"] / name) == seen, name


def test_the_same_command_goes_on_with_broken_trials_from_their_last_save(story):
    broken = [name for name, each in story["told"].items() if each.status == "interrupted"]
    assert any(story["saved"][name] for name in broken)
    for name in broken:
        run = RunFolder(story["sweep"] / name)
        # a trial that was killed before its first checkpoint has nothing to resume from
        expected = [step] if (step := story["saved"][name]) is not None else []
        assert [event["step"] for event in run.events("restored")] == expected, (name, run.events())
        if expected:
            assert run.record["attempts"] == 2


def test_all_trials_finish_and_the_leaderboard_is_right(story):
    names = {f"model={model},optim.lr={rate}" for model in MODELS for rate in RATES}
    records = {name: RunFolder(story["sweep"] / name).record for name in names}
    assert {record["status"] for record in records.values()} == {"finished"}
    assert {path.name for path in story["sweep"].iterdir() if path.is_dir()} == names
    rows = list(csv.DictReader((story["sweep"] / "leaderboard.csv").open()))
    scores = [float(row["val_accuracy"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    for row in rows:
        record = records[row["trial"]]
        assert float(row["val_accuracy"]) == record["metrics"]["last"]["val_accuracy"]
        assert row["trial"] == f"model={row['model']},optim.lr={row['optim.lr']}"
    assert (story["sweep"] / "leaderboard.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_printed_again_and_trials_do_not_speak_in_between(story):
    module = [sys.executable, "-m", "ftexp.sweeps", str(story["sweep"])]
    done = subprocess.run(module, capture_output=True, text=True, check=True, timeout=60)
    for name in story["told"]:
        model, rate = (part.split("=")[1] for part in name.split(","))
        assert any(model in line and rate in line and "finished" in line for line in done.stdout.splitlines())
    assert "images/s" not in story["second"]
    assert all("epoch 3/3" in (story["sweep"] / name / "train.log").read_text() for name in story["told"])


def test_a_report_of_a_sweep_is_written_without_importing_anything_heavy(story, tmp_path):
    done = process("-c", WRITE_REPORT, str(story["sweep"]), "--out", "sweep.html", cwd=tmp_path)
    assert done.stdout.splitlines() == [f"written to {tmp_path}/sweep.html", "[]"], done.stderr
