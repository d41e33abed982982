"""Runs in the real TensorBoard, MLflow (a server with SQLite, on loopback) and wandb (offline), read back."""

import contextlib
import csv
import io
import json
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import urllib.request
import warnings
from collections import Counter
from unittest import mock

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from ftexp.cluster.resources import Workers
from ftexp.driver.context import RunContext
from ftexp.driver.terminal import Terminal
from ftexp.driver.tracker_session import close_trackers, deliver_late, trackers_of
from ftexp.rundir.names import EVENTS_FILE, METRICS_FILE
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import RunState
from ftexp.storage.append_log import AppendLog, read_lines
from ftexp.storage.directory import Storage
from ftexp.trackers.mlflow import PARENT
from ftexp.trackers.registry import Outcome, trackers
from ftexp.trackers.run import Trackers, tracked_run, tracking_id
from ftexp.trackers.series import RUN_LABELS, SERIES
from ftexp.trackers.tensorboard import scalars
from ftexp.trackers.wandb import logged_rows
from tests.support.command import Command, RunFolder
from tests.support.processes import descendants_with, wait_until_none
from tests.support.tracked import ALL, PATIENCE_S, log, made, points_of, settings

# sends points to all three trackers, and is killed in the middle
KILLED = """
import os, signal, sys, threading
from tests.support.tracked import log, made, points_of
folder, uri = sys.argv[1:]
opened = threading.Semaphore(0)
followed, lines = made(folder, uri)
followed.start(lambda event: opened.release())
assert all(opened.acquire(timeout=240) for _ in range(3))
for point in points_of(range(51, 101)):
    log(lines, followed, point)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Restore the environment: MLflow's server and the trackers set variables that later commands would read."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of an MLflow server: its application runs on a thread here, because `mlflow server` starts slowly."""
    from werkzeug.serving import make_server

    directory = tmp_path_factory.mktemp("mlflow")
    logging.getLogger("werkzeug").setLevel("ERROR")  # it logs every request
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{directory}/mlflow.db")  # as `mlflow server` does
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(directory))
        with warnings.catch_warnings(action="ignore"):  # from a dependency of MLflow
            import starlette.middleware.wsgi  # noqa: F401 - imported at the server's first request
        from mlflow.server import app

        serving = make_server("127.0.0.1", 0, app, threaded=True)
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.port}"
        serving.shutdown()
        thread.join()


def deliver(directory, uri, new=(), status="finished", **kwargs):
    """Log the points `new` as one invocation would; return the trackers' failures."""
    followed, lines = made(directory, uri, **kwargs)
    followed.start(lambda event: None)
    for point in new:
        log(lines, followed, point)
    followed.end(Outcome(status=status, tags={"checkpoint": "step_9"}, metrics={"val_loss": 1.0}))
    return followed.wait()


def in_tensorboard(directory):
    return Counter(scalars(directory / "tensorboard"))


def mlflow_runs(uri, filter_string):
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ftexp")
    return client, client.search_runs([experiment.experiment_id], filter_string)


def mlflow_run(uri, directory):
    client, found = mlflow_runs(uri, f"tags.run_dir = '{directory}'")
    assert len(found) == 1
    return client, found[0]


def in_mlflow(uri, directory):
    client, run = mlflow_run(uri, directory)
    found = [metric for name in run.data.metrics for metric in client.get_metric_history(run.info.run_id, name)]
    return Counter((metric.key, metric.step) for metric in found)


def in_wandb(directory):
    number = tracking_id(Storage.at(str(directory)))
    names = [path.name for path in (directory / "wandb").glob("offline-run-*")]
    assert names
    assert all(re.fullmatch(rf"offline-run-\d+_\d+-{number}(-\d+)?", name) for name in names)  # one run
    rows = list(logged_rows(directory, number))
    assert len({row["_step"] for row in rows}) == len(rows)
    return Counter(
        (name, row["step"])
        for row in rows
        for name in row
        if not name.startswith("_") and name not in ("step", "epoch")
    )


def once(points):
    head = ("time", "split", "step", "epoch")
    return Counter({(name, point["step"]): 1 for point in points for name in point if name not in head})


def assert_each_point_once(directory, uri):
    wanted = once(json.loads(line) for line in (directory / METRICS_FILE).read_text().splitlines())
    assert in_tensorboard(directory) == wanted
    assert in_mlflow(uri, directory) == wanted
    assert in_wandb(directory) == wanted


def test_after_a_kill_in_the_middle_of_sending_each_tracker_has_one_run_with_each_point_once(
    server, tmp_path, preloaded
):
    directory = tmp_path / "killed"
    lines = AppendLog(Storage.at(str(directory)), METRICS_FILE)
    for point in points_of(range(1, 51)):
        lines.append(json.dumps(point))
    assert deliver(tmp_path / "before", None, names=["wandb"]) == []
    # the process to be killed inherits the address of this process's wandb service, and must not use it
    assert "WANDB_SERVICE" in os.environ
    environment = {**preloaded.environment(), "FTEXP_TRACKERS_TEST": str(directory)}
    (tmp_path / "killed.py").write_text(KILLED)
    words = [*preloaded.python, str(tmp_path / "killed.py"), str(directory), server]
    killed = subprocess.run(words, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    wait_until_none(lambda: descendants_with(f"FTEXP_TRACKERS_TEST={directory}"))  # wandb's own process outlives it
    assert len(list((directory / "tensorboard").iterdir())) == 1
    assert deliver(directory, server, points_of(range(101, 121))) == []
    assert_each_point_once(directory, server)
    assert len(read_lines(Storage.at(str(directory)), METRICS_FILE)) == 132


def test_params_tags_and_the_end_are_told_and_secrets_are_not(server, tmp_path):
    directory = tmp_path / "told"
    assert deliver(directory, server, points_of([1]), status="interrupted") == []
    _, run = mlflow_run(server, directory)
    assert run.info.status == "KILLED"
    assert deliver(directory, server) == []
    _, run = mlflow_run(server, directory)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "told")
    assert run.data.params["train.log_every_steps"] == "10"
    assert run.data.tags.items() >= {"team": "blue", "checkpoint": "step_9", "status": "finished"}.items()
    assert run.data.params["model.kwargs.api_key"] == "***"
    for file in directory.rglob("*"):
        assert not file.is_file() or b"very secret" not in file.read_bytes(), file


def test_a_key_that_mlflow_refuses_is_told_in_characters_that_it_takes(server, tmp_path):
    directory = tmp_path / "pattern"
    plain = settings(directory, server, ["mlflow"])
    plain.train.freeze, plain.tracker.tags = {"blocks.0.*": None}, {"who?": "me"}
    run_dir = Storage.at(str(directory))
    followed = Trackers(plain.tracker, tracked_run(plain, run_dir, "pattern", 1e9), run_dir, list)
    followed.start(lambda event: None)
    followed.end(Outcome(status="finished"))
    assert followed.wait() == []
    _, found = mlflow_run(server, directory)
    assert (found.data.params["train.freeze.blocks.0._"], found.data.tags["who_"]) == ("None", "me")


def test_a_folder_of_tensorboards_keeps_runs_of_one_name_apart(tmp_path):
    def log_a_point(storage):
        config, run_dir = settings(tmp_path / storage / "first", "", ["tensorboard"]), tmp_path / storage / "first"
        config.tracker.tensorboard.dir = str(tmp_path / "boards")
        run_dir.mkdir(parents=True, exist_ok=True)
        directory = Storage.at(str(run_dir))
        followed = Trackers(
            config.tracker, tracked_run(config, directory, "first", 1e9), directory, lambda: points_of([1])
        )
        followed.start(lambda event: None)
        followed.end(Outcome(status="finished"))
        assert followed.wait() == []

    for storage in ("one", "two", "one"):
        log_a_point(storage)
    boards = sorted((tmp_path / "boards").iterdir())
    assert [len(path.name) for path in boards] == [len("first"), len("first-01234567")]
    for path in boards:
        assert Counter(scalars(path)) == {("train_loss", 1): 1, ("lr", 1): 1}


def test_what_another_call_sets_otherwise_becomes_a_tag(server, tmp_path, monkeypatch):
    directory = tmp_path / "longer"
    deliver(directory, server, names=["mlflow"])

    plain = settings(directory, server, ["mlflow"])
    plain.train.epochs = 7
    run = tracked_run(plain, Storage.at(str(directory)), "longer", 1e9)
    again = Trackers(plain.tracker, run, Storage.at(str(directory)), list)
    again.start(lambda event: None)
    again.end(Outcome(status="finished"))
    assert again.wait() == []
    _, found = mlflow_run(server, directory)
    assert (found.data.params["train.epochs"], found.data.tags["now.train.epochs"]) == ("???", "7")


def test_a_server_that_is_down_fails_nothing_and_has_all_once_it_is_back(server, tmp_path):
    directory = tmp_path / "down"
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    (failure,) = deliver(directory, nobody, points_of(range(1, 4)), names=["mlflow"])
    assert (failure.tracker, failure.num_undelivered) == ("mlflow", 3)
    assert "Connection refused" in failure.reason
    assert deliver(directory, server, points_of([4]), names=["mlflow"]) == []
    assert in_mlflow(server, directory) == once(points_of(range(1, 5)))


def test_a_server_that_never_answers_costs_the_time_that_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")  # longer than the time limit of a test
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (failure,) = deliver(tmp_path / "hung", uri, points_of([1]), names=["mlflow"], timeout_s=1.0)
    assert failure.reason == "it has not answered in time"


def test_a_trial_is_a_child_of_its_sweep_and_lies_below_it(server, tmp_path):
    sweep = Storage.at(str(tmp_path / "sweeps" / "lr"))
    deliver(sweep.local_path, server, names=["mlflow"])  # the sweep itself, without points
    for name in ("optim.lr=0.1", "optim.lr=0.2"):
        directory = sweep.child(name).local_path
        assert deliver(directory, server, points_of([1]), names=["mlflow", "tensorboard"], sweep=sweep) == []
    beginning, _ = made(sweep.child("optim.lr=0.3").local_path, server, ["mlflow"], sweep)
    opened = threading.Event()
    beginning.start(lambda event: opened.set())
    assert opened.wait(PATIENCE_S)
    _, parent = mlflow_run(server, sweep.uri)
    _, children = mlflow_runs(server, f"tags.`{PARENT}` = '{parent.info.run_id}'")
    assert {child.info.run_name for child in children} == {"optim.lr=0.1", "optim.lr=0.2", "optim.lr=0.3"}
    assert {child.data.tags["sweep"] for child in children} == {"lr"}
    assert [trackers.get(name).has_parents for name in ALL] == [False, True, False]
    found = {file.parent.relative_to(sweep.uri).parts for file in sweep.local_path.rglob("events.out.*")}
    assert found == {("optim.lr=0.1", "tensorboard"), ("optim.lr=0.2", "tensorboard")}


def test_without_a_server_the_runs_of_a_storage_and_its_sweeps_are_in_one_database(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # the server of these tests sets it
    sweep = Storage.at(str(tmp_path / "sweeps" / "lr"))
    sweep.write_bytes("sweep.json", b"")
    for directory, of in ((tmp_path / "alone", None), (sweep.child("seed=1").local_path, sweep)):
        assert deliver(directory, None, points_of([1]), names=["mlflow"], sweep=of) == []
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert in_mlflow(uri, tmp_path / "alone") == in_mlflow(uri, sweep.child("seed=1").uri) == once(points_of([1]))


def test_a_tracker_that_opens_when_the_run_has_ended_is_told_of_all_the_same(tmp_path):
    directory = Storage.at(str(tmp_path / "short"))
    record = RunRecord(directory, RunState(name="short"), ("val_accuracy", "max"))
    config, output, closed = settings(tmp_path / "short", None, ["tensorboard"]), io.StringIO(), []
    followed = trackers_of(config, record, None)
    followed.start(lambda event: closed.append(event) or False)
    record.close("finished")
    followed.end(Outcome(status="finished"))
    close_trackers(followed, record, Terminal(Console(file=output, width=500)))
    assert [event.name for event in closed] == ["tracker_opened"]
    where = f"{tmp_path}/short/tensorboard"
    assert output.getvalue() == f"tracker  tensorboard: {where}\n"
    event = [*read_lines(directory, EVENTS_FILE)][-1]
    assert (event["event"], event["tracker"], event["where"]) == ("tracker_opened", "tensorboard", where)


def test_a_finished_run_is_given_to_trackers_that_lack_it_and_to_no_other(tmp_path, capsys):
    directory = tmp_path / "late"
    deliver(directory, None, points_of(range(1, 5)), names=["wandb"])
    config = settings(directory, None, ["tensorboard", "wandb"])
    before = sorted((directory / "wandb").rglob("*"))
    state = RunState(name="late", status="finished")
    context = RunContext(config, [], Workers(1, False, {}), Storage.at(str(directory)), state, None)
    for _ in range(2):
        deliver_late(context, Terminal())
    assert capsys.readouterr().out.splitlines() == [f"tracker  tensorboard: {directory}/tensorboard"]
    assert in_tensorboard(directory) == once(points_of(range(1, 5)))
    assert sorted((directory / "wandb").rglob("*")) == before


def test_an_event_file_that_a_kill_has_torn_is_gone_on_with(tmp_path):
    directory = tmp_path / "torn"
    deliver(directory, None, points_of(range(1, 5)), names=["tensorboard"])
    (file,) = (directory / "tensorboard").iterdir()
    content, ends = file.read_bytes(), [0]
    for _ in range(5):  # the header and four scalars; a record has 16 bytes in addition to its length
        ends.append(ends[-1] + struct.unpack_from("<Q", content, ends[-1])[0] + 16)
    file.write_bytes(content[: ends[-1] - 1])
    assert sum(in_tensorboard(directory).values()) == 3
    assert deliver(directory, None, names=["tensorboard"]) == []
    assert in_tensorboard(directory) == once(points_of(range(1, 5)))


def _own_labels(sample):
    return [value for name, value in sample.labels.items() if name not in RUN_LABELS]


def scrape_into(scrapes, lines):
    """Scrape the endpoint printed in `lines`; append {(series, *labels other than run and sweep): value}."""
    named = [line.split(": ", 1)[1] for line in lines if line.startswith("tracker  prometheus: ")]
    with contextlib.suppress(OSError):  # not open yet, or already closed
        with urllib.request.urlopen(named[0], timeout=10) if named else contextlib.nullcontext() as answer:
            families = text_string_to_metric_families(answer.read().decode()) if named else []
        samples = [sample for family in families for sample in family.samples]
        if samples:
            assert {(sample.labels["run"], sample.labels["sweep"]) for sample in samples} == {("three", "")}
            scrapes.append({(each.name, *_own_labels(each)): each.value for each in samples})
    return bool(scrapes)


@pytest.fixture(scope="module")
def three_kills(server, tmp_path_factory, preloaded):
    """A run with all trackers: two workers and the command itself are killed, and the command is run again."""
    directory = tmp_path_factory.mktemp("runs")
    faults = "{kind: kill_worker, step: 22, rank: 1}, {kind: kill_worker, step: 41}, {kind: kill_driver, step: 57}"
    faults += ", {kind: slow_rank, step: 62, rank: 1, count: 45, seconds: 0.2}"
    words = [
        *(
            f"run.storage={directory}",
            "run.name=three",
            "report.enabled=false",
            "train.max_steps=128",
            "model.kwargs.depth=1",
            "train.epochs=6",
        ),
        *("train.log_every_steps=5", "checkpoint.every_steps=10", f"chaos.faults=[{faults}]"),
        *("tracker=[tensorboard,mlflow,wandb,prometheus]", "tracker.prometheus.export=http"),
        *(f"tracker.mlflow.tracking_uri={server}", "tracker.tags.team=blue"),
        "tracker.timeout_s=60",
        "scaling.num_workers=2",
    ]
    first = Command("train", words, directory, preloaded, joins=True)
    assert first.wait() == -signal.SIGKILL, first.output
    second, scrapes = Command("train", words, directory, preloaded, joins=True), []
    second.wait_until(lambda: scrape_into(scrapes, second.lines) and scrapes[-1]["ftexp_step",] > 105)
    assert second.wait() == 0, second.output
    return RunFolder(directory / "three"), [*first.lines, *second.lines], scrapes[-1]


def test_a_run_with_three_kills_is_one_run_in_each_tracker_with_each_point_once(server, three_kills):
    run, *_ = three_kills
    assert len(run.events("chaos")) == 4
    assert run.record["attempts"] == 4
    assert_each_point_once(run.path, server)
    assert len(run.metrics()) > 15
    assert run.events("tracker_failed") == []
    with (run.path / "metrics.csv").open() as file:
        assert [(row["split"], int(row["step"])) for row in csv.DictReader(file)] == [
            (point["split"], point["step"]) for point in run.metrics()
        ]


def test_a_run_with_three_kills_is_described_in_its_trackers(server, three_kills):
    run, lines, _ = three_kills
    _, found = mlflow_run(server, run.path)
    last = run.path / "checkpoints" / run.record["checkpoint"]
    assert last.is_dir()
    assert (
        found.data.tags.items()
        >= {
            **{"checkpoint": str(last), "failures": "2", "attempts": "4", "status": "finished", "team": "blue"},
            "goodput": str(run.record["goodput"]),
        }.items()
    )
    assert found.data.params["optim.name"] == "adamw"
    assert found.info.status == "FINISHED"
    for name in ALL:
        assert any(line.startswith(f"tracker  {name}: ") for line in lines), lines


def test_a_run_with_three_kills_is_shown_by_its_series(three_kills):
    run, _, scrape = three_kills
    failures, saved = run.record["failures"], run.events("checkpoint_saved")
    restarts = [sum(failure[f"seconds_to_{part}"] for part in ("detect", "restart", "restore")) for failure in failures]
    last = [event for event in saved if event["step"] == scrape["ftexp_checkpoint_step",]][-1]
    assert {each.name for each in SERIES} - {name for name, *_ in scrape} == {
        *("ftexp_mfu_ratio", "ftexp_sample_part_seconds", "ftexp_feed_queue_batches")  # need a GPU, tasks, prefetching
    }
    (straggler,) = (event for event in run.events("straggler") if event["rank"] == 1)
    assert straggler["step"] in (90, 95)  # the sixth point with a slow rank; two steps of the first point are not slow
    assert scrape["ftexp_straggler_ratio", straggler["node"], "forward", "1"] == straggler["ratio"] > 1.5
    assert scrape["ftexp_slowest_rank",] == 1
    assert scrape["ftexp_rank_step_seconds", "max"] > 0.2 > scrape["ftexp_rank_step_seconds", "median"]
    assert scrape["ftexp_attempts_total",] == 4
    failed = {key[1]: value for key, value in scrape.items() if key[0] == "ftexp_failures_total"}
    assert (failed["crash"], sum(failed.values())) == (2, 2)
    assert scrape["ftexp_replayed_steps_total",] == sum(failure["steps_replayed"] for failure in failures)
    assert scrape["ftexp_restart_seconds_total",] == pytest.approx(sum(restarts))
    assert scrape["ftexp_checkpoint_bytes",] == last["bytes"]
    assert scrape["ftexp_saves_total",] == len({event["checkpoint"] for event in saved[: saved.index(last) + 1]})
    assert 0 <= scrape["ftexp_checkpoint_age_seconds",] < 60
    assert 0 <= scrape["ftexp_heartbeat_age_seconds",] < 10
    assert 0 < scrape["ftexp_goodput_ratio",] < 1
    logged = [point for point in run.metrics() if point["split"] == "train" and point["step"] <= scrape["ftexp_step",]]
    assert scrape["ftexp_metric", "train_loss"] in [point["train_loss"] for point in logged[-2:]]
    assert scrape["ftexp_step_part_seconds", "backward"] > 0
