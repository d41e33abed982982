"""A real search: TPE with early stopping, one trial at a time; it is stopped by SIGTERM and resumed."""

import csv

import pytest

from ftexp.rundir.state import FINISHED, INTERRUPTED
from ftexp.rundir.sweep_record import look
from ftexp.storage.directory import Storage
from ftexp.sweep.search.proposing import Known, propose
from ftexp.sweep.search.space import Interval
from tests.support.command import Command, RunFolder
from tests.support.processes import descendants_with, wait_until_none

# with this seed, the first learning rate trains well and the second doesn't
SEED = 36
LOW, HIGH = 1e-8, 1e-2
NUM_TRIALS = 2
EPOCHS = 20  # so that seconds of training remain after the decision to stop a trial
WORDS = [
    "-m", "hydra/sweeper=tune", f"optim.lr=tag(log, interval({LOW}, {HIGH}))", "sweep.name=search",
    f"hydra.sweeper.num_trials={NUM_TRIALS}", f"hydra.sweeper.seed={SEED}", "hydra.sweeper.scheduler=asha",
    "hydra.sweeper.reduction_factor=2", "sweep.max_concurrent=1", f"train.epochs={EPOCHS}",
    "schedule.warmup_epochs=0", "schedule.min_lr=0", "report.enabled=false", "data.test_fraction=0.5",
    "scaling.num_workers=1", "scaling.resources_per_worker={CPU: 1}",
    "model.kwargs={patch_size: 4, depth: 1, embed_dim: 48}",
]  # fmt: skip


def has_saved(run):
    return any(event["event"] == "checkpoint_saved" for event in run.events())


@pytest.fixture(scope="module")
def story(tmp_path_factory, preloaded):
    """Run the command, stop it in its first trial, and run it again; record the state in between and afterwards."""
    directory = tmp_path_factory.mktemp("search")
    mark = f"FTEXP_SEARCH_TEST={directory}"
    sweep = directory / "sweeps" / "search"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*mark.split("=", 1))
        stopped = Command("train", [*WORDS, f"run.storage={directory}"], directory, preloaded)
        stopped.wait_until(lambda: any(has_saved(RunFolder(path)) for path in sweep.glob("optim.lr=*")))
        stopped.process.terminate()
        stop_code = stopped.wait()
        wait_until_none(lambda: descendants_with(mark))
        after_stop = look(Storage.at(str(sweep)))[1]
        again = Command("train", [*WORDS, f"run.storage={directory}"], directory, preloaded, joins=True)
        try:
            code = again.wait()
        finally:
            again.process.kill()
    assert code == 0, again.output  # an early-stopped trial is not a failure
    return {
        "sweep": sweep, "stopped": stopped.output, "stop_code": stop_code, "after_stop": after_stop,
        "again": again.output, "trials": look(Storage.at(str(sweep)))[1],
    }  # fmt: skip


def curve(trial, sweep):
    points = RunFolder(sweep / trial.trial.name).metrics()
    return [(point["epoch"], point["val_accuracy"]) for point in points if "val_accuracy" in point]


def test_sigterm_stops_a_sweep_after_a_last_save(story):
    assert story["stop_code"] == 75, story["stopped"]
    assert "run the same command with sweep.name=search to resume" in story["stopped"]
    (begun,) = story["after_stop"]
    assert begun.status == begun.state.status == INTERRUPTED
    assert f"step_{begun.state.step:08}" in begun.state.checkpoint


def test_the_same_command_goes_on_with_the_broken_trial_from_its_last_save(story):
    (begun,) = story["after_stop"]
    (restored,) = RunFolder(story["sweep"] / begun.trial.name).events("restored")
    assert restored["step"] == begun.state.step
    assert story["trials"][0].trial.name == begun.trial.name
    assert story["trials"][0].status == FINISHED


def test_the_proposals_are_those_of_the_seed_and_the_results(story):
    space, known = [Interval("optim.lr", LOW, HIGH, is_log=True)], []
    assert len(story["trials"]) == NUM_TRIALS
    for number, each in enumerate(story["trials"]):
        assert each.trial.proposal == propose(space, "tpe", "max", SEED, number, known)
        value = each.value("val_accuracy") if each.status == FINISHED else None
        values = [value for _, value in curve(each, story["sweep"])]
        known.append(Known(each.trial.proposal, each.status, value, [] if each.status == FINISHED else values))


def test_a_trial_that_lags_behind_is_stopped_early_with_its_checkpoint(story):
    good, bad = story["trials"][:2]
    assert (bad.status, bad.trial.stopped_at) == ("stopped", 1), story["again"]
    assert dict(curve(bad, story["sweep"]))[1] < dict(curve(good, story["sweep"]))[1]
    assert bad.epoch < EPOCHS
    run = RunFolder(story["sweep"] / bad.trial.name)
    assert f"step_{bad.state.step:08}" in run.record["checkpoint"]
    assert run.checkpoints
    assert f"stopped     {bad.trial.name}: val_accuracy" in story["again"]


def test_the_leaderboard_tells_finished_from_stopped(story):
    rows = list(csv.DictReader((story["sweep"] / "leaderboard.csv").open()))
    assert [(row["trial"], row["state"]) for row in rows] == [
        (each.trial.name, each.status) for each in story["trials"]
    ]  # fmt: skip
    assert float(rows[0]["val_accuracy"]) == story["trials"][0].value("val_accuracy")
    assert [row["epochs"] for row in rows] == [str(each.epoch) for each in story["trials"]]
