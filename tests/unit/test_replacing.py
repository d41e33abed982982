"""Replacing a single worker: when it is allowed, what the others do meanwhile, and exactness."""

import threading

import pytest
import torch

from ftexp.config.checks.failure import check_failure
from ftexp.config.recovery import decided
from ftexp.config.schema import (
    AUTO,
    REPLACE,
    RESTART,
    CheckpointConfig,
    Config,
    FailureConfig,
    ParallelConfig,
    ScalingConfig,
)
from ftexp.data.batches import Batch
from ftexp.drill import command as drill
from ftexp.errors import ConfigError
from ftexp.evaluation.meter import Meter
from ftexp.failure.causes import CRASH, HANG, PREEMPTION, Cause, Ending
from ftexp.failure.meeting import Invitation, Meeting, Waiting, common_step
from ftexp.failure.policy import Action, decide
from ftexp.rundir.sample_ledger import SampleLedger
from ftexp.storage.directory import Storage
from tests.support.command import DEADLINE_S

ADDRESS = ("10.0.0.1", 5)


def config_of(recovery=REPLACE, failure=None, checkpoint=None, parallel=None, **scaling):
    return Config(
        failure=FailureConfig(recovery=recovery, **(failure or {})),
        checkpoint=CheckpointConfig(**(checkpoint or {})),
        parallel=ParallelConfig(**(parallel or {})),
        scaling=ScalingConfig(**scaling),
    )


# Which failures allow a replacement


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_workers": [1, 3]}, "scaling.num_workers=[1, 3] changes their number: give one number"),
        ({"num_workers": 1}, "scaling.num_workers=1 leaves no worker that could hand its state over: set 2 or more"),
        ({"use_gpu": True}, "scaling.use_gpu=true"),
        ({"backend": "mpi"}, "scaling.backend=mpi"),
        ({"parallel": {"kind": "fsdp"}}, "parallel=fsdp keeps no whole copy of the state on any worker: set"),
        ({"failure": {"on_nonfinite": "rollback"}}, "failure.on_nonfinite=rollback keeps a second state"),
        (
            {"checkpoint": {"extra_state": ["progress"]}},
            "checkpoint.extra_state lacks scheduler, scaler, rng, best, which",
        ),
    ],
)
def test_what_can_not_replace_is_refused_with_what_to_set_and_auto_restarts_then(changes, problem):
    (found,) = check_failure(config_of(**changes))
    assert found.startswith(f"failure.recovery=replace conflicts with {problem}")
    assert found.endswith("or set failure.recovery=auto")
    automatic = config_of(AUTO, **changes)
    assert not list(check_failure(automatic))
    assert decided(automatic, 2, use_gpu=False).failure.recovery == RESTART


@pytest.mark.parametrize(
    ("recovery", "num_workers", "use_gpu", "expected"),
    [
        (RESTART, 2, False, RESTART),
        (AUTO, 2, False, REPLACE),
        (REPLACE, 4, False, REPLACE),
        (AUTO, 1, False, RESTART),
        (AUTO, (1, 3), False, RESTART),
        (AUTO, 2, True, RESTART),
    ],
)
def test_auto_replaces_where_the_number_of_workers_and_their_device_allow_it(recovery, num_workers, use_gpu, expected):
    assert decided(config_of(recovery), num_workers, use_gpu).failure.recovery == expected


@pytest.mark.parametrize(
    ("kind", "rank", "ending", "expected"),
    [
        (CRASH, 1, Ending.DIED, Action.REPLACE),
        (HANG, 2, Ending.DIED, Action.REPLACE),  # the hung rank killed itself
        (CRASH, 0, Ending.DIED, Action.RESTART),  # no other rank holds rank 0's state
        (CRASH, None, Ending.DIED, Action.RESTART),
        (CRASH, 1, Ending.RAISED, Action.RESTART),
        (PREEMPTION, 1, Ending.DIED, Action.RESTART),  # its node goes, too
    ],
)
def test_a_rank_that_died_is_replaced_and_any_other_failure_restarts_all(kind, rank, ending, expected):
    def action(others_wait=True, **failure):
        cause = Cause(kind, rank, "x", ending)
        decision = decide(cause, 10, True, [], FailureConfig(**failure), 16, others_wait)
        assert ("replacing the worker" in decision.reason) == (decision.action is Action.REPLACE)
        return decision.action

    assert action(recovery=REPLACE) is expected
    assert action() is action(others_wait=False, recovery=REPLACE) is Action.RESTART


# The meeting


def test_a_rank_is_asked_until_it_waits_and_invited_until_it_leaves():
    meeting = Meeting()
    assert meeting.waiting(DEADLINE_S) is None  # before `expect`, the rank wouldn't wait
    meeting.expect(can_wait=True)
    assert meeting.waiting(0.0) is None
    asked = []
    thread = threading.Thread(target=lambda: asked.append(meeting.waiting(DEADLINE_S)))
    thread.start()
    meeting.wait(Waiting(7, ADDRESS))
    thread.join()
    assert asked == [Waiting(7, ADDRESS)]
    assert meeting.invitation(0.0) is None
    for number in (1, 2):  # the first replacement has died
        meeting.invite(Invitation(ADDRESS, number, 1))
        assert meeting.invitation(0.0) == Invitation(ADDRESS, number, 1)
        assert meeting.waiting(0.0) == Waiting(7, ADDRESS)
    meeting.leave()
    assert (meeting.waiting(0.0), meeting.invitation(0.0)) == (None, None)


def test_a_rank_may_wait_while_it_waits_or_is_in_a_step_that_takes_long(monkeypatch):
    monkeypatch.setattr("ftexp.failure.meeting._SETTLE_S", 0.0)
    meeting = Meeting()
    assert not meeting.may_wait()
    meeting.expect(can_wait=True)
    assert meeting.may_wait()
    meeting.wait(Waiting(7, ADDRESS))
    meeting.expect(can_wait=False)
    assert meeting.may_wait()
    meeting.leave()
    assert not meeting.may_wait()


def test_who_asks_a_rank_that_goes_where_it_would_not_wait_is_answered_at_once():
    meeting, asked = Meeting(), []
    meeting.expect(can_wait=True)
    thread = threading.Thread(target=lambda: asked.append(meeting.waiting(DEADLINE_S)))
    thread.start()
    meeting.expect(can_wait=False)
    thread.join()
    assert asked == [None]


@pytest.mark.parametrize(
    ("steps", "expected"), [([5], 5), ([5, 5], 5), ([5, 6], None), ([5, None], None), ([None, None], None), ([], None)]
)
def test_ranks_meet_if_they_all_wait_after_the_same_step(steps, expected):
    assert common_step([None if step is None else Waiting(step, None) for step in steps]) == expected


# The remains of a dead rank


def test_sums_that_were_never_shared_since_the_reset_are_none():
    meter = Meter(torch.device("cpu"))
    meter._of_ranks = torch.ones(2, 8, dtype=torch.int64)
    assert meter.shared(1).sum() == 8
    meter.reset()
    assert meter.shared(1).sum() == 0


def test_a_ledger_says_which_step_its_file_ends_with(tmp_path):
    def ledger():
        return SampleLedger(Storage.at(str(tmp_path)), 1, 1)

    assert ledger().last_step() == SampleLedger(None, 1, 1).last_step() == 0
    positions = torch.arange(2).numpy()
    for step in (4, 5, 6):
        ledger().note(step, Batch(0, 2, [], positions, positions))
    assert ledger().last_step() == 6
    ledger().back_to(4)
    assert ledger().last_step() == 4
    with (tmp_path / "a0001.r1.jsonl").open("a") as file:
        file.write('{"step": 7, "posi')  # cut off by a kill
    assert ledger().last_step() == 4


def test_a_drill_that_replaces_sets_it_and_refuses_another():
    own = drill.DrillConfig(recovery=REPLACE)
    assert "failure.recovery=replace" in drill._broken_words(Config(), own, 60)
    with pytest.raises(ConfigError, match=r"drill\.recovery=replace sets it"):
        drill.refuse(["failure.recovery=restart"], own)
