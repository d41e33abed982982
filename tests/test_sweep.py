"""A sweep, for real: eight trials, one of which fails; stopped by SIGTERM, killed, and given once more."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEADLINE_S, Command, RunFolder

from ftexp.storage import Storage
from ftexp.sweep.ledger import look

RATES = ["0.001", "0.003", "0.01", "0.03"]
MODELS = ["vit", "vit_tiny"]
DOOMED = "model=vit,optim.lr=0.01"
NUM_FINISHED = 2  # trials, when the driver is killed
WORDS = [
    "-m", f"model={','.join(MODELS)}", "optim.lr=1e-3,3e-3,1e-2,3e-2", "sweep.name=grid", "plugins=[doom]",
    "train.epochs=3", "schedule.warmup_epochs=0", "sweep.max_concurrent=2", "data.val_fraction=0.3",
    "data.test_fraction=0.5", "train.eval_every_epochs=3", "model.kwargs={patch_size: 4, depth: 2}",
    "checkpoint.extra_state=[progress,scheduler,scaler,rng,best,doom]",
]  # fmt: skip

PLUGIN = """
from pathlib import Path

from ftexp.checkpoint.registry import register_state

@register_state("doom")
class Doom:
    version = 1

    def __init__(self, job):
        if Path(__file__).with_name("on").exists() and job.config.optim.lr == 0.01 and job.config.model.preset:
            raise TypeError("doomed")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
"""


def files(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def descendants_with(text):
    """Living processes whose environment holds `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "environ").read_bytes():  # empty for a zombie
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The command, stopped, given again and killed, and given once more; what was seen in between."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "doom.py").write_text(PLUGIN)
    (folder / "on").touch()
    mark = f"FTEXP_SWEEP_TEST={folder}"
    sweep = folder / "sweeps" / "grid"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*mark.split("=", 1))
        stopped = Command("train", [*WORDS, f"run.storage={folder}"], folder)
        stopped.wait_until(lambda: any_has_saved(sweep, "running"))
        stopped.process.terminate()
        stop_code = stopped.wait()
        wait_until_none(lambda: descendants_with(mark))
        after_stop = look(Storage.at(str(sweep)))[1]
        first = Command("train", [*WORDS, f"run.storage={folder}"], folder)
        first.wait_until(lambda: is_in_the_middle(sweep))
        os.kill(first.process.pid, signal.SIGKILL)
        first.wait()
        wait_until_none(lambda: descendants_with(mark))
        told = {each.trial.name: each for each in look(Storage.at(str(sweep)))[1]}
        before = {name: files(sweep / name) for name, each in told.items() if each.status == "finished"}
        (folder / "on").unlink()
        second = Command("train", [*WORDS, f"run.storage={folder}"], folder)
        try:
            code = second.wait()
        finally:
            second.process.kill()
    assert code == 0, second.output
    return {
        "sweep": sweep, "stopped": stopped.output, "stop_code": stop_code, "after_stop": after_stop, "told": told,
        "before": before, "first": first.output, "second": second.output,
    }  # fmt: skip


def trials_with(sweep, status):
    if not (sweep / "sweep.json").exists():
        return []
    trials = json.loads((sweep / "sweep.json").read_text())["trials"]
    return [RunFolder(sweep / trial["name"]) for trial in trials if trial["status"] == status]


def any_has_saved(sweep, status):
    """Whether a trial of that status has saved in its latest attempt."""
    return any(
        events and events[-1]["event"] == "checkpoint_saved"
        for events in (run.events() for run in trials_with(sweep, status))
    )


def is_in_the_middle(sweep):
    """Some have ended, one of them by its doom, and one that runs has saved."""
    has_enough = trials_with(sweep, "failed") and len(trials_with(sweep, "finished")) >= NUM_FINISHED
    return has_enough and any_has_saved(sweep, "running")


def wait_until_none(found):
    end = time.monotonic() + DEADLINE_S
    while left := found():
        assert time.monotonic() < end, left
        time.sleep(0.05)


def test_sigterm_stops_all_trials_after_a_last_save(story):
    assert story["stop_code"] == 75, story["stopped"]
    assert "the same command with sweep.name=grid goes on" in story["stopped"]
    begun = [each for each in story["after_stop"] if each.state is not None]
    assert begun
    assert {each.status for each in begun} <= {"interrupted", "finished", "failed"}
    trained = [each for each in begun if each.state.step > 0]
    assert trained
    for each in trained:
        assert each.state.status == each.status
        if each.status == "interrupted":
            assert f"step_{each.state.step:08}" in each.state.checkpoint


def test_a_failed_trial_leaves_the_others_alone_and_its_reason_is_kept(story):
    doomed = story["told"][DOOMED]
    assert doomed.status == "failed"
    assert "TypeError: doomed" in doomed.trial.error
    assert f"failed      {DOOMED}: rank 0 failed after step 0 [bug]: TypeError: doomed" in story["first"]
    assert [each.status for each in story["told"].values()].count("failed") == 1


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
    resumed = 0
    for name, each in story["told"].items():
        run = RunFolder(story["sweep"] / name)
        if each.status == "interrupted" and each.state is not None and each.state.checkpoint is not None:
            (restored,) = run.events("restored")[-1:] or [None]
            assert restored is not None, (name, each.state, run.events(), (run.path / "train.log").read_text())
            assert restored["step"] > 0, name
            assert run.record["attempts"] > 1
            resumed += 1
    assert resumed >= 1


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
