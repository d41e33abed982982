"""The parts of a sweep without Ray: names, the record, fitting trials, the leaderboard, and rejected sweeps."""

import csv
import io
import json
import re
import sys
import textwrap

import pytest
from omegaconf import OmegaConf
from rich.console import Console

import ftexp.cluster.resources
from ftexp.cli.compose import run_hydra
from ftexp.cluster.interruptible import Terminated
from ftexp.cluster.resources import Workers, decide_workers, num_shares
from ftexp.config.schema import Config, ScalingConfig
from ftexp.errors import ConfigError, SweepFailedError
from ftexp.rundir.names import RUN_FILE
from ftexp.rundir.ranking import ranked, varying
from ftexp.rundir.state import FAILED, FINISHED, INTERRUPTED, RUNNING, RunState
from ftexp.rundir.sweep_record import Reached, SweepRecord, Trial, look, read_sweep_record
from ftexp.storage.directory import Storage
from ftexp.storage.lease import Lease, is_held
from ftexp.sweep.hydra.plugins import with_plugins
from ftexp.sweep.run import grid, preparation
from ftexp.sweep.run.identity import parse_words, swept_keys, trial_name
from ftexp.sweep.run.records import Records
from ftexp.sweep.run.runner import Runner, TrialProcess, config_of, failures_of, fits, require_room
from ftexp.sweep.show.display import Display
from ftexp.sweep.show.leaderboard import as_csv, publish
from ftexp.sweep.show.picture import draw

COMPOSED = OmegaConf.create({"optim": {"lr": 0.001}, "seed": 1, "data": {"mean": [0.5, 0.5]}, "model": {"name": "a"}})


# Names


def test_a_trial_is_named_by_values_not_by_how_they_were_typed():
    words = ["optim.lr=1e-3", "model=vit", "++seed=1", "data.mean=[0.5, 0.5]", "sweep.name=x", "hydra.verbose=true"]
    job = parse_words(words, COMPOSED)
    assert job == {"optim.lr": "0.001", "model": "vit", "seed": "1", "data.mean": "[0.5,0.5]"}
    assert trial_name(job, ["optim.lr", "model"]) == "model=vit,optim.lr=0.001"


def test_only_what_was_ever_swept_names_a_trial():
    jobs = [{"seed": "1", "optim.lr": "0.1"}, {"seed": "2", "optim.lr": "0.1"}]
    assert swept_keys(jobs, []) == ["seed"]
    assert swept_keys(jobs[:1], ["seed"]) == ["seed"]  # now a single value, in a sweep that had two
    assert swept_keys(jobs[:1], []) == ["optim.lr", "seed"]
    assert trial_name({}, []) == "default"


def test_long_and_unsafe_names_are_told_apart_by_a_hash():
    one, other = ({"data.root": f"/{'a' * 200}/{end}"} for end in "xy")
    names = {trial_name(job, ["data.root"]) for job in (one, other)}
    assert len(names) == 2
    assert all(len(name) <= 100 and "/" not in name for name in names)
    assert trial_name({"a": "x y"}, ["a"]) != trial_name({"a": "x-y"}, ["a"])


# Workers


@pytest.fixture
def no_gpus(monkeypatch):
    monkeypatch.setattr(ftexp.cluster.resources, "num_local_gpus", lambda: 0)


@pytest.mark.parametrize(
    ("cpus", "share", "workers"),
    [
        (2, 2, Workers(1, False, {"CPU": 1})),
        (2, 1, Workers(2, False, {"CPU": 1})),
        (8, 2, Workers(2, False, {"CPU": 2})),
    ],
)
def test_trials_that_share_a_machine_share_its_cores(no_gpus, cpus, share, workers):
    assert decide_workers(ScalingConfig(), cpus, share) == workers


def test_a_number_of_workers_is_kept_in_a_sweep_too(no_gpus):
    assert decide_workers(ScalingConfig(num_workers=2), 2, share=2) == Workers(2, False, {"CPU": 1})


def test_as_many_trials_share_a_machine_as_there_are_up_to_its_cores(no_gpus, monkeypatch):
    monkeypatch.setattr(ftexp.cluster.resources, "usable_cpus", lambda: 4)
    assert [num_shares([Config()] * count, None) for count in (1, 3, 8)] == [1, 3, 4]
    assert num_shares([Config()] * 8, 2) == 2


# Which trials fit


def test_trials_fit_beside_each_other_to_the_last_fraction():
    tenths = [{"CPU": 0.1}] * 9
    assert fits({"CPU": 0.1}, {"CPU": 1.0}, tenths)
    assert not fits({"CPU": 0.1}, {"CPU": 1.0}, [*tenths, {"CPU": 0.1}])
    assert not fits({"GPU": 1}, {"CPU": 8.0}, [])


ONE_CPU = Workers(1, False, {"CPU": 1})


def process(tmp_path, name="a", workers=ONE_CPU):
    return TrialProcess(Trial(name=name, values={}, epochs=2), Config(), [], workers, Storage.at(str(tmp_path), name))


def test_a_trial_that_can_never_fit_is_named(tmp_path):
    (line,) = require_room([process(tmp_path), process(tmp_path, "b", Workers(3, False, {"CPU": 2}))], {"CPU": 4.0})
    assert line == "b needs 6 CPU, and the cluster has 4 CPU"


CHILD = """
import pickle, sys
request = pickle.load(sys.stdin.buffer)
print("ftexp:", request)
{body}
"""


def run(tmp_path, bodies, monkeypatch, max_concurrent=None, capacity=2.0):
    """Run a process per body instead of trials; return the processes and the sequence of status changes."""
    import ftexp.sweep.run.runner as runner

    processes, changes = [], []
    for name in bodies:
        processes.append(process(tmp_path, name))
    script = tmp_path / "child.py"
    branches = "".join(f"if request == {name!r}:\n{textwrap.indent(body, '    ')}\n" for name, body in bodies.items())
    script.write_text(CHILD.format(body=branches))
    monkeypatch.setattr(runner, "_SCRIPT", script)
    Runner(
        processes, {"CPU": capacity}, max_concurrent, [sys.executable], lambda each: each.trial.name,
        lambda each: changes.append((each.trial.name, each.trial.status)), lambda: None,
    ).run()  # fmt: skip
    return processes, changes


def test_one_failure_is_its_own_and_has_a_reason(tmp_path, monkeypatch):
    processes, _ = run(tmp_path, {"good": "pass", "bad": "sys.exit(1)", "also": "pass"}, monkeypatch)
    assert [each.trial.status for each in processes] == [FINISHED, FAILED, FINISHED]
    assert processes[1].trial.error == "bad (exit code 1)"


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its driver was killed by SIGKILL"),
        ("sys.exit(75)", "killed (exit code 75)"),  # as after a SIGTERM from outside the sweep
    ],
)
def test_a_driver_that_somebody_ends_is_started_again_as_often_as_failures_are_allowed(
    tmp_path, monkeypatch, end, told
):
    processes, changes = run(tmp_path, {"killed": end}, monkeypatch)
    assert changes.count(("killed", RUNNING)) == 1 + Config().failure.max_failures
    assert (processes[0].trial.status, processes[0].trial.error) == (FAILED, told)


def test_a_trial_that_is_started_again_goes_on_whatever_resume_said(tmp_path):
    never = process(tmp_path)
    never.config.resume = "never"
    found = []
    for never.num_starts in (1, 2):
        found.append(config_of(never).resume)
    assert found == ["never", "auto"]


def test_a_trial_that_cannot_be_started_leaves_the_others_alone(tmp_path, monkeypatch):
    (tmp_path / "bad").write_text("where its run directory should be")
    processes, _ = run(tmp_path, {"good": "pass", "bad": "pass", "also": "pass"}, monkeypatch)
    assert [each.trial.status for each in processes] == [FINISHED, FAILED, FINISHED]
    assert processes[1].trial.error.startswith("it could not start: [Errno ")


class Flaky(Storage):
    """Fails to write while `is_down`."""

    is_down = False

    def write_bytes(self, name, content):
        if Flaky.is_down:
            raise OSError("no space left")
        super().write_bytes(name, content)


def test_a_store_that_is_down_costs_a_sweep_nothing_but_the_wait(directory, monkeypatch):
    said, settled = [], []
    records = Records(
        Flaky(directory.uri), record(trial("a")), lambda: settled.append(1), lambda *text: said.append(text)
    )
    monkeypatch.setattr(Flaky, "is_down", True)
    for _ in range(2):
        with records.riding_out():
            records.write()
    assert (records.is_written, len(settled)) == (False, 2)
    assert said == [("! the sweep's records can't be written: no space left; retrying", "yellow")]
    monkeypatch.setattr(Flaky, "is_down", False)
    with records.riding_out():
        records.write()
    assert records.is_written
    assert [each.name for each in read_sweep_record(directory).trials] == ["a"]
    with pytest.raises(TypeError), records.riding_out():  # a bug is not an outage
        raise TypeError


@pytest.mark.parametrize(
    ("max_concurrent", "capacity", "at_once"), [(None, 2.0, 2), (1, 2.0, 1), (None, 1.0, 1), (3, 9.0, 3)]
)
def test_no_more_run_at_once_than_fit_or_are_allowed(tmp_path, monkeypatch, max_concurrent, capacity, at_once):
    _, changes = run(tmp_path, dict.fromkeys("abcd", "pass"), monkeypatch, max_concurrent, capacity)
    running, highest = 0, 0
    for _, status in changes:
        running += 1 if status == RUNNING else -1
        highest = max(highest, running)
    assert highest == at_once
    assert [name for name, status in changes if status == RUNNING] == list("abcd")


STOPS = """
import signal, time
def stop(number, _):
    print("stopped", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_sigterm_stops_every_trial_and_starts_no_other(tmp_path, monkeypatch):
    import ftexp.sweep.run.runner as runner

    monkeypatch.setattr(runner, "_SCRIPT", tmp_path / "child.py")
    (tmp_path / "child.py").write_text(CHILD.format(body=STOPS))
    processes = [process(tmp_path, name) for name in "abc"]
    asked = []

    def tick():
        logs = [each.log for each in processes[:2]]
        if not asked and all(log.exists() and "ready" in log.read_text() for log in logs):
            asked.append(Terminated())

    run_until_terminated(processes, tick, asked)
    assert [each.trial.status for each in processes] == [INTERRUPTED, INTERRUPTED, "waiting"]
    assert all("stopped" in each.log.read_text() for each in processes[:2])


def run_until_terminated(processes, tick, asked):
    running = Runner(
        processes, {"CPU": 2.0}, None, [sys.executable], lambda each: each.trial.name, lambda _: None, tick, asked
    )  # fmt: skip
    with pytest.raises(Terminated):
        running.run()


def test_what_a_trial_that_hangs_on_after_a_signal_gets_is_sigkill(tmp_path, monkeypatch):
    import ftexp.sweep.run.runner as runner

    monkeypatch.setattr(runner, "_SCRIPT", tmp_path / "child.py")
    monkeypatch.setattr(runner, "_END_WITHIN_S", 0.2)
    (tmp_path / "child.py").write_text(CHILD.format(body=STOPS.replace("sys.exit(75)", "return")))
    processes, asked = [process(tmp_path)], []

    def tick():
        if not asked and processes[0].log.exists() and "ready" in processes[0].log.read_text():
            asked.append(Terminated())

    run_until_terminated(processes, tick, asked)
    assert processes[0].trial.status == INTERRUPTED


def test_trials_that_are_proposed_one_by_one_are_proposed_when_there_is_room_for_them(tmp_path, monkeypatch):
    import ftexp.sweep.run.runner as runner

    monkeypatch.setattr(runner, "_SCRIPT", tmp_path / "child.py")
    (tmp_path / "child.py").write_text(CHILD.format(body=""))
    names, processes, running = list("abcd"), [], []

    def next_process():
        running.append(sum(each.popen is not None for each in processes))
        if not names:
            return None
        made = process(tmp_path, names.pop(0))
        if made.trial.name == "b":
            made.trial.status = FAILED  # like a proposal with an invalid config
        return made

    changes = []
    Runner(
        processes, {"CPU": 2.0}, None, [sys.executable], lambda each: each.trial.name,
        lambda each: changes.append((each.trial.name, each.trial.status)), lambda: None,
        next_process=next_process, min_needs={"CPU": 1},
    ).run()  # fmt: skip
    assert [each.trial.name for each in processes] == list("abcd")
    assert [each.trial.status for each in processes] == [FINISHED, FAILED, FINISHED, FINISHED]
    assert max(running) <= 1  # the new one and another: two fit
    assert ("b", FAILED) in changes
    assert ("b", RUNNING) not in changes


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("sys.exit(130)", "stopped"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "stopped"),
        ("return", "stopped"),  # it doesn't exit
        ("sys.exit(1)", FAILED),
        ("sys.exit(0)", FINISHED),  # it had finished before it received the stop
    ],
)
def test_a_trial_that_is_stopped_early_is_no_failure(tmp_path, monkeypatch, end, status):
    import ftexp.sweep.run.runner as runner

    body = STOPS.replace("sys.exit(75)", end).replace("SIGTERM", "SIGINT").replace("import signal", "import os, signal")
    monkeypatch.setattr(runner, "_SCRIPT", tmp_path / "child.py")
    if end == "return":
        monkeypatch.setattr(runner, "_END_WITHIN_S", 0.2)
    (tmp_path / "child.py").write_text(CHILD.format(body=body))
    processes = [process(tmp_path)]

    def tick():
        log = processes[0].log
        if processes[0].trial.stopped_at is None and log.exists() and "ready" in log.read_text():
            running.stop_early(processes[0], 3)

    running = Runner(processes, {"CPU": 2.0}, None, [sys.executable], lambda each: "a", lambda _: None, tick)
    running.run()
    assert (processes[0].trial.status, processes[0].trial.stopped_at) == (status, None if status == FAILED else 3)


def test_what_failed_is_listed_with_its_reason(tmp_path):
    good, bad = process(tmp_path, "good"), process(tmp_path, "bad")
    assert failures_of([good, bad]) is None
    bad.trial.status, bad.trial.error = FAILED, "out of luck"
    error = failures_of([good, bad])
    assert (str(error), error.exit_code) == ("1 of 2 trials failed:\nbad: out of luck", 1)


def test_the_command_ends_with_what_the_launcher_says(monkeypatch, capsys):
    import hydra

    def fail(**_):
        def main(_):
            def run():
                raise SweepFailedError("1 of 2 trials failed:\nbad: out of luck")

            return run

        return main

    monkeypatch.setattr(hydra, "main", fail)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert run_hydra(lambda _: None, []) == 1
    assert "bad: out of luck" in capsys.readouterr().err


def test_a_bug_in_a_sweep_is_no_mistake_in_the_command(monkeypatch):
    def fail(*_):
        raise ValueError("of a bug")

    monkeypatch.setattr(grid, "run_grid", fail)
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(ValueError, match="of a bug"):
        run_hydra(lambda _: None, with_plugins(["-m", "optim.lr=1e-3,3e-3"]))


# The display


def displayed(tmp_path, *processes, terminal):
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, height=20, highlight=False)
    shown = record(*(each.trial for each in processes))
    display = Display(Storage.at(str(tmp_path)), shown, list(processes), len(processes), console)
    for each in processes:
        display.changed(each)
    display.close()
    return console.file.getvalue()


def test_without_a_terminal_each_change_is_a_line(tmp_path):
    done, bad = process(tmp_path, "done"), process(tmp_path, "bad")
    done.trial.status, bad.trial.status, bad.trial.error = FINISHED, FAILED, "out of luck"
    finish(Storage.at(str(tmp_path)), "done", 0.75)
    lines = displayed(tmp_path, done, bad, terminal=False).splitlines()
    assert re.fullmatch(r"2/2 finished    done: val_accuracy 0\.7500 after \d+ s", lines[0])
    assert lines[1] == "2/2 failed      bad: out of luck"


def test_of_a_trial_that_was_stopped_early_the_line_says_where_and_a_search_says_how_many_there_will_be(tmp_path):
    from rich.console import Console

    behind, directory = process(tmp_path, "behind"), Storage.at(str(tmp_path))
    behind.trial.status, behind.trial.epochs = "stopped", 9
    finish(directory, "behind", 0.25, INTERRUPTED)
    console = Console(file=io.StringIO(), width=100, highlight=False)
    display = Display(directory, record(behind.trial), [behind], 20, console)
    display.header("tpe, seed 0")
    display.changed(behind)
    assert console.file.getvalue().splitlines()[1:] == [
        "trials   20 over model, optim.lr, 1 stopped early",
        "search   tpe, seed 0",
        "1/20 stopped     behind: val_accuracy 0.2500 at epoch 2 of 9",
    ]


def test_a_terminal_shows_one_table_with_what_differs(tmp_path):
    shown = process(tmp_path, "a")
    shown.trial.status, shown.trial.values = RUNNING, {"model": "vit", "optim.lr": "[a,b]"}
    finish(Storage.at(str(tmp_path)), "a", 0.25, RUNNING)
    text = displayed(tmp_path, shown, terminal=True)
    for part in ("model", "optim.lr", "vit", "[a,b]", "running", "2/2", "0.2500"):
        assert part in text


def test_time_left_follows_the_epochs_of_this_call(tmp_path, monkeypatch):
    import ftexp.sweep.show.display as display

    running = process(tmp_path)
    running.trial.status, running.trial.epochs = RUNNING, 10
    running.began, running.began_at_epoch = 100.0, 4
    monkeypatch.setattr(display.time, "monotonic", lambda: 120.0)
    state = RunState(name="a", epoch=6)
    assert display.time_left(running, Reached(running.trial, RUNNING, state)) == 40.0
    state.epoch = 4
    assert display.time_left(running, Reached(running.trial, RUNNING, state)) is None


# The record


@pytest.fixture
def directory(tmp_path):
    return Storage.at(str(tmp_path), "sweeps", "grid")


def finish(directory, name, value, status=FINISHED):
    import dataclasses
    import json

    state = RunState(name=name, status=status, epoch=2, metrics={"last": {"val_accuracy": value}, "best": {}})
    directory.child(name).write_bytes(RUN_FILE, json.dumps(dataclasses.asdict(state)).encode())


def record(*trials):
    return SweepRecord(name="grid", metric="val_accuracy", mode="max", keys=["model", "optim.lr"], trials=list(trials))


def trial(name, status=FINISHED, **values):
    return Trial(name=name, values={"optim.lr": "0.1", **values}, epochs=2, status=status)


def test_what_a_dead_driver_left_running_is_interrupted_or_has_finished(directory):
    record(trial("cut", RUNNING), trial("done", RUNNING), trial("new", "waiting"), trial("bad", FAILED)).write(
        directory
    )
    finish(directory, "cut", 0.1, RUNNING)
    finish(directory, "done", 0.2)
    assert [each.status for each in look(directory)[1]] == [INTERRUPTED, FINISHED, "waiting", FAILED]


def test_while_the_driver_lives_its_record_is_what_counts(directory):
    record(trial("a", RUNNING), trial("more epochs", "waiting")).write(directory)
    finish(directory, "more epochs", 0.1)
    lease = Lease.take(directory, key="sweep.name")
    try:
        assert [each.status for each in look(directory)[1]] == [RUNNING, "waiting"]
    finally:
        lease.release()
    assert [each.status for each in look(directory)[1]] == [INTERRUPTED, FINISHED]


def test_a_claim_on_an_object_store_is_alive_while_it_beats(memory):
    storage = Storage.at(memory)
    assert not is_held(storage, watch_s=0.2)
    lease = Lease.take(storage, beat_s=0.05, watch_s=0.2)
    assert is_held(storage, watch_s=5)
    lease._ended.set()
    lease._thread.join()
    assert not is_held(storage, watch_s=0.2)


def test_added_values_add_trials_and_the_others_stay(directory):
    kept = record(trial("a"), trial("b"))
    kept.take_over([trial("b"), trial("c", "waiting")])
    kept.write(directory)
    assert [each.name for each in read_sweep_record(directory).trials] == ["b", "c", "a"]


# The leaderboard


def reached(name, value, status=FINISHED, **values):
    state = None
    if value is not None:
        state = RunState(name=name, status=status, epoch=2, metrics={"last": {"val_accuracy": value}, "best": {}})
    return Reached(trial(name, status, **values), status, state)


def test_the_best_comes_first_and_what_failed_last():
    trials = [reached("low", 0.1), reached("bad", 0.99, FAILED), reached("nan", float("nan")), reached("high", 0.9)]
    assert [each.trial.name for each in ranked(record(), trials)] == ["high", "low", "bad", "nan"]
    early = [*trials, reached("earlier", 0.05, "stopped"), reached("early", 0.95, "stopped")]
    assert [each.trial.name for each in ranked(record(), early)] == ["high", "low", "early", "earlier", "bad", "nan"]
    lowest = record()
    lowest.mode = "min"
    assert [each.trial.name for each in ranked(lowest, trials)][:2] == ["low", "high"]


def test_only_what_varies_is_a_column():
    trials = [reached("a", 0.1, model="vit"), reached("b", 0.2, model="resnet18")]
    assert varying(record(), trials) == ["model"]
    rows = list(csv.DictReader(io.StringIO(as_csv(record(), ranked(record(), trials)))))
    assert [(row["trial"], row["model"], row["val_accuracy"]) for row in rows] == [
        ("b", "resnet18", "0.2"), ("a", "vit", "0.1"),
    ]  # fmt: skip
    assert "optim.lr" not in rows[0]


@pytest.mark.parametrize("values", [{}, {"model": "vit"}], ids=["one trial", "words"])
def test_a_picture_is_drawn_of_any_number_of_trials(directory, values):
    assert draw(directory, record(), [reached("a", 0.5, **values)]).startswith(b"\x89PNG")


def test_trials_without_the_objective_are_listed_and_not_drawn(directory, capsys):
    trials = [Reached(trial(name, **{"optim.lr": name}), FINISHED, RunState(name=name)) for name in ("0.1", "0.2")]
    assert draw(directory, record(), trials).startswith(b"\x89PNG")
    publish(directory, record(), trials, Console(width=120))
    assert "0.2" in capsys.readouterr().out
    assert directory.exists("leaderboard.csv")
    assert not directory.exists("leaderboard.png")


@pytest.mark.parametrize(
    ("width", "titles"), [(56, ["val_", "optim.lr", "accuracy"]), (120, ["optim.lr", "val_accuracy"])]
)
def test_the_titles_of_a_narrow_leaderboard_are_broken_between_words(directory, width, titles):
    shown = io.StringIO()
    trials = [reached(name, 0.5, **{"optim.lr": name}) for name in ("0.1", "0.2")]
    publish(directory, record(), trials, Console(width=width, file=shown))
    assert shown.getvalue().split()[: len(titles)] == titles


# Sweeps that are rejected before anything is started


def plan(directory, *configs, retry_failed=True, before=(), keeps_stopped=False):
    processes = [
        TrialProcess(Trial(name=name, values={}, epochs=2), config, [], Workers(1, False, {}), directory.child(name))
        for name, config in configs
    ]
    preparation.mark_what_is_done(directory, processes, retry_failed, record(*before), keeps_stopped)
    return [each.trial.status for each in processes]


def config(**changes):
    made = Config(**changes)
    made.train.epochs = 2
    return made


def test_finished_trials_are_done_and_failed_ones_are_retried_if_asked(directory):
    from ftexp.config.fingerprint import fingerprint

    finish(directory, "a", 0.5)
    both = [("a", config()), ("b", config())]
    bad = trial("b", FAILED)
    assert fingerprint(config())
    assert plan(directory, *both, before=[bad]) == [FINISHED, "waiting"]
    assert plan(directory, *both, before=[bad], retry_failed=False) == [FINISHED, FAILED]


def test_what_was_stopped_early_stays_so_in_its_search_and_goes_on_in_a_grid(directory):
    finish(directory, "a", 0.5, INTERRUPTED)
    state = directory.child("a").read_bytes(RUN_FILE).replace(b'"attempts": 0', b'"attempts": 1')
    directory.child("a").write_bytes(RUN_FILE, state)
    early, gone = trial("a", "stopped"), trial("gone", "stopped")
    early.stopped_at = gone.stopped_at = 2
    assert plan(directory, ("a", config()), before=[early], keeps_stopped=True) == ["stopped"]
    assert plan(directory, ("a", config()), before=[early]) == ["waiting"]
    assert plan(directory, ("gone", config()), before=[gone], keeps_stopped=True) == ["waiting"]  # so is its directory


def test_a_changed_base_is_told_once(directory):
    import dataclasses
    import json

    from ftexp.config.fingerprint import fingerprint

    for name in "ab":
        state = RunState(name=name, fingerprint=fingerprint(config(seed=1)), step=30)
        directory.child(name).write_bytes(RUN_FILE, json.dumps(dataclasses.asdict(state)).encode())
    with pytest.raises(ConfigError) as refused:
        plan(directory, ("a", config(seed=2)), ("b", config(seed=2)))
    title, *lines = str(refused.value).splitlines()
    assert "choose another sweep.name, or restore these values" in title
    assert lines == ["seed was 1, and is 2 now"]


def test_the_same_trial_twice_is_refused(directory):
    with pytest.raises(ConfigError, match="give each value once"):
        plan(directory, ("a", config()), ("a", config()))


def test_a_finished_trial_of_pretrained_weights_is_done_with_the_preprocessing_they_brought(directory):
    from ftexp.config.fingerprint import fingerprint

    made = config()
    made.model.pretrained, made.data.mean = True, [0.3]
    brought = config()
    brought.model.pretrained, brought.data.mean, brought.data.crop_pct = True, [0.5], 0.9
    finish(directory, "a", 0.5)
    state = json.loads(directory.child("a").read_bytes(RUN_FILE))
    state |= {"fingerprint": fingerprint(brought), "step": 30, "epoch": 2}
    directory.child("a").write_bytes(RUN_FILE, json.dumps(state).encode())
    assert plan(directory, ("a", made)) == [FINISHED]


def test_a_finished_trial_from_before_there_were_decoders_is_done_with_the_one_it_had(directory):
    from ftexp.config.fingerprint import fingerprint

    before, now = config(), config()
    now.data.decoder, now.data.exif_orientation, now.data.background = "auto", True, "white"
    recorded = fingerprint(before)
    for name in ("decoder", "exif_orientation", "background"):
        del recorded[f"data.{name}"]
    finish(directory, "a", 0.5)
    state = json.loads(directory.child("a").read_bytes(RUN_FILE))
    state |= {"fingerprint": recorded, "step": 30, "epoch": 2}
    directory.child("a").write_bytes(RUN_FILE, json.dumps(state).encode())
    assert plan(directory, ("a", now)) == [FINISHED]
