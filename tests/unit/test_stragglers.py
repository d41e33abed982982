"""Stragglers: their detection from given times, and that waiting for a slow rank makes no other rank slow."""

from types import SimpleNamespace

import pytest
import torch

from ftexp.cluster.resources import Workers
from ftexp.config.schema import Config
from ftexp.driver.alerts.rules import described
from ftexp.driver.nccl import take_findings, uses_nccl
from ftexp.failure.stragglers import Slow, Stragglers, slow_ranks
from ftexp.job.group import ProcessGroup
from ftexp.job.stopwatch import BACKWARD, FEED, FORWARD, OPTIMIZER, OWN, Stopwatch
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.worker.ranks import RankTimes
from tests.support.jobs import CPU, make_job

FINE, TWICE = [10, 40, 0], [10, 90, 0]


@pytest.mark.parametrize(
    ("times", "factor", "slow"),
    [
        pytest.param([FINE], 1.5, [], id="one rank is never slow"),
        pytest.param([FINE, FINE], 1.5, [], id="all alike"),
        pytest.param([FINE, TWICE], 1.5, [Slow(1, 1, 2.0)], id="of two, the faster is the measure"),
        pytest.param([FINE, TWICE], 2.0, [], id="as much as the factor is not more"),
        pytest.param([FINE, FINE, [60, 40, 0], TWICE], 1.5, [Slow(2, 0, 2.0), Slow(3, 1, 2.0)], id="two, by part"),
        pytest.param([TWICE, TWICE, FINE], 1.5, [], id="one that is fast makes no other slow"),
        pytest.param([[60, 0, 0], [0, 60, 0], [0, 0, 200]], 1.5, [Slow(2, 2, 200 / 60)], id="parts are no measure"),
        pytest.param([[0, 0, 0], [0, 0, 9]], 1.5, [], id="nothing measured"),
    ],
)
def test_a_rank_is_slow_if_all_its_parts_together_take_longer_than_the_median(times, factor, slow):
    assert slow_ranks(times, factor) == slow


def noted(stragglers, *points):
    return [stragglers.note(times) for times in points]


def test_a_rank_must_stay_slow_and_then_stay_fast():
    stragglers, slow, fine = Stragglers(1.5, log_every_steps=100), [FINE, TWICE], [FINE, FINE]
    nothing = ([], [])
    assert noted(stragglers, slow, slow, fine, slow, slow) == [nothing] * 5  # not three in a row
    assert noted(stragglers, slow) == [([Slow(1, 1, 2.0)], [])]
    assert noted(stragglers, slow, fine, fine, slow, fine, fine) == [nothing] * 6
    assert noted(stragglers, fine, fine) == [([], [1]), nothing]


@pytest.mark.parametrize(("log_every_steps", "num_points"), [(1, 30), (7, 5), (10, 3), (100, 3)])
def test_a_few_steps_make_no_straggler_however_often_points_are_logged(log_every_steps, num_points):
    told = noted(Stragglers(1.5, log_every_steps), *[[FINE, TWICE]] * num_points)
    assert told == [([], [])] * (num_points - 1) + [([Slow(1, 1, 2.0)], [])]


def test_what_is_waited_for_others_is_no_own_time():
    clock = SimpleNamespace(now=100.0)
    stopwatch = Stopwatch(clock=lambda: clock.now)

    def after(seconds, act, *arguments, **named):
        clock.now += seconds
        act(*arguments, **named)

    for _ in stopwatch.feeding((number for number in range(2)), lambda: 0):
        after(1, stopwatch.wait)
        after(10, stopwatch.wait)  # it is already waiting
        after(10, stopwatch.go_on)
        after(2, stopwatch.go_on)  # it is already running
        after(0, stopwatch.lap, FORWARD)
        after(3, stopwatch.wait, only_from_now=True)  # a first and a second gradient
        after(1, stopwatch.wait, only_from_now=True)
        after(20, stopwatch.lap, BACKWARD)
        after(5, stopwatch.lap, OPTIMIZER)
        stopwatch.wait()  # a wait between steps
    own = {FEED: 0, "teacher": 0, FORWARD: 3, BACKWARD: 4, OPTIMIZER: 5}
    assert stopwatch.own_s() == own
    speeds = stopwatch.take(8)
    assert (speeds["forward_ms"], speeds["backward_ms"], speeds["optimizer_ms"]) == (23000, 24000, 5000)
    assert stopwatch.own_s() == dict.fromkeys(own, 0)


def test_on_a_gpu_waits_are_told_by_events_once_the_last_has_come(monkeypatch):
    clock, made = SimpleNamespace(now=0.0), []

    class Event:
        def __init__(self, enable_timing):
            self.is_over = False
            made.append(self)

        def record(self):
            self.at = clock.now

        def synchronize(self):
            for event in made:
                event.is_over = True

        def elapsed_time(self, end):
            assert end.is_over
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = Stopwatch(torch.device("cuda"), lambda: clock.now)
    for _ in stopwatch.feeding((number for number in range(2)), lambda: 0):
        clock.now += 3
        stopwatch.wait(only_from_now=True)
        clock.now += 7
        stopwatch.lap(BACKWARD)
    before = len(made)
    with stopwatch.apart():  # an evaluation, which also gathers a sharded model's blocks
        stopwatch.wait()
        stopwatch.go_on()
    assert len(made) == before
    assert stopwatch.own_s()[BACKWARD] == 3
    assert stopwatch.take(8)["backward_ms"] == 10000


def test_one_rank_compares_nothing_nor_do_several_without_a_factor():
    assert len(RankTimes(make_job(group=ProcessGroup(0, 2, CPU))).own()) == 2 * len(OWN)
    two = make_job(group=ProcessGroup(0, 2, CPU))
    two.config.scaling.straggler_factor = None
    for job in (two, make_job()):
        ranks = RankTimes(job)
        assert (ranks.own(), ranks.take([])) == ([], {})
        assert not any(parameter._post_accumulate_grad_hooks for parameter in job.learner.model.parameters())


def test_each_rank_puts_its_times_in_a_place_of_its_own(monkeypatch):
    seconds = dict(zip(OWN, (0.001, 0, 0.002, 0.003, -1e-9), strict=True))
    sums = [0] * (3 * len(OWN))
    for rank in range(3):
        job = make_job(group=ProcessGroup(rank, 3, CPU))
        monkeypatch.setattr(job.stopwatch, "own_s", lambda rank=rank: {k: v * (1 + rank) for k, v in seconds.items()})
        own = RankTimes(job).own()
        assert own[rank * 5 : rank * 5 + 5] == [1000 * (1 + rank), 0, 2000 * (1 + rank), 3000 * (1 + rank), 0]
        sums = [one + other for one, other in zip(sums, own, strict=True)]
    first = RankTimes(make_job(group=ProcessGroup(0, 3, CPU)))
    assert first.take(sums) == {"rank_ms_min": 6, "rank_ms_median": 12, "rank_ms_max": 18, "slowest_rank": 2}
    assert RankTimes(job).take(sums) == {}  # rank 2 logs nothing


def test_a_slow_rank_is_found_by_its_part_whatever_the_others_wait_in(preloaded, tmp_path):
    assert preloaded.run("straggler_ranks", MEETING=str(tmp_path / "meeting")) == "the slow ranks were found\n"


def test_a_straggler_is_described_with_its_node():
    event = events.Straggler(1, "feed", 2.04, 81.6, 40.0, 50, "n2")
    assert described(event) == (
        "rank 1 on n2 stays slow: 81.6 ms a step without waiting for others, 2.0 times the median, "
        "most of the excess in feed"
    )


@pytest.mark.parametrize(
    ("backend", "use_gpu", "expected"),
    [(None, True, True), (None, False, False), ("gloo", True, False), ("cpu:gloo,cuda:nccl", False, True)],
)
def test_nccl_is_what_gpus_use_unless_the_backend_says_otherwise(backend, use_gpu, expected):
    config = Config()
    config.scaling.backend = backend
    assert uses_nccl(config, Workers(2, use_gpu, {})) == expected


def test_what_the_nccl_detector_found_comes_to_the_record_of_the_hang(tmp_path):
    run_dir = Storage.at(str(tmp_path))
    assert take_findings(run_dir, 1) == []
    found = run_dir.child("hang_detector")
    found.child("nccl_ras").write_bytes("ncclras_report.txt", b"rank 1 is behind")
    found.child("stack_traces").write_bytes("rank_0.log", b"in all_reduce")
    assert take_findings(run_dir, 2) == ["hangs/a2.nccl_ras.ncclras_report.txt", "hangs/a2.stack_traces.rank_0.log"]
    assert (tmp_path / "hangs/a2.nccl_ras.ncclras_report.txt").read_bytes() == b"rank 1 is behind"
    assert not found.exists()
