"""Followers pass each point to a tracker exactly once, despite failures, and never delay the run."""

import threading

import pytest

import ftexp.trackers.follower
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import RunState, read_state
from ftexp.storage.directory import Storage
from ftexp.trackers.follower import Follower
from ftexp.trackers.registry import Outcome, Point
from ftexp.wire.messages import Metrics

SCORE = ("val_accuracy", "max")
DONE = Outcome(status="finished")
PATIENCE_S = 20.0  # for threads on a busy machine; only a failing test takes this long


def point(step, split="train", **values):
    return {"time": 1.0 + step, "split": split, "step": step, "epoch": 0, **(values or {"train_loss": 1 / step})}


class Backend:
    """Stores (metric, step), as a server would, and outlives the trackers that connect to it."""

    def __init__(self):
        self.stored, self.outcomes, self.num_made = [], [], 0
        self.trouble = []  # functions, one for each request in order, that decide its outcome

    def make(self):
        self.num_made += 1
        self.request("make")
        return Talking(self)

    def request(self, what, carry_out=lambda: None):
        trouble = self.trouble.pop(0) if self.trouble else lambda carry_out: carry_out()
        return trouble(carry_out)


class Talking:
    where = "in memory"

    def __init__(self, backend):
        self.backend = backend

    def held(self):
        return list(self.backend.stored)

    def log(self, points):
        keys = [key for each in points for key in sorted(each.keys())]
        self.backend.request("log", lambda: self.backend.stored.extend(keys))

    def close(self, outcome):
        self.backend.request("close", lambda: self.backend.outcomes.append(outcome.status))


def down(carry_out):
    raise ConnectionError("refused")


def answer_lost(carry_out):
    carry_out()
    raise TimeoutError("no answer")


def well(carry_out):
    carry_out()


@pytest.fixture
def backend():
    return Backend()


class Following:
    """A follower and the points of its run."""

    def __init__(self, backend, lines=(), retry_s=(0.01,)):
        self.lines, self.told, self.changed = list(lines), [], threading.Condition()
        self.follower = Follower("memory", backend.make, self.read, self.tell, retry_s)

    def read(self):
        return [Point.of(line) for line in list(self.lines)]

    def tell(self, event):
        with self.changed:
            self.told.append(event)
            self.changed.notify()

    def wait_until_told(self, name):
        with self.changed:
            assert self.changed.wait_for(lambda: any(event.name == name for event in self.told), PATIENCE_S)

    def log(self, *lines):
        for line in lines:
            self.lines.append(line)
            self.follower.offer(Point.of(line))

    def finish(self, timeout_s=PATIENCE_S):
        self.follower.end(DONE)
        return self.follower.wait(timeout_s)

    def names(self):
        return [event.name for event in self.told]


def test_points_arrive_once_in_order_and_the_end_is_told(backend):
    following = Following(backend, [point(1)])
    following.log(point(2), point(3), point(3, "val", val_loss=2.0, val_accuracy=0.5))
    assert following.finish() is None
    assert backend.stored == [
        *(("train_loss", step) for step in (1, 2, 3)), ("val_accuracy", 3), ("val_loss", 3),
    ]  # fmt: skip
    assert backend.outcomes == ["finished"]
    assert following.names() == ["tracker_opened"]
    assert following.follower.complete


def call_of_the_command(record, backend, steps):
    follower = Follower("memory", backend.make, lambda: map(Point.of, record.metrics.points()), lambda _: None)
    record.metrics.on_point = lambda line: follower.offer(Point.of(line))
    for step in steps:
        record.handle(Metrics("train", step, 0, {"train_loss": 1.0}))
    record.close("interrupted")
    follower.end(DONE)
    assert follower.wait(PATIENCE_S) is None


def test_replays_and_the_command_given_again_bring_nothing_twice(tmp_path, backend):
    storage, state = Storage.at(str(tmp_path)), RunState(name="x")
    for steps in ([10, 20, 10, 20, 30], [20, 30, 40]):
        call_of_the_command(RunRecord(storage, state, SCORE), backend, steps)
        state = read_state(storage)
    assert backend.stored == [("train_loss", step) for step in (10, 20, 30, 40)]
    assert backend.num_made == 2


def test_a_point_that_is_read_twice_at_once_is_sent_once(backend):
    following = Following(backend, [point(1), point(2), point(2)])
    assert following.finish() is None
    assert backend.stored == [("train_loss", 1), ("train_loss", 2)]


def test_what_was_sent_but_not_known_to_have_arrived_is_there_once(backend):
    backend.trouble = [well, answer_lost, down, down]  # make; log, whose answer is lost; make, make
    following = Following(backend, [point(1), point(2)])
    following.wait_until_told("tracker_opened")
    following.log(point(3))
    assert following.finish() is None
    assert backend.stored == [("train_loss", step) for step in (1, 2, 3)]
    assert backend.num_made == 4
    assert following.names() == ["tracker_failed", "tracker_opened"]  # consecutive failures are reported once


def test_half_a_point_that_arrived_is_made_whole(backend):
    backend.stored = [("train_loss", 1)]
    following = Following(backend, [point(1, train_loss=1.0, lr=0.1)])
    assert following.finish() is None
    assert backend.stored == [("train_loss", 1), ("lr", 1)]


def test_a_tracker_that_is_down_is_told_and_gets_everything_once_it_is_back(backend):
    backend.trouble = [down] * 3
    following = Following(backend, [point(1)])
    following.wait_until_told("tracker_opened")
    following.log(point(2))
    assert following.finish() is None
    assert backend.stored == [("train_loss", 1), ("train_loss", 2)]
    assert following.told[0].reason == "ConnectionError: refused"
    assert following.told[0].num_undelivered == 1


def test_a_tracker_that_stays_down_is_given_up_when_the_run_ends(backend):
    backend.trouble = [down] * 1000
    following = Following(backend, retry_s=(3600.0,))
    following.wait_until_told("tracker_failed")
    following.log(point(1), point(2))
    failure = following.finish()  # the end doesn't wait for the next retry
    assert (failure.name, failure.tracker, failure.num_undelivered) == ("tracker_failed", "memory", 2)
    assert backend.num_made == 2
    assert not following.follower.complete


def test_what_fails_when_the_end_is_told_is_tried_once_more(backend):
    backend.trouble = [well, down]  # make, close
    following = Following(backend, retry_s=(3600.0,))
    following.wait_until_told("tracker_opened")
    assert following.finish() is None
    assert (backend.num_made, backend.outcomes) == (2, ["finished"])


def test_a_tracker_that_hangs_holds_nobody_up(backend):
    released = threading.Event()
    backend.trouble = [well, lambda carry_out: released.wait()]
    following = Following(backend, [point(1)])
    following.log(*(point(step) for step in range(2, 1000)))
    failure = following.finish(timeout_s=0.05)
    assert failure.reason == "it has not answered in time"
    assert failure.num_undelivered == 999
    released.set()


def test_what_memory_had_no_room_for_is_read_from_the_run_directory(backend, monkeypatch):
    monkeypatch.setattr(ftexp.trackers.follower, "_MAX_WAITING", 3)
    released = threading.Event()
    backend.trouble = [well, lambda carry_out: (released.wait(PATIENCE_S), carry_out())]
    following = Following(backend, [point(1)])
    following.log(*(point(step) for step in range(2, 20)))
    released.set()
    assert following.finish() is None
    assert backend.stored == [("train_loss", step) for step in range(1, 20)]


def test_a_reason_holds_no_secrets(backend):
    def refuse(carry_out):
        raise ConnectionError("no route to http://me:pass@host/?api_key=abc")

    backend.trouble = [refuse, refuse]
    failure = Following(backend).finish()
    assert "pass" not in failure.reason
    assert "abc" not in failure.reason


def test_values_that_are_not_finite_are_left_out():
    assert Point.of(point(1, train_loss=float("nan"), lr=0.1, val_loss=None)).values == {"lr": 0.1}
