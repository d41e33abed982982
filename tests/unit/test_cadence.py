"""When a checkpoint is due: the same on every rank, never much too late, never queued up, with few clock agreements."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftexp.checkpoint.cadence import Cadence
from ftexp.config.schema import CheckpointConfig


class Rank:
    """One rank's cadence, its clock, and the values on which it agreed."""

    def __init__(self, agree=None, start=100.0, requests=None, **config):
        self.now, self.asked = start, []
        self.reasons = []  # of each checkpoint
        self._agree = agree or (lambda value: value)
        everything = {"every_epochs": None, **config}
        self.cadence = Cadence(CheckpointConfig(**everything), self.agree, lambda: self.now, **(requests or {}))

    def agree(self, value):
        self.asked.append(value)
        return self._agree(value)

    def step(self, step, epoch=0, epoch_ended=False, finished=False, busy=False, evaluated=False, seconds=1.0):
        """Take a step and save if a checkpoint is due; return whether it was."""
        self.now += seconds
        due = self.cadence.due(step, epoch, epoch_ended, finished, busy, evaluated)
        if due:
            self.reasons.append(self.cadence.reasons)
            self.cadence.saved(step)
        return due


def saves(rank, steps, **how):
    return [step for step in steps if rank.step(step, **how)]


@pytest.mark.parametrize(("every_steps", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6]), (7, [7]), (8, [])])
def test_a_save_is_due_every_so_many_steps(every_steps, expected):
    assert saves(Rank(every_steps=every_steps), range(1, 8)) == expected


def test_a_save_is_due_every_so_many_epochs():
    rank = Rank(every_epochs=2)
    # four steps per epoch; `epoch` counts completed epochs
    done = [step for step in range(1, 25) if rank.step(step, step // 4, epoch_ended=step % 4 == 0)]
    assert done == [8, 16, 24]


def test_a_save_that_is_asked_for_comes_within_a_second_and_the_run_goes_on():
    requests = []
    rank = Rank(requests={"save_requested": lambda: bool(requests and requests.pop())})
    assert saves(rank, range(1, 100), seconds=0.1) == []
    requests.append(True)
    (step,) = saves(rank, range(100, 200), seconds=0.1)
    assert step <= 110
    assert rank.reasons == [["requested"]]
    assert not rank.cadence.stopping


def test_a_save_says_why_it_was_due():
    wanted = set()
    requests = {
        name: lambda name=name: name in wanted and not wanted.remove(name)
        for name in ("stop_requested", "save_requested", "machine_goes")
    }
    rank = Rank(requests=requests, every_steps=4, every_epochs=1, every_seconds=11)
    assert saves(rank, range(1, 6)) == [4]
    assert rank.step(6, 1, epoch_ended=True)
    wanted.add("save_requested")
    assert not rank.step(7, busy=True)
    assert rank.step(8)  # the checkpoint of step 7 was postponed
    wanted.add("machine_goes")
    assert rank.step(9)
    assert not rank.step(10)
    assert rank.step(11, seconds=20)
    wanted.add("stop_requested")
    assert rank.step(13)
    assert rank.step(14, finished=True)
    assert rank.reasons == [
        *(["every_steps"], ["every_epochs"], ["requested", "every_steps"], ["preemption"], ["every_seconds"]),
        *(["stop"], ["end"]),
    ]
    follower = Rank(agree=lambda _: 0)  # it only learns that rank 0 has a reason
    assert follower.step(1)


def test_a_step_that_is_to_be_evaluated_is_saved_however_busy_the_writer_is():
    rank = Rank(every_epochs=None)
    assert not rank.step(1, busy=True)
    assert rank.step(2, busy=True, evaluated=True)
    assert rank.reasons == [["evaluation"]]
    assert not rank.step(3)


def test_steps_and_epochs_stand_beside_each_other():
    rank = Rank(every_epochs=1, every_steps=5)
    done = [step for step in range(1, 13) if rank.step(step, step // 4, epoch_ended=step % 4 == 0)]
    assert done == [4, 5, 8, 10, 12]


def test_without_a_cadence_only_the_end_is_saved():
    rank = Rank()
    assert saves(rank, range(1, 100)) == []
    assert rank.step(100, finished=True)
    assert not rank.cadence.stopping


def test_a_request_to_stop_makes_a_save_within_about_a_second_and_is_agreed_on():
    rank = Rank(requests={"stop_requested": lambda: rank.now > 150})
    done = saves(rank, range(1, 20_000), seconds=1 / 128)
    assert rank.cadence.stopping
    assert 50 * 128 <= done[0] <= 52 * 128
    assert rank.asked[-1] == -1
    follower = Rank(agree=lambda _: -1)  # whatever its own clock says
    assert follower.step(done[0])
    assert follower.cadence.stopping


def test_a_save_is_due_once_the_seconds_are_over_since_the_last_began():
    assert saves(Rank(every_seconds=10), range(1, 36)) == [10, 20, 30]
    rank = Rank(every_seconds=10, every_steps=15)
    assert saves(rank, range(1, 50)) == [10, 15, 25, 30, 40, 45]  # every checkpoint restarts the count


def test_a_busy_writer_puts_the_save_off_to_the_next_free_step():
    rank = Rank(every_steps=4)
    done = [step for step in range(1, 21) if rank.step(step, busy=4 <= step <= 14)]
    assert done == [15, 16, 20]  # three became due meanwhile; one checkpoint covers them all


def test_a_busy_writer_puts_a_save_by_the_clock_off_too():
    rank = Rank(every_seconds=5)
    done = [step for step in range(1, 25) if rank.step(step, busy=step < 13)]
    assert done == [13, 18, 23]


def test_an_epochs_save_that_was_put_off_is_not_forgotten():
    rank = Rank(every_epochs=1)
    assert [step for step in range(1, 9) if rank.step(step, step // 4, step % 4 == 0, busy=step < 6)] == [6, 8]


def test_the_end_is_saved_however_busy_and_never_twice():
    rank = Rank(every_steps=4)
    assert not rank.step(4, busy=True)
    assert rank.step(5, finished=True, busy=True)
    assert not rank.step(5, finished=True)
    assert not rank.step(5)


def test_a_step_that_was_restored_or_just_saved_is_not_saved_again():
    rank = Rank(every_steps=4)
    rank.cadence.saved(8)  # restored
    assert not rank.step(8)
    assert not rank.step(8, finished=True)
    assert saves(rank, range(9, 17)) == [12, 16]


def test_a_restored_run_counts_its_seconds_from_the_restore():
    rank = Rank(every_seconds=10)
    rank.now += 1000  # the restore took long
    rank.cadence.saved(500)
    assert saves(rank, range(501, 530)) == [510, 520]


def test_the_clock_is_asked_about_once_a_second_however_many_steps_there_are():
    rank = Rank(every_seconds=100)
    assert saves(rank, range(1, 30_001), seconds=1 / 128) == [12_800, 25_600]
    # and a few times more as the checkpoint approaches, and once about a busy writer
    assert len(rank.asked) <= 30_000 / 128 * 1.3 + 2 * 12


def test_steps_that_become_slow_make_a_save_late_by_no_more_than_what_one_question_reached():
    rank = Rank(every_seconds=100)
    rank.cadence.saved(0)
    assert saves(rank, range(1, 1281), seconds=1 / 128) == []
    late = saves(rank, range(1281, 10_000), seconds=2.0)[0]
    assert late <= 1281 + 45 + 128


def test_a_first_estimate_that_is_far_off_is_put_right_soon():
    rank = Rank(every_seconds=10)
    rank.now += 1e-9  # no time has passed when the first question is asked, 500 steps into the run
    assert saves(rank, range(500, 600), seconds=0.5)[0] <= 524


@given(
    every=st.integers(1, 500 * 64).map(lambda ticks: ticks / 64),  # sums of 64ths are exact
    seconds=st.lists(st.integers(64, 128).map(lambda ticks: ticks / 64), min_size=1, max_size=200),
)
def test_steps_that_differ_twofold_make_no_save_late_by_more_than_a_step(every, seconds):
    rank = Rank(every_seconds=every)
    rank.cadence.saved(0)
    began = rank.now
    for step, taken in enumerate(seconds, start=1):
        if rank.step(step, seconds=taken):
            assert every <= rank.now - began < every + 2.0
            began = rank.now
        else:
            assert rank.now - began < every + 2.0


@given(
    config=st.fixed_dictionaries(
        {
            "every_seconds": st.none() | st.floats(0.1, 100),
            "every_steps": st.none() | st.integers(1, 20),
            "every_epochs": st.none() | st.integers(1, 3),
        }
    ),
    steps=st.lists(
        st.tuples(st.floats(0, 50), st.floats(0, 5000), st.booleans(), st.booleans()), min_size=1, max_size=120
    ),
    offset=st.floats(-1e6, 1e6),
)
def test_ranks_with_other_clocks_and_other_writers_decide_alike_and_ask_at_the_same_steps(config, steps, offset):
    answers = []

    def first(value):
        answers.append(value)
        return value

    leader = Rank(first, **config)
    # asking is a collective: a rank that asks at other steps than rank 0 hangs the run
    follower = Rank(lambda value: answers.pop(0), start=offset, **config)
    for step, (taken, taken_there, busy, busy_there) in enumerate(steps, start=1):
        when = {"epoch": step // 7, "epoch_ended": step % 7 == 0, "finished": step == len(steps)}
        due = leader.step(step, **when, busy=busy, seconds=taken)
        assert follower.step(step, **when, busy=busy_there, seconds=taken_there) == due
        assert answers == []
        assert len(follower.asked) == len(leader.asked)
        if step == len(steps):
            assert due
