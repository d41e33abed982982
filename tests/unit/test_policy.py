"""The decision about a failure: budgets, their refill, failures that are bugs, and the backoff."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftexp.config.schema import CAUSES, FailureConfig
from ftexp.failure.causes import BUG, CRASH, HANG, NON_FINITE, OUT_OF_MEMORY, PREEMPTION, RAY, STORAGE, Cause, Ending
from ftexp.failure.policy import Action, Past, decide

SMALLER = Action.RESTART_SMALLER_MICRO_BATCHES


def failed(kind=CRASH, error="ChaosError: x", **values):
    return Cause(kind, 1, error, **values)


def before(kind=CRASH, step=10, error="an earlier one", progressed=True):
    return Past(kind, step, error, progressed)


def decision(cause=None, step=100, progressed=True, past=(), micro_batch=16, **config):
    return decide(cause or failed(), step, progressed, past, FailureConfig(**config), micro_batch)


def restarts(decision):
    return decision.action is not Action.STOP


@pytest.mark.parametrize(
    ("max_failures", "num_before", "goes_on", "reason"),
    [
        (0, 0, False, "failure 1 of 0 allowed: stopping"),
        (3, 0, True, "failure 1 of 3 allowed: restarting the workers"),
        (3, 2, True, "failure 3 of 3 allowed: restarting the workers"),
        (3, 3, False, "failure 4 of 3 allowed: stopping"),
        (-1, 3000, True, "failure 3001 (no limit): restarting the workers"),
    ],
)
def test_failures_are_counted_against_their_number(max_failures, num_before, goes_on, reason):
    got = decision(past=[before()] * num_before, max_failures=max_failures)
    assert (restarts(got), got.reason, got.delay_s, got.cause) == (goes_on, reason, 0.0, CRASH)


@pytest.mark.parametrize(
    ("kind", "past", "goes_on", "reason"),
    [
        (HANG, [HANG], True, "failure 2 of 9 allowed, hang 2 of 2 allowed: restarting the workers"),
        (HANG, [HANG, CRASH, HANG], False, "failure 4 of 9 allowed, hang 3 of 2 allowed: stopping"),
        (CRASH, [HANG, HANG], True, "failure 3 of 9 allowed: restarting the workers"),
        (STORAGE, [], False, "failure 1 of 9 allowed, storage 1 of 0 allowed: stopping"),
    ],
)
def test_a_cause_may_have_a_smaller_number_of_its_own(kind, past, goes_on, reason):
    limits = {"max_failures": 9, "max_by_cause": {HANG: 2, STORAGE: 0}}
    got = decision(failed(kind), past=[before(one) for one in past], **limits)
    assert (restarts(got), got.reason) == (goes_on, reason)


@pytest.mark.parametrize(("num_before", "goes_on"), [(1, True), (2, False)])
def test_preemption_may_have_a_number_among_the_causes_too(num_before, goes_on):
    past = [before(PREEMPTION)] * num_before
    assert restarts(decision(failed(PREEMPTION), past=past, max_by_cause={PREEMPTION: 2})) == goes_on


@pytest.mark.parametrize(
    ("step", "goes_on", "reason"),
    [
        (59, False, "failure 3 of 2 allowed in the last 50 steps: stopping"),  # steps 10 and 20 are within 50 steps
        (60, True, "failure 2 of 2 allowed in the last 50 steps: restarting the workers"),
        (70, True, "failure 1 of 2 allowed in the last 50 steps: restarting the workers"),
    ],
)
def test_a_failure_that_many_steps_back_is_forgiven(step, goes_on, reason):
    past = [before(step=10), before(step=20)]
    got = decision(step=step, past=past, max_failures=2, refill_after_steps=50)
    assert (restarts(got), got.reason) == (goes_on, reason)


def test_what_is_forgiven_does_not_count_for_its_cause_either():
    past, limits = [before(HANG, step=10)] * 2, {"max_by_cause": {HANG: 1}}
    assert not restarts(decision(failed(HANG), step=60, past=past, **limits))
    assert restarts(decision(failed(HANG), step=60, past=past, refill_after_steps=50, **limits))


def test_preemptions_are_not_charged_and_have_a_limit_of_their_own():
    past = [before(PREEMPTION)] * 5
    assert decision(past=past, max_failures=1).reason == "failure 1 of 1 allowed: restarting the workers"
    got = decision(failed(PREEMPTION), past=[before()] * 9, max_failures=0)
    assert restarts(got)
    assert got.reason == ("preemption 1 (no limit), not charged to failure.max_failures: restarting the workers")
    for limit, goes_on in ((6, True), (5, False), (0, False)):
        got = decision(failed(PREEMPTION), past=past, max_failures=9, max_preemption_failures=limit)
        assert restarts(got) == goes_on
        assert got.reason.startswith(f"preemption 6 of {limit} allowed, not charged")


def test_new_rays_are_not_charged_have_a_limit_of_their_own_and_are_forgiven_like_failures():
    past = [before(RAY)] * 2
    assert decision(past=past, max_failures=1).reason == "failure 1 of 1 allowed: restarting the workers"
    got = decision(failed(RAY), past=[*past, before()], max_failures=0)
    reason = "new Ray 3 of 3 allowed, not charged to failure.max_failures: starting a new Ray"
    assert (restarts(got), got.reason, got.cause) == (True, reason, RAY)
    for limits, goes_on in (
        ({"max_ray_failures": 2}, False),
        ({"max_ray_failures": 2, "refill_after_steps": 90}, True),
        ({"max_ray_failures": -1}, True),
        ({"max_by_cause": {RAY: 2}}, False),
    ):
        assert restarts(decision(failed(RAY), past=past, **limits)) == goes_on
    stuck = [before(RAY, step=0, progressed=False)]
    got = decision(failed(RAY), step=0, progressed=False, past=stuck, backoff_s=8, max_failures_without_progress=1)
    assert (restarts(got), got.delay_s) == (False, 0.0)


ENDLESS = {"max_failures": -1, "max_failures_without_progress": -1}


def test_a_bug_stops_at_once():
    got = decision(failed(BUG), **ENDLESS)
    assert (restarts(got), got.cause) == (False, BUG)
    assert got.reason == "a restart does not fix a bug: stopping"


@pytest.mark.parametrize("kind", [STORAGE, CRASH, BUG])
def test_an_error_that_another_try_would_end_in_stops_at_once(kind):
    got = decision(failed(kind, ending=Ending.GAVE_UP), **ENDLESS)
    assert (restarts(got), got.cause) == (False, kind)
    assert got.reason == "another attempt would fail the same way: stopping"


@pytest.mark.parametrize(
    ("cause", "past", "found"),
    [
        (failed(), before(step=100, error="ChaosError: x"), BUG),
        (failed(NON_FINITE), before(NON_FINITE, step=100, error="ChaosError: x"), NON_FINITE),
        (failed(), before(step=99, error="ChaosError: x"), None),  # at another step
        (failed(), before(step=100, error="ChaosError: y"), None),  # another exception
        # a SIGKILL or a lack of memory doesn't show that the step itself is at fault
        (failed(ending=Ending.DIED), before(step=100, error="ChaosError: x"), None),
        (failed(HANG, ending=Ending.DIED), before(HANG, step=100, error="ChaosError: x"), None),
        (failed(OUT_OF_MEMORY), before(OUT_OF_MEMORY, step=100, error="ChaosError: x"), None),
        (failed(STORAGE), before(STORAGE, step=100, error="ChaosError: x"), None),
    ],
)
def test_the_same_exception_at_the_same_step_twice_is_no_accident(cause, past, found):
    got = decision(cause, step=100, past=[before(), past], **ENDLESS)
    assert restarts(got) == (found is None)
    assert got.cause == (found or cause.kind)
    assert ("the same error occurred twice at the same step" in got.reason) == (found is not None)


def test_failures_in_a_row_without_a_new_step_are_a_crash_loop():
    stuck = before(progressed=False)
    limits = {"max_failures": -1, "max_failures_without_progress": 2}
    got = [decision(progressed=False, past=[before()] + [stuck] * number, **limits) for number in range(3)]
    assert [restarts(one) for one in got] == [True, True, False]
    assert got[0].reason == (
        "failure 2 (no limit), 1 of 2 allowed in a row without a new step: restarting the workers in 1 s"
    )
    assert got[2].reason == "failure 4 (no limit), 3 of 2 allowed in a row without a new step: stopping"
    assert restarts(decision(progressed=False, past=[stuck, stuck, before()], **limits))  # not in a row
    assert restarts(decision(progressed=True, past=[stuck] * 9, **limits))
    assert not restarts(decision(progressed=False, max_failures_without_progress=0))
    endless = decision(progressed=False, past=[stuck] * 9, **ENDLESS)
    assert restarts(endless)
    assert "10 in a row without a new step: restarting" in endless.reason


def test_the_wait_doubles_up_to_its_limit_and_is_none_after_progress():
    past, limits = [before()], {**ENDLESS, "backoff_s": 1.5, "max_backoff_s": 10}
    delays = []
    for _ in range(6):
        delays.append(decision(progressed=False, past=past, **limits).delay_s)
        past.append(before(progressed=False))
    assert delays == [1.5, 3, 6, 10, 10, 10]
    assert decision(progressed=True, past=past, **limits).delay_s == 0
    assert decision(progressed=False, past=[*past, before()], **limits).delay_s == 1.5
    assert decision(progressed=False, past=past, **limits).reason.endswith("restarting the workers in 10 s")


@pytest.mark.parametrize("num_before", [1023, 1024, 5000])
def test_a_loop_that_shall_never_end_does_not_end(num_before):
    got = decision(progressed=False, past=[before(progressed=False)] * num_before, **ENDLESS)
    assert (restarts(got), got.delay_s) == (True, 60.0)


@pytest.mark.parametrize("config", [{}, {"max_by_cause": {CRASH: 0}}, {"max_failures_without_progress": 0}])
def test_one_limit_that_is_exceeded_is_enough(config):
    limits = {"max_failures": 0, "max_by_cause": {CRASH: 5}, "max_failures_without_progress": 5, **config}
    assert not restarts(decision(progressed=False, **limits))
    limits = {"max_failures": 5, "max_by_cause": {CRASH: 5}, "max_failures_without_progress": 5, **config}
    assert restarts(decision(progressed=False, **limits)) == (not config)


STEPS = st.integers(0, 300)
FAILURES = st.tuples(
    st.sampled_from(CAUSES), STEPS, st.sampled_from("xyz"), st.booleans(), st.sampled_from([Ending.RAISED, Ending.DIED])
)


@given(
    failures=st.lists(FAILURES, max_size=30),
    max_failures=st.integers(0, 5),
    max_rays=st.integers(0, 5),
    refill=st.none() | st.integers(1, 100),
    max_without_progress=st.integers(-1, 4),
    backoff_s=st.floats(0, 5),
    more_s=st.floats(0, 100),
)
def test_no_run_goes_on_beyond_its_budgets(
    failures, max_failures, max_rays, refill, max_without_progress, backoff_s, more_s
):
    config = FailureConfig(
        max_failures=max_failures,
        max_ray_failures=max_rays,
        refill_after_steps=refill,
        max_failures_without_progress=max_without_progress,
        backoff_s=backoff_s,
        max_backoff_s=backoff_s + more_s,
    )
    past = []
    for kind, step, error, progressed, ending in failures:
        got = decide(Cause(kind, 0, error, ending), step, progressed, past, config, 16)
        assert 0 <= got.delay_s <= config.max_backoff_s
        assert (got.delay_s == 0) or (restarts(got) and not progressed)
        assert got.reason.endswith("stopping") != restarts(got)
        past.append(Past(got.cause, step, error, progressed))
        if not restarts(got):
            break
        assert kind != BUG
        window = [one.cause for one in past if refill is None or step - one.step < refill]
        assert kind in (PREEMPTION, RAY) or sum(one not in (PREEMPTION, RAY) for one in window) <= max_failures
        assert kind != RAY or window.count(RAY) <= max_rays
        latest = past[-1 - max_without_progress :]
        in_a_row = len(latest) > max_without_progress >= 0 and not any(one.progressed for one in latest)
        assert not in_a_row


@pytest.mark.parametrize(
    ("policy", "micro_batch", "action", "reason"),
    [
        ("retry", 16, Action.RESTART, "failure 1 of 3 allowed: restarting the workers"),
        ("fail", 16, Action.STOP, "failure.on_out_of_memory=fail: stopping; train.accumulate_steps makes micro-"),
        (
            "halve_micro_batch",
            17,
            SMALLER,
            "restarting the workers with micro-batches of 9 images, not 17",
        ),
        ("halve_micro_batch", 2, Action.STOP, "micro-batches can't get smaller: stopping"),
    ],
)
def test_a_lack_of_memory_may_be_met_with_smaller_micro_batches(policy, micro_batch, action, reason):
    got = decision(failed(OUT_OF_MEMORY), micro_batch=micro_batch, on_out_of_memory=policy)
    assert (got.action, got.cause) == (action, OUT_OF_MEMORY)
    assert reason in got.reason


def test_halving_is_not_charged_and_other_causes_halve_nothing():
    halving = {"on_out_of_memory": "halve_micro_batch", "max_failures": 1, "max_failures_without_progress": 1}
    halved = [before(OUT_OF_MEMORY, progressed=False)] * 9
    again = decision(failed(OUT_OF_MEMORY), past=[before(CRASH), *halved], progressed=False, **halving)
    assert again.action is SMALLER
    crash = decision(progressed=False, past=halved, **halving)
    assert crash.action is Action.RESTART
    assert crash.reason.startswith("failure 1 of 1 allowed, 1 of 1 allowed in a row without a new step")
    assert not restarts(decision(progressed=False, past=halved, **{**halving, "on_out_of_memory": "retry"}))
