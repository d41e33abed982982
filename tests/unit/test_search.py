"""A search without Ray: its space, proposals, early stopping, resuming, and rejected settings."""

import dataclasses
import importlib.metadata
import json
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ftexp.config.fingerprint import fingerprint
from ftexp.config.schema import Config, SearchConfig, config_dir
from ftexp.errors import ConfigError
from ftexp.rundir.names import METRICS_FILE, RUN_FILE
from ftexp.rundir.state import FAILED, FINISHED, RUNNING, Failure, RunState
from ftexp.rundir.sweep_record import STOPPED, WAITING, look
from ftexp.storage.directory import Storage
from ftexp.sweep.run.preparation import open_record
from ftexp.sweep.search import proposing
from ftexp.sweep.search.halving import Halving
from ftexp.sweep.search.proposing import Known, propose
from ftexp.sweep.search.search import Search, SearchSetup
from ftexp.sweep.search.space import Interval, Options, inside, num_points, probes, read_space

RATE = "optim.lr=tag(log, interval(1e-4, 1e-1))"
DEPTH = "++model.kwargs.depth=int(interval(1, 3))"
MODEL = "model=vit,vit_tiny,resnet18"
STEPS = "train.accumulate_steps=range(1, 6, 2)"
EPOCHS = 9


def space_of(*words):
    return read_space(OverridesParser.create().parse_overrides(list(words)))


# The space


def test_hydras_own_grammar_spans_the_space():
    fixed, space = space_of("seed=3", MODEL, RATE, "~chaos", DEPTH, STEPS, "schedule.min_lr=interval(0, 1e-5)")
    assert fixed == ["seed=3", "~chaos"]
    assert space == [
        Options("model", ("vit", "vit_tiny", "resnet18"), is_ordered=False),
        Interval("++model.kwargs.depth", 1, 3, is_log=False),
        Interval("optim.lr", 1e-4, 1e-1, is_log=True),
        Interval("schedule.min_lr", 0.0, 1e-5, is_log=False),
        Options("train.accumulate_steps", ("1", "3", "5"), is_ordered=True),
    ]
    assert num_points(space[:2]) == 9
    assert num_points(space) is None


def test_a_shuffled_choice_is_the_same_space_in_every_call():
    spaces = [space_of("seed=shuffle(range(1, 50))", "model=shuffle(choice(a, b, c, d))")[1] for _ in range(3)]
    assert spaces[0] == spaces[1] == spaces[2]
    assert spaces[0][0].words == ("a", "b", "c", "d")


def test_probes_try_every_option_and_both_ends_of_every_interval():
    points = probes(space_of(MODEL, RATE, DEPTH)[1])
    assert {point["model"] for point in points} == {"vit", "vit_tiny", "resnet18"}
    assert {point["optim.lr"] for point in points} == {"0.0001", "0.1"}
    assert {point["model.kwargs.depth"] for point in points} == {"1", "3"}


def test_a_drawn_number_has_few_digits_and_stays_inside():
    drawn = Interval("optim.lr", 1.23446e-4, 0.5, is_log=True)
    assert drawn.word(0.00123456789) == "0.001235"
    assert drawn.word(1.23446e-4) == "0.000123446"  # with four digits, it would be below the interval
    assert [drawn.value(word) for word in ("0.001235", "0.6")] == [0.001235, None]


@pytest.mark.parametrize("word", ["0", "4", "2.0", "2.5", "null"])
def test_a_word_outside_of_an_interval_of_whole_numbers_is_no_point(word):
    (depth,) = space_of(DEPTH)[1]
    assert [depth.value(each) for each in ("1", "3")] == [1, 3]
    assert not inside([depth], {"model.kwargs.depth": word})


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optim.lr=interval(1, 1)", ["a lower and a higher number"]),
        ("optim.lr=tag(log, interval(0, 1))", ["a lower bound above 0"]),
        ("optim.lr=tag(log, choice(1, 2))", ["the tag log needs an interval"]),
        ("optim.lr=tag(lin, interval(1, 2))", ["the tag lin is unknown"]),
        ("seed=1,2,1", ["seed=1,2,1 holds 1 more than once"]),
    ],
)
def test_what_nothing_can_be_drawn_from_is_told_with_key_and_value(word, told):
    with pytest.raises(ConfigError) as refused:
        space_of(word)
    for part in (word, *told):
        assert part in str(refused.value)


# Proposals


def proposals(search, count, *words, seed=0, mode="max", objective=None):
    """Return the first `count` proposals, each made with the results of all before it."""
    _, space = space_of(*words)
    known = []
    for number in range(count):
        point = propose(space, search, mode, seed, number, known)
        if point is None:
            break
        value = objective(point) if objective is not None else None
        known.append(Known(point, FINISHED if objective else RUNNING, value))
    return [each.words for each in known]


def distance(point):
    """Return the distance of optim.lr from 0.01, in decades."""
    import math

    return abs(math.log10(float(point["optim.lr"])) + 2)


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_a_seed_makes_the_same_proposals_again_and_another_seed_makes_others(search):
    first, again, other = (proposals(search, 13, RATE, MODEL, DEPTH, seed=s, objective=distance) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert all(inside(space_of(RATE, MODEL, DEPTH)[1], point) for point in first)


@pytest.mark.parametrize(("mode", "objective"), [("min", distance), ("max", lambda point: -distance(point))])
def test_tpe_goes_where_the_results_are_good_and_random_does_not(mode, objective):
    tpe, random = (
        [distance(point) for point in proposals(search, 30, RATE, mode=mode, objective=objective)[15:]]
        for search in ("tpe", "random")
    )
    assert sum(tpe) < 0.6 * sum(random)


def test_random_proposals_depend_on_no_result():
    results = [proposals("random", 8, RATE, objective=objective) for objective in (distance, None)]
    assert results[0] == results[1]


def test_trials_that_run_are_told_to_tpe():
    done = [Known(point, FINISHED, distance(point)) for point in proposals("random", 12, RATE)]
    (_, space) = space_of(RATE)

    def proposed(*others):
        return propose(space, "tpe", "min", 0, 12, [*done, *others])

    here, there = (Known({"optim.lr": rate}, RUNNING) for rate in ("0.01", "0.0002"))
    assert proposed(here) != proposed(there)
    assert proposed(dataclasses.replace(here, status=FAILED)) == proposed()  # a crash is no information


def test_tpe_keeps_away_from_what_diverged_or_was_stopped_early():
    (_, space) = space_of(RATE)
    points = [{"optim.lr": f"{10 ** (-4 + 3 * i / 19):.4g}"} for i in range(20)]
    known = [
        Known(point, FINISHED, distance(point))
        if float(point["optim.lr"]) < 0.005
        else Known(point, STOPPED, curve=[9.0] if i % 2 else [])
        for i, point in enumerate(points)
    ]
    rates = [float(propose(space, "tpe", "min", seed, 20, known)["optim.lr"]) for seed in range(10)]
    assert max(rates) < 0.01
    assert min(rates) > 0.0005


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_no_point_is_proposed_twice_and_a_space_ends(search):
    drawn = proposals(search, 20, MODEL, DEPTH, objective=lambda point: float(point["model"] == "vit"))
    assert len(drawn) == 9
    assert len({tuple(point.items()) for point in drawn}) == 9


def test_what_is_left_of_a_small_space_is_counted_out_where_draws_do_not_hit_it(monkeypatch):
    monkeypatch.setattr(proposing, "_MAX_DRAWS", 1)
    assert len(proposals("random", 20, MODEL, DEPTH)) == 9
    _, space = space_of(RATE)
    (first,) = proposals("random", 1, RATE)
    # there are infinitely many others, but no draw hit one
    assert propose(space, "random", "max", 0, 0, [Known(first, RUNNING)]) is None


def test_a_space_of_very_many_points_is_neither_counted_out_nor_held_in_memory(monkeypatch):
    _, space = space_of("seed=int(interval(0, 2147483647))", "optim.lr=1e-3,3e-3")
    assert num_points(space) == 2**32
    monkeypatch.setattr(proposing, "_MAX_DRAWS", 0)  # so that remaining points would be enumerated
    first = propose(space, "random", "max", 0, 0, [])
    second = propose(space, "random", "max", 0, 1, [Known(first, RUNNING)])
    assert [first, second] == [{"optim.lr": "0.001", "seed": "0"}, {"optim.lr": "0.001", "seed": "1"}]


# Early stopping


def halving(mode="max", grace_epochs=1, reduction_factor=2.0, max_epochs=8):
    return Halving(mode, grace_epochs, reduction_factor, max_epochs)


def test_a_trial_that_is_behind_at_a_rung_is_stopped_there():
    rungs = halving()
    assert rungs.decide("first", [(1, 0.5)]) is None  # there is nothing to compare with yet
    assert rungs.decide("worse", [(1, 0.4)]) == 1
    assert rungs.decide("better", [(1, 0.6)]) is None
    assert rungs.decide("better", [(1, 0.6), (2, 0.7)]) is None
    assert rungs.decide("first", [(1, 0.5), (2, 0.69)]) == 2
    assert halving("min").decide("first", [(1, 0.5)]) is None


def test_the_mode_says_what_is_behind():
    rungs = halving("min")
    rungs.take("first", [(1, 0.5)])
    assert rungs.decide("worse", [(1, 0.6)]) == 1
    assert rungs.decide("better", [(1, 0.4)]) is None


def test_no_trial_is_stopped_before_the_grace_or_at_its_end():
    rungs = halving(grace_epochs=3, max_epochs=6)
    rungs.take("good", [(epoch, 0.9) for epoch in range(1, 7)])
    assert rungs.decide("bad", [(1, 0.1), (2, 0.1)]) is None
    assert rungs.decide("bad", [(1, 0.1), (2, 0.1), (3, 0.1)]) == 3
    assert rungs.decide("late", [(3, 0.95), (6, 0.1)]) is None


def test_what_a_trial_needs_lies_between_the_values_of_those_before_it():
    rungs = halving(reduction_factor=4)
    for name, value in zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True):
        rungs.take(name, [(1, value)])
    assert rungs.decide("below 0.325", [(1, 0.32)]) == 1
    assert rungs.decide("at 0.32", [(1, 0.32)]) is None  # stopped trials count, too


def test_a_trial_is_compared_once_at_each_rung_and_not_at_one_that_it_has_skipped():
    rungs = halving()
    rungs.take("good", [(epoch, 0.5) for epoch in range(1, 8)])
    assert rungs.decide("first at 2", [(2, 0.6), (3, 0.1)]) is None
    assert rungs.decide("first at 2", [(2, 0.6), (3, 0.1), (4, 0.1)]) == 4


def test_points_that_come_at_once_are_decided_in_their_order():
    rungs = halving()
    rungs.take("good", [(1, 0.9)])
    assert rungs.decide("bad", [(1, 0.1), (2, 0.2), (3, 0.95)]) == 1


# A search that resumes


def compose(words):
    values = dict(word.lstrip("+").split("=", 1) for word in words)
    config = Config()
    config.train.epochs, config.optim.lr = EPOCHS, float(values["optim.lr"])
    return config, values


class Sweep:
    """A search in a directory, with simulated trials."""

    def __init__(self, directory, **settings):
        chosen = {"num_trials": 14, "search": "tpe", **settings}
        self.directory = Storage.at(str(directory))
        config = Config()
        config.train.epochs = EPOCHS
        self.setup = SearchSetup(SearchConfig(**chosen), space_of(RATE)[1], [], [config], compose)
        self.begin()

    def begin(self):
        """Start as the command does, from the files on disk alone."""
        self.record = open_record(self.directory, Config(), lambda _: self.setup.keys)
        self.search = Search(self.directory, self.record, self.setup, share=1)
        self.processes = self.search.processes
        self.record.take_over([process.trial for process in self.processes])

    def next(self):
        process = self.search.next_process()
        if process is not None:
            self.processes.append(process)
        return process

    def reach(self, process, status, values=(0.5,), metric="val_accuracy", cause=None):
        """Write a trial's progress to its run directory, and its status to the sweep record."""
        failures = [Failure(attempt=1, cause=cause, rank=0, step=1, error="")] if cause else []
        state = RunState(
            name=process.trial.name, status=FINISHED if status == FINISHED else RUNNING, epoch=len(values), attempts=1,
            fingerprint=fingerprint(process.config), metrics={"last": {metric: values[-1]}, "best": {}},
            failures=failures,
        )  # fmt: skip
        lines = [json.dumps({"epoch": i, metric: value}) for i, value in enumerate(values, start=1)]
        process.run_dir.write_bytes(RUN_FILE, json.dumps(dataclasses.asdict(state)).encode())
        process.run_dir.write_bytes(METRICS_FILE, "\n".join([*lines, ""]).encode())
        process.trial.status = status
        self.record.write(self.directory)

    @property
    def proposed(self):
        return [process.trial.proposal for process in self.processes]


def score(process):
    return -distance(process.trial.proposal)


def test_a_search_that_begins_anew_before_every_trial_proposes_what_an_undisturbed_one_does(tmp_path):
    whole, broken = Sweep(tmp_path / "whole"), Sweep(tmp_path / "broken")
    while (process := whole.next()) is not None:
        whole.reach(process, FINISHED, [score(process)] * EPOCHS)
    while (process := broken.next()) is not None:
        broken.reach(process, RUNNING, [score(process)])  # then the driver is killed
        broken.begin()
        process = broken.processes[-1]
        assert (process.trial.status, len(broken.search.processes)) == (WAITING, len(broken.processes))
        broken.reach(process, FINISHED, [score(process)] * EPOCHS)
        broken.begin()
    assert len(whole.proposed) == 14
    assert broken.proposed == whole.proposed
    assert not broken.search.has_more


@pytest.mark.parametrize("how", ["looked at", "begun anew", "too quick", "killed as it finishes"])
def test_one_after_the_other_early_stopping_depends_on_the_curves_alone(tmp_path, how):
    sweep = Sweep(tmp_path, search="random", num_trials=7, scheduler="asha")
    for start in (0.5, 0.6, 0.3, 0.55, 0.9, 0.2, 0.58):
        run_trial(
            sweep,
            [start + 0.01 * epoch for epoch in range(EPOCHS)],
            is_quick=how in ("too quick", "killed as it finishes"),
        )
        if how == "killed as it finishes":
            sweep.processes[-1].trial.status = RUNNING  # only in the record; its run directory says finished
            sweep.record.write(sweep.directory)
        if how in ("begun anew", "killed as it finishes"):
            sweep.begin()
        sweep.search.settle()
    assert [(known.status, len(known.curve)) for known in map(sweep.search._known, sweep.processes)] == [
        (FINISHED, 0), (FINISHED, 0), (STOPPED, 1), (STOPPED, 3), (FINISHED, 0), (STOPPED, 1), (STOPPED, 3),
    ]  # fmt: skip


def run_trial(sweep, curve, is_quick):
    """Log a curve for the next trial; stop it when the search asks to, unless `is_quick`: it finishes before."""
    process = sweep.next()
    process.popen = object()  # it is running
    for epoch in range(1, EPOCHS + 1):
        sweep.reach(process, RUNNING, curve[:epoch])
        if not is_quick and (found := sweep.search.to_stop()):
            ((who, process.trial.stopped_at),) = found
            assert who is process
            sweep.reach(process, STOPPED, curve[: epoch + 3])  # it continues for a moment until it receives the stop
            break
    else:
        sweep.reach(process, FINISHED, curve)
    process.popen = None


def test_a_trial_that_was_broken_off_behind_the_others_need_not_go_on(tmp_path):
    sweep = Sweep(tmp_path, search="random", scheduler="asha")
    behind, good = sweep.next(), sweep.next()
    sweep.reach(behind, RUNNING, [0.1])
    sweep.reach(good, FINISHED, [0.9] * EPOCHS)
    sweep.begin()
    trials = [process.trial for process in sweep.processes]
    assert [(trial.status, trial.stopped_at) for trial in trials] == [(STOPPED, 1), (FINISHED, None)]


def test_a_trial_that_was_told_to_stop_stays_stopped_if_the_driver_died_meanwhile(tmp_path):
    sweep = Sweep(tmp_path, search="random", scheduler="asha")
    process = sweep.next()
    process.trial.stopped_at = 2
    sweep.reach(process, RUNNING, [0.1, 0.1, 0.1])
    sweep.begin()
    assert (sweep.processes[0].trial.status, sweep.processes[0].trial.stopped_at) == (STOPPED, 2)


def test_points_outside_of_a_changed_space_stay_in_the_record_and_count_for_nothing(tmp_path):
    sweep = Sweep(tmp_path, num_trials=3, search="random")
    while (process := sweep.next()) is not None:
        sweep.reach(process, FINISHED)
    _, middle, _ = sorted(float(point["optim.lr"]) for point in sweep.proposed)
    space = space_of(f"optim.lr=tag(log, interval({middle}, 1e-1))")[1]
    sweep.setup = dataclasses.replace(sweep.setup, space=space)
    sweep.begin()
    assert len(sweep.processes) == 2
    assert sweep.next() is not None
    assert len(look(sweep.directory)[1]) == 4


def test_a_crash_tells_the_search_nothing_and_a_divergence_that_the_point_is_bad(tmp_path):
    sweep = Sweep(tmp_path)
    crashed, diverged = sweep.next(), sweep.next()
    sweep.reach(crashed, FAILED, cause="crash")
    sweep.reach(diverged, FAILED, cause="non_finite")
    assert [sweep.search._known(process).status for process in sweep.processes] == [FAILED, STOPPED]


def test_a_value_that_is_not_a_number_is_as_bad_as_can_be(tmp_path):
    sweep = Sweep(tmp_path)
    process = sweep.next()
    sweep.reach(process, FINISHED, [None])  # JSON's form of NaN
    assert sweep.search._known(process) == Known(process.trial.proposal, STOPPED)
    assert sweep.search.problem() is None


def test_a_run_without_the_objective_ends_the_search_with_a_reason(tmp_path):
    sweep = Sweep(tmp_path)
    process = sweep.next()
    sweep.reach(process, FINISHED, metric="val_loss")
    assert sweep.next() is None
    assert f"{process.trial.name} has finished without logging val_accuracy" in sweep.search.problem()
    assert "sweep.metric" in sweep.search.problem()


def test_a_proposal_that_makes_no_good_config_fails_alone(tmp_path):
    def choosy(words):
        config, values = compose(words)
        if config.optim.lr > 0.05:
            raise ConfigError("optim.lr is too much\nand no good at all")
        return config, values

    sweep = Sweep(tmp_path, search="random", num_trials=40)
    sweep.setup = dataclasses.replace(sweep.setup, compose=choosy)
    sweep.begin()
    while (process := sweep.next()) is not None:
        if process.trial.status == WAITING:
            sweep.reach(process, FINISHED)
    failed = [process.trial for process in sweep.processes if process.trial.status == FAILED]
    assert {trial.error for trial in failed} == {"optim.lr is too much; and no good at all"}
    assert 0 < len(failed) < 20


def test_a_proposal_is_in_the_record_before_its_trial_begins(tmp_path):
    sweep = Sweep(tmp_path)
    process = sweep.next()
    assert [each.trial.proposal for each in look(sweep.directory)[1]] == [process.trial.proposal]
    assert process.trial.name == f"optim.lr={process.trial.proposal['optim.lr']}"


# The command


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Function that runs the command; returns (exit code, stderr, jobs or setup passed to the grid or the search)."""
    import ftexp.sweep.run.grid
    import ftexp.sweep.search.search
    from ftexp.train import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(ftexp.config.checks.scaling, "num_local_gpus", lambda: 0)
    reached = []
    monkeypatch.setattr(ftexp.sweep.search.search, "run_search", reached.append)
    monkeypatch.setattr(
        ftexp.sweep.run.grid, "run_grid", lambda configs, jobs, _: reached.extend(jobs) or [0.0] * len(jobs)
    )

    def run(*words):
        reached.clear()
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err, list(reached)

    return run


@pytest.mark.parametrize(
    ("words", "jobs"),
    [
        (["seed=1,2", "optim.lr=1e-3,0.01"], [("1", "0.001"), ("1", "0.01"), ("2", "0.001"), ("2", "0.01")]),
        (
            ["seed=choice(3, 4)", "train.accumulate_steps=range(1, 6, 4)"],
            [("3", "1"), ("3", "5"), ("4", "1"), ("4", "5")],
        ),
        (["optim=glob(*)"], [("adamw",), ("lamb",), ("sgd",)]),
        (["optim=glob([a*,s*])", "seed=5"], [("adamw", "5"), ("sgd", "5")]),
        (["optim=glob(*, exclude=[lamb])"], [("adamw",), ("sgd",)]),
    ],
)
def test_hydras_own_grid_goes_through_the_launcher(command, words, jobs):
    code, err, reached = command("-m", *words)
    assert (code, err) == (0, "")
    assert [tuple(job[word.partition("=")[0]] for word in words) for job in reached] == jobs


def test_a_search_gets_its_settings_and_its_space(command):
    words = [RATE, "model=glob(resnet*)", "model.kwargs.depth=int(interval(1, 3))", "seed=7", "sweep.metric=val_loss"]
    settings = ["num_trials=9", "search=random", "seed=3", "scheduler=asha", "reduction_factor=2"]
    code, err, (setup,) = command(
        "-m", "hydra/sweeper=tune", *words, "sweep.mode=min", *(f"hydra.sweeper.{each}" for each in settings)
    )
    assert (code, err) == (0, "")
    assert setup.settings == SearchConfig(
        num_trials=9, search="random", seed=3, scheduler="asha", grace_epochs=1, reduction_factor=2.0
    )
    assert setup.keys == ["model", "model.kwargs.depth", "optim.lr"]
    config, values = setup.compose([*setup.fixed, "model=resnet18", "++model.kwargs.depth=2", "optim.lr=0.005"])
    assert (config.optim.lr, config.seed, config.model.kwargs) == (0.005, 7, {"depth": 2})
    assert {key: values[key] for key in setup.keys} == {
        "model": "resnet18", "model.kwargs.depth": "2", "optim.lr": "0.005",
    }  # fmt: skip


def test_the_search_that_the_help_names_is_one(command):
    text = (config_dir() / "hydra" / "help" / "ftexp.yaml").read_text().replace("\\\n", "")  # as a shell joins lines
    (example,) = (line for line in text.splitlines() if "hydra/sweeper=tune" in line)
    code, err, (setup,) = command(*shlex.split(example, comments=True)[3:])
    assert (code, err, setup.keys, setup.num_trials) == (0, "", ["optim.lr"], 20)


TUNE = ["-m", "hydra/sweeper=tune"]
ASHA = "hydra.sweeper.scheduler=asha"
WRONG = {
    "interval in a grid": (["-m", RATE], f"{RATE}: a grid needs a list of values", "hydra/sweeper=tune"),
    "no space": ([*TUNE, "seed=1"], "has no key to search", "optim.lr=tag(log, interval(1e-4, 1e-2))"),
    "unknown search": (
        [*TUNE, RATE, "hydra.sweeper.search=tp"],
        "hydra.sweeper.search='tp' is not one of random, tpe",
        "Did you mean 'tpe'",
    ),
    "unknown scheduler": ([*TUNE, RATE, "hydra.sweeper.scheduler=ash"], "Did you mean 'asha'"),
    "unknown setting": (
        [*TUNE, RATE, "hydra.sweeper.num_trial=3"],
        "hydra.sweeper.num_trial is not a key",
        "Did you mean 'hydra.sweeper.num_trials'",
    ),
    "setting of a search in a grid": (
        ["-m", "seed=1,2", "hydra.sweeper.num_trials=3"],
        "hydra.sweeper.num_trials is not a key",
        "hydra/sweeper=tune",
    ),
    "no trials": ([*TUNE, RATE, "hydra.sweeper.num_trials=0"], "hydra.sweeper.num_trials=0 is out of range"),
    "words for trials": ([*TUNE, RATE, "hydra.sweeper.num_trials=many"], "=many is not a whole number"),
    "value twice in other words": (
        [*TUNE, "optim.lr=1,1.0"],
        "optim.lr=1,1.0 holds one value more than once",
    ),
    "glob of nothing": ([*TUNE, "optim=glob(z*)"], "optim=glob(z*) holds no value"),
    "bad end": ([*TUNE, "optim.lr=interval(-1, 1)"], "optim.lr=-1.0 is out of range"),
    "bad option": ([*TUNE, "optim=adamw,adamm"], "optim=adamm is unknown", "Did you mean 'adamw'"),
    "unknown key": ([*TUNE, "optim.lrr=interval(1, 2)"], "optim.lrr is not a key", "Did you mean 'optim.lr'"),
    "unknown metric": ([*TUNE, RATE, "sweep.metric=val_acc"], "sweep.metric=val_acc", "Did you mean 'val_accuracy'"),
    "unknown metric of checkpoints": (
        [*TUNE, RATE, "checkpoint.checkpoint_score_attribute=f1"],
        "checkpoint.checkpoint_score_attribute=f1 is not a logged metric",
        "val_accuracy",
    ),
    "wrong mode": (
        [*TUNE, RATE, "sweep.metric=val_loss", "sweep.mode=lowest"],
        "sweep.mode='lowest' is not one of max, min",
    ),
    "asha by the test's metric": (
        [*TUNE, RATE, ASHA, "sweep.metric=test_loss", "sweep.mode=min"],
        "test_loss is measured only once, at the end",
    ),
    "asha without room": ([*TUNE, RATE, ASHA, "hydra.sweeper.grace_epochs=30"], "must be below train.epochs=30"),
    "asha over epochs": ([*TUNE, "train.epochs=10,20", ASHA], "train.epochs can't be searched"),
    "asha's settings without it": (
        [*TUNE, RATE, "hydra.sweeper.grace_epochs=2"],
        "hydra.sweeper.grace_epochs=2 needs hydra.sweeper.scheduler=asha",
    ),
    "factor of one": ([*TUNE, RATE, ASHA, "hydra.sweeper.reduction_factor=1"], "it must be above 1"),
    "no sweep": (["hydra/sweeper=tune"], "hydra/sweeper=tune needs a sweep: add -m"),
    "another launcher": ([*TUNE, RATE, "hydra/launcher=basic"], "remove hydra/launcher=..."),
    "run.name": ([*TUNE, RATE, "run.name=x"], "run.name: a sweep names its trials"),
    "searched settings of the sweep": ([*TUNE, "sweep.max_concurrent=1,2"], "sweep must be the same in all trials"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_search_is_told_with_key_value_and_fix(command, case):
    words, *told = WRONG[case]
    code, err, reached = command(*words)
    assert (code, reached) == (2, []), err
    assert err.startswith("ftexp: ")
    for part in told:
        assert part in err


@pytest.mark.parametrize("search", ["random", "tpe"])
@pytest.mark.parametrize(
    ("found", "told"),
    [
        (None, "uv run --extra tune"),
        ("2.10.1", "hydra/sweeper=tune needs Optuna 5 or newer, and 2.10.1 is installed"),
    ],
)
def test_a_search_without_a_current_optuna_is_told(command, monkeypatch, found, told, search):
    version = importlib.metadata.version

    def asked(name):
        if name != "optuna":
            return version(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", asked)
    code, err, _ = command(*TUNE, RATE, f"hydra.sweeper.search={search}")
    assert code == 2
    assert told in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optim.lr=-1,1e-3,-2"], ["optim.lr=-1.0 is out of range", "optim.lr=-2.0 is out of range"]),
        (["run.name=a,b"], ["run.name: a sweep names its trials"]),
        (["seed=1,2", "sweep.max_concurrent=0"], ["sweep.max_concurrent=0 is out of range"]),
        (["seed=1,2", "sweep.name=a/b"], ["sweep.name='a/b' is not a valid directory name"]),
        (["seed=1,2", "sweep.metric=val_loss"], ["sweep.metric=val_loss needs sweep.mode"]),
        (
            ["seed=1,2", "sweep.metric=val_los"],
            ["sweep.metric=val_los is not a logged metric. Did you mean 'val_loss'?"],
        ),
        (["sweep.retry_failed=true,false"], ["sweep must be the same in all trials"]),
    ],
)
def test_a_wrong_sweep_is_told_and_nothing_begins(words, told, command):
    code, err, reached = command("-m", *words)
    assert (code, reached) == (2, [])
    for line in told:
        assert line in err
