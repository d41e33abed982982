"""The driver's reaction to messages: decisions, answers to the controller, and lines on the terminal."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from ftexp.cluster.interruptible import Terminated
from ftexp.cluster.resources import no_workers
from ftexp.config.schema import Config, FailureConfig, TrainConfig
from ftexp.driver.printer import PACKAGE, raised_at
from ftexp.driver.session import _records
from ftexp.driver.supervisor import Supervisor
from ftexp.driver.terminal import Terminal
from ftexp.errors import ConfigError, RayLostError, RunFailedError
from ftexp.failure.causes import BUG, CONFIG, CRASH, HANG, OUT_OF_MEMORY, RAY, Cause, Ending
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import Failure, RunState, read_state
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.messages import (
    MEMORY,
    REPLACED,
    Begin,
    ControllerDied,
    CouldNotStart,
    GroupFailed,
    Happened,
    Hello,
    Hung,
    Lost,
    Raised,
    Ready,
    Retry,
    Stop,
    Tick,
)


def name(step):
    return f"step_{step:08d}.a1"


DIED = Cause(CRASH, 1, "the process died", Ending.DIED)


class Driver:
    """A supervisor, its records and its output."""

    def __init__(self, directory, failures=(), num_before=None, no_new_ray=None, **failure):
        self.storage, self.output = Storage.at(str(directory)), io.StringIO()
        self.record = RunRecord(self.storage, RunState(name="demo", failures=list(failures)), ("val_accuracy", "max"))
        self.terminal = Terminal(Console(file=self.output, width=500, color_system=None, highlight=False))
        self.config = Config(train=TrainConfig(epochs=4, global_batch_size=32), failure=FailureConfig(**failure))
        self.supervisor = Supervisor(self.record, self.terminal, self.config, num_before, no_new_ray)

    def tell(self, message):
        return self.supervisor.handle(message)

    def event(self, event):
        self.tell(Happened(event))

    def saved(self, step):
        self.event(events.CheckpointSaved(step, name(step), 1, 0.1, {}, [], 0.1))

    def restored(self, step):
        self.event(events.Restored(0, 0.1, name(step), step, step * 32))

    def attempt(self, ready=0, step=None):
        """Start a worker group, and let it reach `step`."""
        for rank in range(2):
            self.tell(Hello(rank, 2, 100 + rank, f"node{rank}"))
        self.ready(ready)
        if step is not None:
            self.tell(Tick(step, 0))

    def ready(self, step):
        self.tell(Ready(step, total_steps=100, device="cpu", arguments={}, num_parameters=5))

    def fail(self, cause=DIED, others_wait=True):
        return self.tell(GroupFailed(cause.kind, cause.rank, cause.error, cause.ending, others_wait))

    def raised(self, samples, rank=1, step=20, traceback="TypeError: x"):
        self.tell(Raised(rank, step, 32 * step, samples, traceback))

    @property
    def shown(self):
        return self.output.getvalue()


def test_a_run_that_goes_on_from_memory_keeps_its_newest_checkpoint_and_says_so(tmp_path):
    driver = Driver(tmp_path, max_failures=3)
    driver.attempt()
    driver.saved(10)
    driver.tell(Tick(18, 0))
    driver.fail()
    for rank in range(2):
        driver.tell(Hello(rank, 2, 100 + rank, f"node{rank}"))
    driver.event(events.Restored(0, 0.1, name(16), 16, 512, MEMORY))
    driver.tell(Ready(16, total_steps=100, device="cpu", arguments={}, num_parameters=5, source=MEMORY))
    assert driver.record.state.checkpoint == name(10)
    assert f"restored {name(16)} from memory, replaying 2 steps" in driver.shown
    driver.event(events.SnapshotsTaken(44, 0.0031, 0.0098, 19_400_000))
    driver.event(events.SnapshotsTaken(45, 0.0031, 0.0098, 19_400_000))  # from another attempt
    assert driver.shown.count("memory   a snapshot every ") == 1
    assert "every 44 steps: 3.1 ms, 0.98% of the time; 19.4 MB of a node" in driver.shown
    driver.event(events.SnapshotsOff("there is no room"))
    assert "! no snapshots in memory: there is no room; a failure costs" in driver.shown


def test_a_failure_within_its_budget_is_answered_by_a_wait(tmp_path):
    driver = Driver(tmp_path, max_failures=3, backoff_s=4)
    driver.attempt(step=10)
    assert driver.fail() == Retry(0.0)
    driver.attempt(ready=5, step=8)
    assert driver.fail() == Retry(4.0)
    first, second = read_state(driver.storage).failures
    assert (first.cause, first.rank, first.step, first.node, first.progressed) == ("crash", 1, 10, "node1", True)
    assert (second.step, second.progressed) == (8, False)
    assert first.decision == "failure 1 of 3 allowed: restarting the workers"
    assert "✗ rank 1 failed after step 10 [crash]: the process died; failure 1 of 3 allowed: rest" in driver.shown
    assert "restarting the workers in 4 s" in driver.shown
    assert "once that is put right" not in driver.shown
    assert (len(driver.record.state.failures), driver.supervisor.given_up) == (2, None)


def test_workers_that_start_although_the_run_was_given_up_are_told_to_end(tmp_path):
    driver = Driver(tmp_path, max_failures=0)
    driver.attempt(step=10)
    stop = driver.fail()
    assert driver.tell(Hello(0, 2, 1, "a")) == stop == Stop(str(driver.supervisor.given_up))


def test_a_wrong_config_that_a_worker_finds_ends_the_run_with_its_message_alone(tmp_path):
    driver = Driver(tmp_path, max_failures=3)
    driver.attempt()
    driver.raised([])
    answer = driver.fail(Cause(CONFIG, 1, "model.name=x returns a list", Ending.GAVE_UP))
    assert answer == Stop("model.name=x returns a list")
    assert isinstance(driver.supervisor.given_up, ConfigError)
    assert (
        "failed after step 20 [config]: model.name=x returns a list; another attempt would fail the same"
        in driver.shown
    )
    assert "the same command" not in driver.shown  # the same command would fail again


def test_a_spent_budget_is_answered_by_a_stop_that_says_why(tmp_path):
    driver = Driver(tmp_path, max_failures=0)
    driver.attempt(step=10)
    reason = "rank 1 failed after step 10 [crash]: the process died; failure 1 of 0 allowed: stopping"
    assert driver.fail() == Stop(reason)
    assert isinstance(driver.supervisor.given_up, RunFailedError)
    assert str(driver.supervisor.given_up) == reason
    assert "with samples" not in driver.shown  # nothing was raised
    assert "raised at" not in driver.shown
    unknown = Driver(tmp_path / "other", max_failures=0).fail(Cause(CRASH, None, "it was lost", Ending.DIED))
    assert unknown.reason.startswith("a worker failed after step 0 [crash]: it was lost; ")


@pytest.mark.parametrize(
    ("samples", "shown"),
    [
        ([5, 7], "with samples 5, 7; its traceback"),
        (list(range(33)), f"with samples {', '.join(map(str, range(32)))} and 1 more; its traceback"),
        ([], "with samples none; its traceback"),
    ],
)
def test_a_run_that_is_given_up_says_where_its_first_error_was_raised(tmp_path, samples, shown):
    driver = Driver(tmp_path)
    driver.attempt(step=18)
    driver.raised(samples)
    driver.raised([99], rank=0)  # a consequence of rank 1's error
    answer = driver.fail(Cause(BUG, 1, "TypeError: x"))
    assert "failed after step 20 [bug]: TypeError: x; a restart does not fix a bug" in answer.reason
    assert f"  rank 1 was at step 20, position 640, {shown} is in events.jsonl" in driver.shown
    assert "99" not in driver.shown


LOOP = f'  File "{PACKAGE}/worker/loop.py", line 3, in train\n    step(job)\n    ^^^^^^^^^\n'
MINE = '  File "/home/me/ftexp/parts.py", line 27, in hinge\n    margin = kwargs["margin"]\n'
TORCH = '  File "/x/lib/python3.11/site-packages/torch/nn/module.py", line 9, in _call\n    return f(*x)\n'


@pytest.mark.parametrize(
    ("frames", "shown"),
    [
        ([LOOP, MINE], '/home/me/ftexp/parts.py:27 in hinge: margin = kwargs["margin"]'),
        ([LOOP, MINE, TORCH, LOOP], '/home/me/ftexp/parts.py:27 in hinge: margin = kwargs["margin"]'),
        ([LOOP, TORCH], "/x/lib/python3.11/site-packages/torch/nn/module.py:9 in _call: return f(*x)"),
        ([LOOP], f"{PACKAGE}/worker/loop.py:3 in train: step(job)"),
        (['  File "/home/me/a.py", line 1, in <module>\n'], "/home/me/a.py:1 in <module>"),
        (['  File "<string>", line 1, in <module>\n'], None),
    ],
)
def test_a_run_that_is_given_up_names_the_line_of_the_users_own_file(tmp_path, frames, shown):
    text = "".join(["Traceback (most recent call last):\n", *frames, "KeyError: 'margin'\n"])
    assert raised_at(text) == shown
    driver = Driver(tmp_path)
    driver.attempt(step=18)
    driver.raised([5], traceback=text)
    driver.fail(Cause(BUG, 1, "KeyError: 'margin'"))
    assert (f"  raised at {shown}\n" in driver.shown) == (shown is not None)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_that_fails_while_it_starts_failed_after_the_step_that_the_run_had_reached(tmp_path, rank):
    driver = Driver(tmp_path, max_failures=2, refill_after_steps=100)
    driver.attempt(step=454)
    driver.fail()
    driver.tell(Hello(rank, 2, 200, "node0"))  # the other rank may have died before its Hello
    driver.raised([], rank, step=0)
    assert isinstance(driver.fail(Cause(CRASH, rank, "OSError: x")), Retry)
    assert f"✗ rank {rank} failed after step 454 [crash]: OSError: x; failure 2 of 2 allowed in the" in driver.shown
    driver.attempt(ready=450, step=460)
    assert [failure.step for failure in read_state(driver.storage).failures] == [454, 454]
    assert read_state(driver.storage).failures[1].steps_replayed == 4
    assert isinstance(driver.fail(), Stop)  # 6 steps don't refill the budget
    fresh = Driver(tmp_path / "fresh")
    fresh.tell(Hello(rank, 2, 200, "node0"))
    fresh.raised([], rank, step=0)
    fresh.fail(Cause(BUG, rank, "TypeError: x"))
    assert f"rank {rank} had not begun to train; its traceback is in events.jsonl" in fresh.shown


def test_what_an_earlier_attempt_raised_is_not_told_of_a_later_one(tmp_path):
    driver = Driver(tmp_path, max_failures=1)
    driver.attempt(step=10)
    driver.raised([5])
    assert isinstance(driver.fail(Cause(CRASH, 1, "RuntimeError: x")), Retry)
    driver.attempt(ready=5, step=30)
    assert isinstance(driver.fail(), Stop)
    assert "with samples" not in driver.shown


def test_the_same_exception_at_the_same_step_is_a_bug_the_second_time(tmp_path):
    driver = Driver(tmp_path, max_failures=-1)
    for ready in (0, 15):
        driver.attempt(ready=ready)
        driver.raised([5])
        answer = driver.fail(Cause(CRASH, 1, "RuntimeError: x"))
    assert "[bug]: RuntimeError: x; the same error occurred twice at the same step" in answer.reason
    assert [failure.cause for failure in read_state(driver.storage).failures] == [CRASH, BUG]


def test_a_worker_that_died_because_it_stood_still_hung(tmp_path):
    driver = Driver(tmp_path, max_failures=9)
    driver.attempt(step=10)
    for rank, doing in ((0, "in a step"), (1, "between steps")):
        driver.tell(Hung(rank, doing, 3.2, f"/runs/a1.r{rank}.txt"))
    driver.fail(Cause(CRASH, 0, "the process died", Ending.DIED))
    driver.attempt(ready=5, step=20)
    driver.fail()
    hang, crash = read_state(driver.storage).failures
    assert (hang.cause, hang.rank, hang.node) == (HANG, 1, "node1")
    assert hang.error == "no progress for 3 s (between steps); stack traces: /runs/a1.r1.txt"
    assert (crash.cause, crash.error) == (CRASH, "the process died")  # a failure of the next attempt has its own cause


def test_an_exception_is_not_a_hang_because_others_stood_still(tmp_path):
    driver = Driver(tmp_path)
    driver.attempt(step=10)
    driver.tell(Hung(0, "in a step", 3.2, "x"))
    driver.fail(Cause(BUG, 1, "TypeError: x"))
    assert [failure.cause for failure in read_state(driver.storage).failures] == [BUG]


def test_each_call_of_the_command_has_its_own_budget(tmp_path):
    earlier = [Failure(attempt=1, cause="crash", rank=0, step=3, error="x")] * 5
    driver = Driver(tmp_path, earlier, max_failures=1)
    driver.attempt(step=10)
    driver.fail()
    driver.attempt(ready=5, step=20)
    assert "failure 2 of 1 allowed: stopping" in driver.fail().reason
    assert len(read_state(driver.storage).failures) == 7


class Workers:
    def __init__(self, number):
        self.number = number

    def broadcast(self, message):
        return self.number


def test_who_asks_to_stop_is_remembered_and_told_whether_anybody_saves(tmp_path):
    driver, asked = Driver(tmp_path), Terminated()
    assert driver.supervisor.stop(Workers(0), KeyboardInterrupt()) is False
    assert driver.shown == ""
    assert driver.supervisor.stop(Workers(2), asked) is True
    assert driver.supervisor.interrupted() is asked
    assert "stopping after a final checkpoint (up to 30 s); press Ctrl-C again to stop immediately" in driver.shown


def test_a_recovery_tells_what_was_restored_and_what_was_damaged(tmp_path):
    driver = Driver(tmp_path)
    driver.attempt(step=57)
    driver.saved(40)
    driver.fail()
    driver.tell(Hello(0, 2, 200, "n"))
    for step in (40, 30):
        driver.event(events.CheckpointRejected(name(step), "torn"))
    driver.restored(20)
    driver.ready(20)
    assert "checkpoint step_00000040.a1 rejected: torn" in driver.shown
    assert "restored step_00000020.a1 (2 rejected), replaying 37 steps" in driver.shown
    (failure,) = driver.record.state.failures
    assert failure.steps_replayed == 37


@pytest.mark.parametrize(("restored", "is_gone"), [(50, False), (30, True)])
def test_what_was_restored_is_the_latest_checkpoint_and_one_that_is_gone_is_told(tmp_path, restored, is_gone):
    driver = Driver(tmp_path)
    driver.attempt(step=57)
    driver.saved(40)
    driver.fail()  # a checkpoint of step 50, if there was one, was not reported
    driver.tell(Hello(0, 2, 200, "n"))
    driver.restored(restored)
    driver.ready(50)
    assert ("checkpoint step_00000040.a1 rejected: it is gone" in driver.shown) == is_gone
    assert driver.record.state.checkpoint == name(restored)


def test_events_of_the_records_are_written_whatever_is_printed(tmp_path):
    driver = Driver(tmp_path, max_failures=0)
    driver.attempt(step=10)
    driver.raised([5])
    driver.fail()
    lines = [json.loads(line) for line in driver.storage.read_bytes("events.jsonl").decode().splitlines()]
    assert [line["event"] for line in lines] == ["attempt_started", "ready", "raised", "failure"]
    assert lines[-1]["decision"] == "failure 1 of 0 allowed: stopping"


def test_micro_batches_are_halved_for_the_attempts_after_a_lack_of_memory(tmp_path):
    driver = Driver(tmp_path, on_out_of_memory="halve_micro_batch", max_failures=0)
    full = Cause(OUT_OF_MEMORY, 1, "OutOfMemoryError: CUDA out of memory")
    for attempt, (before, after) in enumerate([(16, 8), (8, 4), (4, 2)], start=1):
        driver.attempt(step=attempt)
        assert driver.fail(full) == Retry(0.0)
        assert f"with micro-batches of {after} images, not {before}, at the same global batch" in driver.shown
        answer = driver.tell(Hello(0, 2, 1, "node0"))
        assert answer.accumulate_steps == 2**attempt
    assert read_state(driver.storage).accumulate_steps == 8  # later invocations keep it


def test_who_waits_for_workers_is_told_what_is_lacking_once(tmp_path):
    driver = Driver(tmp_path)
    assert driver.supervisor.group.waiting_s > 0
    for _ in range(2):
        driver.event(events.Waiting("the cluster has 1 CPU"))
    driver.event(events.Waiting("taken by others"))
    driver.attempt(step=3)
    assert driver.supervisor.group.waiting_s == 0
    driver.event(events.Waiting("too late"))
    driver.tell(Lost(1, 101))
    assert driver.supervisor.group.waiting_s > 0
    driver.attempt()
    driver.fail()
    assert driver.supervisor.group.waiting_s > 0
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    waits = [event["reason"] for event in map(json.loads, lines) if event["event"] == "waiting"]
    assert waits == ["the cluster has 1 CPU", "taken by others"]
    assert "no workers for 0 s: taken by others" in driver.shown


def test_a_worker_that_waits_for_data_is_told_of_and_on_record(tmp_path):
    driver = Driver(tmp_path)
    driver.attempt(step=3)
    driver.event(events.SlowData(1, "nothing decoded for 20 s: no CPU is free"))
    assert "! rank 1: nothing decoded for 20 s: no CPU is free\n" in driver.shown
    (event,) = [
        event
        for event in map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
        if event["event"] == "slow_data"
    ]
    assert (event["step"], event["rank"]) == (3, 1)


def test_a_straggler_is_told_of_with_its_node_and_so_is_its_end(tmp_path):
    driver = Driver(tmp_path)
    driver.attempt(step=30)
    driver.event(events.Straggler(1, "feed", 2.0, 80.0, 40.0, 30))
    driver.event(events.StragglerOver(1, 60))
    assert "! rank 1 on node1 stays slow: 80.0 ms a step" in driver.shown
    assert "rank 1 is as fast as the others again\n" in driver.shown
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    told = [(line["event"], line["step"], line["node"]) for line in lines if line["event"].startswith("straggler")]
    assert told == [("straggler", 30, "node1"), ("straggler_over", 60, "node1")]


def test_what_the_nccl_detector_found_is_on_record_after_the_failure(tmp_path):
    driver = Driver(tmp_path)
    driver.attempt(step=3)
    asked = []
    driver.supervisor.nccl_findings = lambda attempt: asked.append(attempt) or ["hangs/a1.nccl_ras.x.json"]
    driver.fail()
    assert asked == [1]
    assert "Ray's NCCL hang detector: hangs/a1.nccl_ras.x.json\n" in driver.shown
    *_, line = (json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines())
    assert (line["event"], line["files"]) == ("nccl_hang", ["hangs/a1.nccl_ras.x.json"])


def test_workers_that_never_start_are_on_record(tmp_path):
    driver = Driver(tmp_path, controller_failure_limit=2)
    driver.tell(CouldNotStart("no such zone"))
    (failure,) = read_state(driver.storage).failures
    assert (failure.cause, failure.rank, failure.error) == ("startup", None, "no such zone")
    assert "[startup]: no such zone; failure.controller_failure_limit=2 is used up: stopping" in driver.shown


def test_a_process_that_outlived_its_group_takes_nothing_from_the_next(tmp_path):
    driver = Driver(tmp_path)
    driver.attempt(step=3)
    driver.fail()
    driver.tell(Hello(0, 1, 200, "node0"))
    driver.ready(3)
    driver.tell(Lost(0, 100))
    assert driver.supervisor.group.waiting_s == 0
    assert driver.record.died_rank is None
    driver.tell(Lost(0, 200))
    assert driver.record.died_rank == 0


def test_where_only_what_followed_is_handed_over_the_process_that_died_is_told(tmp_path):
    driver = Driver(tmp_path)
    driver.attempt(step=3)
    driver.raised([], rank=0)
    driver.tell(Lost(1, 101))
    driver.fail(Cause(CRASH, None, "the connection to another worker was lost", Ending.DIED))
    (failure,) = read_state(driver.storage).failures
    assert (failure.rank, failure.node) == (1, "node1")
    assert failure.error == "the process died (killed, or crashed below Python)"


def test_the_death_of_the_controller_is_no_workers_fault(tmp_path):
    driver = Driver(tmp_path, max_failures=1)
    driver.attempt(step=3)
    driver.tell(Lost(1, 101))  # a worker exits with the controller, its owner
    answer = driver.tell(ControllerDied())
    assert isinstance(answer, Retry)
    (failure,) = read_state(driver.storage).failures
    assert (failure.cause, failure.rank, failure.node) == ("crash", None, None)
    assert failure.error == "Ray Train's controller died, and its workers with it"
    assert "✗ a worker failed after step 3 [crash]: Ray Train's controller died" in driver.shown


def lost():
    return RayLostError("Ray's GCS process was killed by SIGKILL")


def test_where_ray_died_the_run_begins_again_with_the_same_config_and_the_budgets_as_they_are(tmp_path):
    driver = Driver(
        tmp_path, [Failure(attempt=0, cause=CRASH, rank=1, step=5, error="of an earlier command")] * 3, max_failures=2
    )
    driver.attempt(step=5)
    assert driver.fail() == Retry(0.0)
    driver.attempt(step=10)
    error = lost()
    driver.supervisor.ray_lost(error)
    assert error.begins_again
    assert driver.supervisor.given_up is None
    reason = "new Ray 1 of 3 allowed, not charged to failure.max_failures: starting a new Ray"
    assert f"✗ Ray failed after step 10 [ray]: {error}; {reason}" in driver.shown
    state = read_state(driver.storage)
    assert (state.status, state.failures[-1].cause, state.failures[-1].rank) == ("running", RAY, None)

    restart = driver.supervisor.restart(driver.config, ["seed=1"])
    assert (restart.config.run.name, restart.config.resume, restart.overrides) == ("demo", "auto", ["seed=1"])
    again = Driver(tmp_path, state.failures, restart.num_before, max_failures=2)
    again.attempt(step=20)
    assert "↻ training again" in again.shown
    assert again.fail() == Retry(0.0)
    assert isinstance(again.fail(), Stop)  # its third failure; those of earlier commands and Ray's aren't charged


@pytest.mark.parametrize("is_written", [False, True], ids=["lost", "written though it was said to have failed"])
def test_a_death_of_ray_that_run_json_lacks_counts_where_the_run_begins_again(tmp_path, monkeypatch, is_written):
    driver, write = Driver(tmp_path, max_ray_failures=1), Storage.write_bytes
    driver.attempt(step=10)

    def fails(*arguments):
        if is_written:
            write(*arguments)
        raise OSError("timeout")

    with monkeypatch.context() as store:
        store.setattr(Storage, "write_bytes", fails)
        driver.supervisor.ray_lost(lost())
    state, restart = read_state(driver.storage), driver.supervisor.restart(driver.config, [])
    assert [failure.cause for failure in restart.unwritten] == [RAY]
    assert len(state.failures) == is_written
    context = SimpleNamespace(
        config=driver.config,
        decided_config=driver.config,
        workers=no_workers(),
        restart=restart,
        run_dir=driver.storage,
        state=state,
        no_new_ray=None,
    )
    record, supervisor = _records(context, driver.terminal, SimpleNamespace(follow=lambda _: None))
    for rank in range(2):
        supervisor.handle(Hello(rank, 2, 200 + rank, "node0"))
    supervisor.handle(Ready(5, total_steps=100, device="cpu", arguments={}, num_parameters=5))
    assert "↻ training again" in driver.shown
    assert record.unwritten_failures == []
    (failure,) = read_state(driver.storage).failures
    assert (failure.cause, failure.step, failure.steps_replayed) == (RAY, 10, 5)
    supervisor.ray_lost(lost())
    assert "new Ray 2 of 1 allowed" in str(supervisor.given_up)


def test_where_there_can_be_no_new_ray_the_run_ends_with_the_reason(tmp_path):
    driver = Driver(tmp_path, no_new_ray="a Ray that was joined can't be started again from here")
    driver.attempt(step=10)
    error = lost()
    driver.supervisor.ray_lost(error)
    assert not error.begins_again
    reason = str(driver.supervisor.given_up)
    assert reason.startswith(f"Ray failed after step 10 [ray]: {error}; a Ray that was joined can't")
    assert reason.endswith(": stopping")


def test_a_group_that_starts_without_a_failure_before_it_was_resized(tmp_path):
    driver = Driver(tmp_path)
    driver.attempt(step=10)
    assert driver.supervisor.group.world_size == 2
    driver.tell(Hello(0, 3, 200, "node0"))
    driver.ready(10)
    driver.fail()
    assert driver.supervisor.group.world_size is None
    driver.attempt(ready=5)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["world_size"] for line in lines if line["event"] == "resized"] == [3]
    assert driver.shown.count("resized  to 3 workers, from step 10") == driver.shown.count("↻ training again") == 1


def test_a_group_whose_machine_was_taken_away_as_announced_was_preempted(tmp_path):
    driver = Driver(tmp_path, max_failures=0)
    driver.attempt(step=10)
    driver.event(events.PreemptionNotice(10, ["some node"], [1], None))
    driver.tell(Lost(1, 101))
    answer = driver.tell(Hello(0, 2, 200, "node0"))  # Ray has started a new group without asking
    assert answer.attempt == 2
    (failure,) = read_state(driver.storage).failures
    assert (failure.cause, failure.rank, failure.seconds_to_detect) == ("preemption", 1, 0.0)
    driver.ready(10)
    driver.fail()
    assert driver.supervisor.given_up is not None  # the next failure is charged


def test_a_worker_that_is_replaced_stays_in_its_attempt_and_is_told_as_such(tmp_path):
    driver = Driver(tmp_path, recovery="replace")
    driver.attempt(step=40)
    driver.saved(20)
    driver.tell(Lost(1, 101))
    answer = driver.fail()
    assert answer == Retry(0.0, replaces=True)
    begin = driver.tell(Hello(1, 2, 201, "node1", replaces=True))
    assert isinstance(begin, Begin)
    assert begin.attempt == 1
    driver.tell(Ready(40, 100, "cpu", {}, 5, source=REPLACED))
    driver.tell(Tick(41, 0))
    state = driver.record.state
    assert (state.attempts, state.world_sizes, state.checkpoint) == (1, [2], name(20))
    (failure,) = state.failures
    assert (failure.recovery, failure.steps_replayed, failure.step) == (REPLACED, 0, 40)
    assert None not in (failure.seconds_to_detect, failure.seconds_to_restart, failure.seconds_to_restore)
    assert failure.seconds_to_new_step is not None
    assert driver.record.pids() == [100, 201]
    assert "replacing the worker" in driver.output.getvalue()
    assert "rank 1 replaced, replaying 0 steps · pids 100, 201" in driver.output.getvalue()
    found = [event["event"] for event in driver.record.past_events()]
    assert found.count("attempt_started") == found.count("worker_replaced") == 1
    driver.tell(Lost(1, 101))  # a late message about the dead worker
    assert driver.record.died_rank is None


def test_what_is_printed_is_what_is_done_where_the_others_can_not_wait_or_nobody_comes(tmp_path):
    driver = Driver(tmp_path, recovery="replace")
    driver.attempt(step=40)
    assert driver.fail(others_wait=False) == Retry(0.0, replaces=False)
    assert driver.record.state.failures[-1].decision.endswith(": restarting the workers")
    assert "replac" not in driver.output.getvalue()
    driver.attempt(40, step=50)
    assert "could not be replaced" not in driver.output.getvalue()
    assert driver.fail().replaces
    driver.attempt(50, step=60)
    assert driver.record.state.failures[-1].decision.endswith(
        ": replacing the worker, which failed: restarting the workers"
    )
    assert driver.output.getvalue().count("! rank 1 could not be replaced: restarting the workers") == 1
    assert driver.fail().replaces
    driver.tell(Hello(1, 2, 201, "node1", replaces=True))
    driver.tell(Ready(60, 100, "cpu", {}, 5, source=REPLACED))
    assert driver.record.state.failures[-1].decision.endswith(": replacing the worker")


def test_a_worker_that_fails_while_it_takes_the_place_of_another_leaves_the_step_as_it_was(tmp_path):
    driver = Driver(tmp_path, recovery="replace")
    driver.attempt(step=40)
    driver.fail()
    driver.tell(Hello(1, 2, 201, "node1", replaces=True))
    driver.tell(Raised(1, 0, 0, [], "Traceback"))
    assert driver.record.state.step == 40
    assert not driver.fail(Cause(CRASH, 1, "OSError: no", Ending.RAISED)).replaces
