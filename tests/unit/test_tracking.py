"""The records of a run: each point once, failures with their costs, and totals over all invocations."""

import json

import pytest

from ftexp.errors import StorageError
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import Failure, RunState, read_state
from ftexp.storage.append_log import read_lines
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.messages import MEMORY, STORAGE, Begin, Happened, Hello, Lost, Metrics, Raised, Ready, Tick

SCORE = ("val_accuracy", "max")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def storage(tmp_path):
    return Storage.at(str(tmp_path / "run"))


@pytest.fixture
def record(storage, clock):
    return RunRecord(storage, RunState(name="x", started=clock.now), SCORE, clock, steady=clock)


def lines(storage, name):
    return [json.loads(line) for line in storage.read_bytes(name).decode().splitlines()]


def hello(record, rank, world_size=2, pid=100):
    return record.handle(Hello(rank, world_size, pid + rank, "n"))


def ready(record, step, source=STORAGE):
    record.handle(Ready(step, total_steps=100, device="cpu", arguments={}, num_parameters=5, source=source))


def metric(record, split, step, epoch=0, **values):
    record.handle(Metrics(split, step, epoch, values))


def test_a_replayed_point_is_not_written_twice_also_after_the_command_was_run_again(record, storage, clock):
    for step in (10, 20, 10, 20, 30):
        metric(record, "train", step, train_loss=1.0)
    metric(record, "val", 20, val_loss=2.0)
    record.close("interrupted")
    again = RunRecord(storage, read_state(storage), SCORE, clock, steady=clock)
    metric(again, "train", 30, train_loss=1.0)
    metric(again, "train", 40, train_loss=1.0)
    again.close("finished")
    points = [(line["split"], line["step"]) for line in lines(storage, "metrics.jsonl")]
    assert points == [("train", 10), ("train", 20), ("train", 30), ("val", 20), ("train", 40)]


def test_the_attempt_number_goes_on_over_calls_of_the_command(record, storage, clock):
    assert hello(record, 1) is None
    assert hello(record, 0) == Begin(1)
    record.close("interrupted")
    again = RunRecord(storage, read_state(storage), SCORE, clock, steady=clock)
    assert hello(again, 0, world_size=3) == Begin(2)
    again.close("finished")
    assert read_state(storage).world_sizes == [2, 3]


def test_a_failure_is_accounted_for_from_death_to_the_first_new_step(record, storage, clock):
    hello(record, 0), hello(record, 1)
    ready(record, 0)
    record.handle(Tick(57, 1))
    record.handle(Lost(1, 101, time=clock.now))
    clock.now += 0.25
    record.fail("crash", 1, "the process died")
    clock.now += 4
    hello(record, 0, pid=200), hello(record, 1, pid=200)
    clock.now += 2
    ready(record, 40, MEMORY)
    clock.now += 1
    tick(record, 57)
    assert record.state.failures[0].seconds_to_new_step is None
    clock.now += 1
    tick(record, 58)
    tick(record, 59)
    record.close("finished")
    (failure,) = read_state(storage).failures
    assert (failure.cause, failure.rank, failure.step, failure.attempt) == ("crash", 1, 57, 1)
    assert (failure.seconds_to_detect, failure.seconds_to_restart, failure.seconds_to_restore) == (0.25, 4.0, 2.0)
    assert (failure.seconds_to_new_step, failure.steps_replayed, failure.recovery) == (2.0, 17, "memory")
    assert record.pids() == [200, 201]
    told = lines(storage, "events.jsonl")
    assert [line["event"] for line in told] == [
        "attempt_started", "ready", "failure", "attempt_started", "ready", "caught_up", "recovered", "finished",
    ]  # fmt: skip
    assert (told[4]["source"], told[6]["recovery"], told[6]["seconds_to_new_step"]) == ("memory", "memory", 2.0)


def test_a_failure_before_the_first_new_step_leaves_the_one_before_without_one(record, storage, clock):
    hello(record, 0)
    ready(record, 0)
    tick(record, 57)
    for _ in range(2):
        record.fail("crash", 0, "the process died")
        hello(record, 0)
        ready(record, 40, STORAGE)
        clock.now += 1
        tick(record, 50)
    tick(record, 58)
    record.close("finished")
    first, second = read_state(storage).failures
    assert (first.recovery, first.seconds_to_new_step, first.steps_replayed) == ("storage", None, 17)
    assert (second.recovery, second.seconds_to_new_step, second.steps_replayed) == ("storage", 1.0, 10)
    (recovered,) = [line for line in lines(storage, "events.jsonl") if line["event"] == "recovered"]
    assert recovered["steps_replayed"] == 10


def test_a_run_json_that_says_nothing_of_recoveries_is_read(storage):
    old = {"name": "x", "failures": [{"attempt": 1, "cause": "crash", "rank": 0, "step": 5, "error": "gone"}]}
    storage.write_bytes("run.json", json.dumps(old).encode())
    (failure,) = read_state(storage).failures
    assert (failure.recovery, failure.seconds_to_new_step) == (None, None)


@pytest.mark.parametrize(("order", "best"), [("max", 0.9), ("min", 0.2)])
def test_the_best_follows_the_score(storage, clock, order, best):
    record = RunRecord(storage, RunState(name="x"), ("val_accuracy", order), clock, steady=clock)
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.2), (4, float("nan"))):
        metric(record, "val", step, val_accuracy=accuracy, val_loss=step)
    record.close("finished")
    assert read_state(storage).metrics["best"]["val_accuracy"] == best
    assert read_state(storage).metrics["last"] == {"val_accuracy": None, "val_loss": 4}


def test_saved_checkpoints_and_the_end_show_in_run_json(record, storage, clock):
    hello(record, 0)
    record.handle(Happened(events.CheckpointSaved(5, "step_5", 10, 0.1, {}, ["epoch"], 0.1)))
    assert read_state(storage).checkpoint == "step_5"
    clock.now += 90
    record.close("failed", "disk gone")
    state = read_state(storage)
    assert (state.status, state.error, state.seconds) == ("failed", "disk gone", 90.0)
    saved = lines(storage, "events.jsonl")[1]
    assert (saved["event"], saved["attempt"], saved["step"]) == ("checkpoint_saved", 1, 5)


def test_time_adds_up_over_calls(record, storage, clock):
    clock.now += 10
    record.close("interrupted")
    clock.now += 1000
    again = RunRecord(storage, read_state(storage), SCORE, clock, steady=clock)
    clock.now += 5
    again.close("finished")
    assert read_state(storage).seconds == 15.0


def test_a_folder_without_a_run_has_no_state(storage):
    assert read_state(storage) is None


def test_a_full_disk_is_told_and_loses_nothing_once_there_is_room(record, storage, clock, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Storage, "write_bytes", full)
        disk.setattr(record.metrics._log, "flush", full)
        assert hello(record, 0) == Begin(1)
        metric(record, "train", 10, train_loss=1.0)
        record.write()
        assert "No space left" in record.problem
        with pytest.raises(StorageError, match=r"No space left.*make room"):
            record.close("finished")
    metric(record, "train", 20, train_loss=1.0)
    record.close("finished")
    assert record.problem is None
    assert [line["step"] for line in lines(storage, "metrics.jsonl")] == [10, 20]


def test_a_store_that_does_not_answer_holds_up_one_message_in_ten_seconds(record, clock, monkeypatch):
    tried = []

    def silent(*_):
        tried.append(clock.now)
        clock.now += 10.5
        raise OSError("timeout")

    monkeypatch.setattr(Storage, "write_bytes", silent)
    hello(record, 0)
    assert len(tried) == 1
    for step in range(1, 10):
        clock.now += 1
        tick(record, step)
    assert len(tried) == 1
    clock.now += 1.5
    tick(record, 10)
    tick(record, 11)
    assert len(tried) == 2


def test_a_clock_that_is_set_back_changes_no_duration_and_stops_no_copy(storage, clock):
    steady = Clock()
    record = RunRecord(storage, RunState(name="x"), SCORE, clock, steady=steady)

    def passes(seconds):
        clock.now += seconds
        steady.now += seconds

    hello(record, 0)
    passes(5)
    ready(record, 0)
    passes(15)
    clock.now -= 3600
    tick(record, 10)
    assert read_state(storage).step == 10
    failure = record.fail("crash", 1, "x")
    passes(4)
    clock.now -= 3600
    hello(record, 0)
    passes(2)
    clock.now -= 3600
    ready(record, 10)
    passes(14)
    tick(record, 11)
    record.close("finished")
    assert (failure.seconds_to_restart, failure.seconds_to_restore) == (4, 2)
    assert (read_state(storage).seconds, read_state(storage).productive_s) == (40, 29)
    times = [line["time"] for line in lines(storage, "events.jsonl")]
    assert times == [1000, 1005, -2580, -6176, -9774, -9760, -9760]


def test_a_command_that_began_again_counts_the_seconds_since_its_ray_was_found_dead(storage, clock):
    steady = Clock()
    steady.now = 7.0
    failure = Failure(attempt=1, cause="ray", rank=None, step=0, error="x")
    record = RunRecord(storage, RunState(name="x", failures=[failure]), SCORE, clock, clock.now - 3, steady)
    steady.now += 2
    hello(record, 0)
    assert failure.seconds_to_restart == 5
    record.close("finished")
    assert read_state(storage).seconds == 5


@pytest.mark.parametrize("num_answers", range(5))
def test_an_object_store_that_goes_down_at_the_end_of_a_run_is_a_storage_error(storage, monkeypatch, num_answers):
    storage.local_path.mkdir()
    monkeypatch.setattr(Storage, "local_path", None)
    record, written, write = RunRecord(storage, RunState(name="x"), SCORE), [], Storage.write_bytes
    metric(record, "train", 10, train_loss=1.0)
    record.write()

    def goes_down(self, name, content):
        if len(written) == num_answers:
            raise OSError("timeout")
        written.append(name)
        write(self, name, content)

    monkeypatch.setattr(Storage, "write_bytes", goes_down)
    expected = ["run.json", "events.jsonl", "metrics.csv"]  # metrics.jsonl exists already
    if num_answers < len(expected):
        with pytest.raises(StorageError, match="timeout; make room"):
            record.close("finished")
    else:
        record.close("finished")
    assert written == expected[:num_answers]


def test_the_traceback_of_what_a_worker_raised_is_kept(record, storage, clock):
    hello(record, 0)
    record.handle(Raised(0, 3, 96, [], "TypeError: x", time=clock.now))
    record.close("failed")
    (raised,) = [line for line in lines(storage, "events.jsonl") if line["event"] == "raised"]
    assert (raised["rank"], raised["traceback"]) == (0, "TypeError: x")


def tick(record, step, epoch=0):
    record.handle(Tick(step, epoch))


def test_goodput_is_the_share_of_time_on_steps_that_were_new(record, storage, clock):
    clock.now += 5  # start-up
    hello(record, 0)
    ready(record, 0)
    for step in range(1, 11):
        clock.now += 2
        tick(record, step)
    assert record.state.productive_s == 20
    clock.now += 3  # in an unfinished step
    record.fail("crash", 1, "x")
    clock.now += 7
    hello(record, 0)
    ready(record, 6)
    for step in range(7, 13):  # 7 to 10 are replayed
        clock.now += 2
        tick(record, step)
    record.close("finished")
    assert read_state(storage).productive_s == 24
    assert read_state(storage).seconds == 47
    assert read_state(storage).goodput == round(24 / 47, 4)


def test_the_time_of_an_evaluation_counts_for_the_step_that_follows_it(record, clock):
    hello(record, 0)
    ready(record, 0)
    clock.now += 2
    tick(record, 1)
    clock.now += 30
    metric(record, "val", 1, val_loss=1.0)
    assert record.state.productive_s == 2
    clock.now += 2
    tick(record, 2)
    assert record.state.productive_s == 34


def test_an_evaluation_that_is_done_again_does_not_count(record, clock):
    hello(record, 0)
    ready(record, 0)
    for step in (1, 2, 3):
        clock.now += 2
        tick(record, step)
    record.fail("crash", 0, "x")
    hello(record, 0)
    ready(record, 0)
    for step in (1, 2, 3):
        clock.now += 2
        tick(record, step)
        clock.now += 30 * (step == 2)
        metric(record, "val", step, val_loss=1.0)
    clock.now += 2
    tick(record, 4)
    assert record.state.productive_s == 8


def test_goodput_goes_on_over_calls(record, storage, clock):
    hello(record, 0)
    ready(record, 0)
    clock.now += 6
    tick(record, 3)
    clock.now += 4
    record.close("interrupted")
    assert read_state(storage).goodput == 0.6
    clock.now += 500
    again = RunRecord(storage, read_state(storage), SCORE, clock, steady=clock)
    hello(again, 0)
    clock.now += 4
    ready(again, 2)
    clock.now += 3
    tick(again, 3)
    clock.now += 3
    tick(again, 4)
    again.close("finished")
    assert (read_state(storage).productive_s, read_state(storage).seconds) == (9, 20)


def test_a_run_of_no_time_has_no_goodput(record, storage):
    record.close("failed")
    assert read_state(storage).goodput is None


def test_an_attempt_progressed_if_it_did_a_step_that_had_never_been_done(record, storage):
    hello(record, 0)
    ready(record, 0)
    tick(record, 10)
    assert record.fail("crash", 1, "x", "failure 1 of 3 allowed").progressed
    for last, progressed in ((8, False), (10, False), (11, True), (11, False)):
        hello(record, 0)
        ready(record, 6)
        tick(record, last)
        assert record.fail("crash", 1, "x").progressed == progressed
        assert record.state.step == last
    assert record.state.farthest_step == 11
    record.close("failed")
    assert read_state(storage).failures[0].decision == "failure 1 of 3 allowed"
    assert lines(storage, "events.jsonl")[2]["decision"] == "failure 1 of 3 allowed"


def test_a_group_that_falls_silent_is_detected_that_long_after_it_was_last_heard(record, clock):
    hello(record, 0), hello(record, 1)
    ready(record, 0)
    for _ in range(3):
        clock.now += 1
        tick(record, 10)
    clock.now += 60  # its machine has lost power, so no connection was closed
    failure = record.fail("crash", 1, "x")
    assert failure.seconds_to_detect == 60
    clock.now += 5
    tick(record, 11)  # from a surviving worker
    clock.now += 30
    assert record.fail("crash", None, "no worker started").seconds_to_detect == 0


def test_an_attempt_that_died_before_it_said_hello_did_not_progress(record, clock):
    hello(record, 0)
    ready(record, 0)
    tick(record, 10)
    record.handle(Lost(1, 101, time=clock.now))
    assert record.fail("crash", record.died_rank, "x").progressed
    clock.now += 60
    assert record.died_rank is None
    failure = record.fail("crash", None, "x")  # no worker sent a Hello
    assert (failure.progressed, failure.seconds_to_detect) == (False, 0)


def test_a_failure_names_the_node_of_its_rank(record):
    hello(record, 0)
    record.handle(Hello(1, 2, 5, "other"))
    assert record.fail("crash", 1, "x").node == "other"
    assert record.fail("crash", 7, "x").node is None


@pytest.mark.parametrize("first", ["raised", "lost"])
def test_the_rank_that_died_is_one_that_was_lost_whether_or_not_another_raised_first(record, first):
    messages = {
        "raised": Raised(1, 0, 0, [], "x", time=1.0),
        "lost": Lost(0, 100, time=2.0),
    }
    hello(record, 0)
    record.handle(messages.pop(first))
    assert record.died_rank == {"raised": None, "lost": 0}[first]
    record.handle(*messages.values())
    record.handle(Lost(2, 102, time=3.0))
    assert record.died_rank == 0
    record.fail("crash", record.died_rank, "x")
    assert record.died_rank is None


def test_what_a_worker_raised_tells_its_exact_step(record):
    hello(record, 0)
    ready(record, 0)
    tick(record, 7)  # ticks are rare
    record.handle(Raised(1, 9, 288, [], "x", time=1.0))
    assert record.fail("crash", 1, "x").step == 9


def test_an_older_run_json_without_the_newer_keys_is_read(record, storage):
    record.fail("crash", 1, "x")
    record.close("failed")
    content = json.loads(storage.read_bytes("run.json"))
    for key in ("productive_s", "goodput", "farthest_step"):
        del content[key]
    for key in ("node", "progressed", "decision"):
        del content["failures"][0][key]
    storage.write_bytes("run.json", json.dumps(content).encode())
    state = read_state(storage)
    assert (state.farthest_step, state.failures[0].progressed) == (0, True)


def test_points_of_corrupt_weights_are_logged_anew(tmp_path):
    directory = Storage.at(str(tmp_path / "first"))
    record = RunRecord(directory, RunState(name="first"), ("val_accuracy", "max"))
    record.handle(Hello(0, 2, 11, "node"))
    record.handle(Ready(0, 100, "cpu", {}, 5))
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.7)):
        record.handle(Metrics("val", step, 1, {"val_accuracy": accuracy}))
    record.fail("crash", 1, "gone")
    record.fail("corruption", 1, "a bit has flipped")
    record.handle(Hello(0, 2, 12, "node"))
    record.handle(Ready(10, 100, "cpu", {}, 5))
    assert record.state.metrics["best"] == {"val_accuracy": 0.5, "step": 10, "epoch": 1}
    for step, accuracy in ((10, 0.4), (20, 0.6), (30, 0.65)):
        record.handle(Metrics("val", step, 1, {"val_accuracy": accuracy}))
    record.fail("crash", 1, "gone")
    record.handle(Hello(0, 2, 13, "node"))
    record.handle(Ready(10, 100, "cpu", {}, 5))  # the weights of step 10 are good
    record.handle(Metrics("val", 20, 1, {"val_accuracy": 0.3}))
    assert [(point["step"], point["val_accuracy"]) for point in record.metrics.points()] == [
        (10, 0.5), (20, 0.6), (30, 0.65),
    ]  # fmt: skip
    record.close("finished")
    assert len(read_lines(directory, "metrics.jsonl")) == 3
