"""A worker without progress is detected by the limit of its phase, reported with its stacks, and killed."""

import json
import signal
import subprocess
import sys
import textwrap

import pytest

from ftexp.config.schema import FailureConfig
from ftexp.failure.phases import AGREEMENT, BETWEEN, EVALUATION, SAVE, START, STEP
from ftexp.failure.watchdog import Watchdog, hang_limits

LIMITS = {START: 100.0, STEP: 10.0, BETWEEN: 20.0, EVALUATION: 50.0, SAVE: None}


class Watched:
    """A watchdog with its own clock; `told`: its reports; `died`: how often it would have killed the process."""

    def __init__(self, limits=LIMITS):
        self.now, self.told, self.died = 1000.0, [], 0
        self.dog = Watchdog(limits, lambda *found: self.told.append(found), self.die, lambda: self.now)

    def die(self):
        assert len(self.told) == self.died + 1  # the report comes first
        self.died += 1

    def after(self, seconds):
        """Advance the clock and check; return the number of kills so far."""
        self.now += seconds
        self.dog.check()
        return self.died


@pytest.fixture
def watched():
    return Watched()


@pytest.mark.parametrize("phase", [START, STEP, BETWEEN, EVALUATION])
def test_each_phase_has_its_own_limit(watched, phase):
    if phase != START:  # it starts in this phase
        watched.dog.beat(phase)
    assert watched.after(LIMITS[phase]) == 0
    assert watched.after(0.5) == 1
    ((told, seconds, _),) = watched.told
    assert (told, seconds) == (phase, LIMITS[phase] + 0.5)


def test_a_phase_without_a_limit_lasts_for_ever(watched):
    watched.dog.beat(SAVE)
    assert watched.after(1e9) == 0
    assert Watched({STEP: 1.0}).after(1e9) == 0  # in the phase START


def test_a_loop_that_beats_lives(watched):
    for _ in range(100):
        watched.dog.beat()
        assert watched.after(9) == 0
        watched.dog.beat(BETWEEN)
        assert watched.after(19) == 0


def test_within_a_block_its_limit_holds_and_afterwards_the_one_before(watched):
    watched.dog.beat(STEP)
    with watched.dog.during(EVALUATION):
        assert watched.after(49) == 0
        with watched.dog.during(SAVE):
            assert watched.after(1000) == 0
        assert watched.after(49) == 0  # counted from the end of the inner block
    assert watched.after(9) == 0  # counted from the end of the outer block
    assert watched.after(2) == 1
    assert watched.told[0][0] == STEP
    with pytest.raises(KeyError), watched.dog.during(SAVE):
        raise KeyError
    assert watched.after(11) == 2


def test_a_hang_within_a_block_is_told_as_the_blocks(watched):
    with watched.dog.during(EVALUATION):
        assert watched.after(51) == 1
    assert [found[0] for found in watched.told] == [EVALUATION]


def stand_in_the_way(watched):
    watched.dog.check()


def test_the_stacks_name_what_stood_still(watched):
    watched.now += 101
    stand_in_the_way(watched)
    assert "in stand_in_the_way" in watched.told[0][2]
    assert "in test_the_stacks_name_what_stood_still" in watched.told[0][2]


def test_without_a_limit_there_is_no_thread():
    dog = Watchdog(dict.fromkeys(LIMITS), lambda *found: None)
    dog.start()
    assert dog._thread is None
    dog.stop()


def test_every_phase_of_the_loop_has_the_limit_of_its_key():
    config = FailureConfig(hang_timeout_s=1, start_timeout_s=2, evaluation_timeout_s=3, save_timeout_s=None)
    assert hang_limits(config) == {START: 2, STEP: 3, AGREEMENT: 3, BETWEEN: 1, EVALUATION: 3, SAVE: None}


# the module is loaded by its path: importing the package's other parts takes seconds
CHILD = """
    import ctypes, json, os, sys, threading, time
    from ftexp.failure import watchdog
    watchdog._GRACE_S = {grace_s}
    def tell(phase, seconds, stacks):
        print(json.dumps([phase, seconds, stacks]), flush=True)
    dog = watchdog.Watchdog({{watchdog.STEP: {limit_s}}}, tell)
    dog.beat()
    dog.start()
"""
STANDS_STILL = """
    def wait_for_ever():
        time.sleep(600)
    wait_for_ever()
"""
# PyDLL doesn't release the GIL. By then the watchdog has polled once, which sets the alarm
HOLDS_THE_INTERPRETER = """
    def hold_the_interpreter():
        ctypes.PyDLL(None).sleep(600)
    looked = dog.check
    def check():
        looked()
        polled.append(1)
        twice.set() if len(polled) == 2 else None
    polled, twice, dog.check = [], threading.Event(), check
    while not twice.wait(0.01):
        dog.beat()
    hold_the_interpreter()
"""
STOPPED = """
    while dog._since == 0:
        pass
    dog.stop()
    dog.beat()
    time.sleep(0.6)
    print(json.dumps("lived"))
"""


def run(script, limit_s=0.2, grace_s=60.0):
    code = textwrap.dedent(CHILD.format(limit_s=limit_s, grace_s=grace_s)) + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_a_loop_that_stands_still_is_ended_once_it_was_told():
    child = run(STANDS_STILL)
    assert child.returncode == -signal.SIGKILL, child.stderr
    phase, seconds, stacks = json.loads(child.stdout)
    assert phase == STEP
    assert seconds > 0.2
    assert "in wait_for_ever" in stacks


def test_a_loop_that_never_lets_go_of_the_interpreter_is_ended_too():
    child = run(HOLDS_THE_INTERPRETER, limit_s=2.0, grace_s=0.2)
    assert child.returncode == 1, child.stderr  # faulthandler's exit
    assert child.stdout == ""
    assert "in hold_the_interpreter" in child.stderr


def test_what_was_stopped_watches_no_more():
    child = run(STOPPED)
    assert (child.returncode, json.loads(child.stdout)) == (0, "lived"), child.stderr
