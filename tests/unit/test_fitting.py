"""Stopping a run by signals: the first one requests a final checkpoint, the second one ends the run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
import ray

from ftexp.cli.entry import exiting_on_error
from ftexp.cluster import interruptible as fitting
from ftexp.cluster.interruptible import Terminated, fit_interruptibly
from ftexp.cluster.ray_cluster import start_ray
from ftexp.cluster.signals import ignore_termination, terminable
from ftexp.config.schema import Config
from ftexp.errors import RayLostError, RunFailedError, StorageError

FREE = SimpleNamespace(lost=None)

# sends itself signals from the fitting thread, the second one after the first was handled
CHILD = """
    import json, os, signal, sys, threading
    from types import SimpleNamespace
    from ftexp.cluster import interruptible as fitting

    numbers, has_workers, grace_s = json.loads(sys.argv[1])
    fitting.STOP_GRACE_S, fitting._END_WITHIN_S, fitting._REPEAT_WITHIN_S = grace_s, 0.1, 0.0
    asked, answered, ended = [], threading.Event(), threading.Event()

    def fit():
        for count, number in enumerate(numbers):
            if count:
                answered.wait(30)
            os.kill(os.getpid(), number)
        answered.wait(30)
        if len(numbers) != 1 or grace_s < 1:
            ended.wait(30)
        return {"loss": 1.0}

    def stop(why):
        asked.append(type(why).__name__)
        answered.set()
        return has_workers

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        result = fitting.fit_interruptibly(fit, SimpleNamespace(lost=None), stop)
    except KeyboardInterrupt as error:
        result = type(error).__name__
    same = before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    print(json.dumps([asked, result, same]))
    sys.stdout.flush()
    os._exit(0)
"""
INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture
def fit_in_c(monkeypatch):
    """Shorten the wait for the end of a fit that can't be interrupted, because it waits in C."""
    monkeypatch.setattr(fitting, "_END_WITHIN_S", 0.1)


@pytest.mark.parametrize(
    ("numbers", "has_workers", "grace_s", "asked", "result"),
    [
        ([INT], True, 30, ["KeyboardInterrupt"], {"loss": 1.0}),
        ([TERM], True, 30, ["Terminated"], {"loss": 1.0}),
        ([INT, INT], True, 30, ["KeyboardInterrupt"], "KeyboardInterrupt"),
        ([TERM, TERM], True, 30, ["Terminated"], "Terminated"),
        ([TERM, INT], True, 30, ["Terminated"], "KeyboardInterrupt"),
        ([INT, TERM], True, 30, ["KeyboardInterrupt"], "Terminated"),
        ([TERM], False, 30, ["Terminated"], "Terminated"),  # there are no workers to save
        ([INT], True, 0.01, ["KeyboardInterrupt"], "KeyboardInterrupt"),  # the checkpoint takes too long
        ([TERM], True, 0.01, ["Terminated"], "Terminated"),
    ],
)
def test_the_first_signal_asks_for_a_last_save_and_the_second_ends_it(numbers, has_workers, grace_s, asked, result):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), json.dumps([numbers, has_workers, grace_s])]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == [asked, result, True]


@pytest.fixture
def handlers():
    """Restore the handlers afterwards; reset SIGHUP meanwhile, which `nohup pytest` ignores."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_comes_twice_at_once_asks_once(monkeypatch):
    """uv and bash pass on signals that the process group has already received."""
    now = [100.0]
    monkeypatch.setattr(fitting.time, "monotonic", lambda: now[0])
    sent = [
        (0, signal.SIGHUP, 1), (0.2, TERM, 1), (1.5, signal.SIGHUP, 1), (1.6, INT, 2),
        (2.1, TERM, 3), (3.0, TERM, 3), (4.2, TERM, 4),
    ]  # fmt: skip
    with fitting.collected_signals() as asked:
        for seconds, number, count in sent:
            now[0] = 100 + seconds
            os.kill(os.getpid(), number)
            assert len(asked) == count, (seconds, number)


def never(why):
    raise AssertionError("nobody asked")


@pytest.mark.usefixtures("fit_in_c")
def test_a_signal_that_comes_while_the_first_is_answered_is_not_lost():
    def stop(why):
        os.kill(os.getpid(), signal.SIGTERM)  # a second signal
        return True

    ended = threading.Event()

    def fit():
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait(30)

    with pytest.raises(Terminated):
        fit_interruptibly(fit, FREE, stop)
    ended.set()


def stand_still(ended):
    """Loop until an exception ends it; then set `ended`."""
    try:
        while True:
            time.sleep(0.01)
    finally:
        ended.set()


def test_nothing_runs_on_once_it_was_interrupted():
    ended = threading.Event()

    def fit():
        os.kill(os.getpid(), signal.SIGINT)
        stand_still(ended)

    with pytest.raises(KeyboardInterrupt):
        fit_interruptibly(fit, FREE, lambda _: False)
    assert ended.is_set()


def test_an_interruption_that_strikes_where_nothing_can_be_raised_is_told_again(capsys):
    struck, ended = threading.Event(), threading.Event()

    class Cleanup:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            stand_still(struck)

    def fit():
        Cleanup()
        stand_still(ended)

    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        fit_interruptibly(fit, FREE, lambda _: False)
    assert struck.is_set()
    assert ended.is_set()
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err == ""


def test_no_interruption_strikes_a_thread_that_is_being_started(monkeypatch):
    """Python 3.11 would raise it in the new thread and print it, and the starting thread would wait forever."""
    starting, started, ended, asked = threading.Thread(), threading.Event(), threading.Event(), []

    def threads():
        asked.append(started.is_set())
        return [] if started.is_set() else [starting]

    monkeypatch.setattr(threading, "enumerate", threads)

    def fit():
        os.kill(os.getpid(), signal.SIGINT)
        while len(asked) < 3:
            time.sleep(0.01)
        started.set()
        stand_still(ended)

    with pytest.raises(KeyboardInterrupt):
        fit_interruptibly(fit, FREE, lambda _: False)
    assert started.is_set()
    assert ended.is_set()


@pytest.mark.parametrize("when", ["before Ray's handler", "under Ray's handler", "afterwards", "after a failed start"])
def test_a_sigterm_while_ray_starts_is_one_as_later(handlers, when):
    def start():
        with contextlib.suppress(OSError), terminable():
            if when == "before Ray's handler":
                signal.raise_signal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
            if when == "under Ray's handler":
                signal.raise_signal(signal.SIGTERM)
            if when == "after a failed start":
                raise OSError
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated):
        start()
    with pytest.raises(SystemExit, match="2"), terminable():
        sys.exit(2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_fits_is_raised_and_one_after_the_last_does_nothing(handlers, number):
    with terminable():
        pass
    assert fit_interruptibly(lambda: 7, FREE, never) == 7
    with pytest.raises(Terminated):
        signal.raise_signal(number)
    ignore_termination()
    signal.raise_signal(number)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with terminable():
        signal.raise_signal(signal.SIGHUP)
    thread = threading.Thread(target=ignore_termination)
    thread.start()
    thread.join()
    with pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)


def test_what_fit_returns_or_raises_comes_through():
    assert fit_interruptibly(lambda: 7, FREE, never) == 7
    with pytest.raises(ZeroDivisionError):
        fit_interruptibly(lambda: 1 / 0, FREE, never)


@pytest.mark.usefixtures("fit_in_c")
def test_a_run_that_was_taken_over_stops():
    ended = threading.Event()
    with pytest.raises(StorageError, match="taken over by process 7"):
        fit_interruptibly(ended.wait, SimpleNamespace(lost="process 7"), never)
    ended.set()


@pytest.mark.usefixtures("fit_in_c")
def test_what_failed_elsewhere_in_the_driver_ends_the_run_as_what_it_is():
    ended, error = threading.Event(), UnicodeEncodeError("ascii", "x", 0, 1, "no")
    with pytest.raises(UnicodeEncodeError) as raised:
        fit_interruptibly(ended.wait, FREE, never, lambda: error)
    ended.set()
    assert raised.value is error


def test_a_terminal_that_goes_away_is_a_sigterm_unless_nohup_asked_to_ignore_it():
    ended, before = threading.Event(), signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` ignores it

    def fit():
        os.kill(os.getpid(), signal.SIGHUP)
        return ended.wait(20)

    stopped = []

    def stop(asked):
        stopped.append(asked)
        ended.set()
        return True

    try:
        assert fit_interruptibly(fit, FREE, stop) is True
        assert [type(asked) for asked in stopped] == [Terminated]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        ended.clear()

        def linger():
            os.kill(os.getpid(), signal.SIGHUP)
            return ended.wait(10 * fitting._LOOK_EVERY_S)

        assert fit_interruptibly(linger, FREE, stop) is False
        assert len(stopped) == 1
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("fit_in_c")
@pytest.mark.parametrize("fit", [threading.Event().wait, lambda: 1 / 0], ids=["it waits", "it raises what follows"])
def test_the_fit_ends_when_ray_has_died(fit):
    with pytest.raises(RayLostError, match="Ray's GCS process was killed"):
        fit_interruptibly(fit, FREE, never, lost=lambda: "Ray's GCS process was killed")


@pytest.mark.usefixtures("fit_in_c")
def test_who_asked_for_the_end_before_ray_died_gets_it():
    asked = []

    def fit():
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()

    with pytest.raises(Terminated) as ended:
        fit_interruptibly(fit, FREE, lambda why: asked.append(why) or True, lost=lambda: "it died" if asked else None)
    assert isinstance(ended.value.__cause__, RayLostError)


def test_every_command_that_starts_ray_takes_sigterm_from_rays_handler(handlers, monkeypatch):
    def init(**_):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        raise OSError("no room")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RunFailedError, match="no room"):
        start_ray(Config())
    with pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("interrupt", "code"), [(KeyboardInterrupt, 130), (Terminated, 75)])
def test_a_command_that_is_interrupted_exits_with_the_signals_code(interrupt, code):
    with pytest.raises(SystemExit) as ended, exiting_on_error():
        raise interrupt
    assert ended.value.code == code
