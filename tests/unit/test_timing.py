"""The speed in a logged point: sections that add up, correct FLOPs, and MFU only for known peaks."""

import dataclasses
import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ftexp.job.mfu
from ftexp.data.feeds.feed import prefetched
from ftexp.job.mfu import Utilisation, flops_per_image, peak_flops
from ftexp.job.stopwatch import BACKWARD, FORWARD, OPTIMIZER, RANKS, SAVE, SPEEDS, Stopwatch
from ftexp.rundir.names import PROFILE
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.worker.log import log_train
from ftexp.worker.profiler import profiled
from ftexp.worker.step import thaw
from tests.support.jobs import RESNET, make_job, train


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: on a busy machine, torch's threads wait for each other longer than these models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def waited(clock, count, seconds):
    for number in range(count):
        clock.now += seconds
        yield number


def test_sections_are_told_apart_and_what_is_no_training_counts_for_no_speed(clock):
    stopwatch, done = Stopwatch(clock=clock), SimpleNamespace(position=0)
    for _ in stopwatch.feeding(waited(clock, 4, 0.1), lambda: done.position):
        for section, seconds in ((FORWARD, 0.2), (BACKWARD, 0.4), (FORWARD, 0.2), (BACKWARD, 0.4), (OPTIMIZER, 0.3)):
            clock.now += seconds
            stopwatch.lap(section)
        done.position += 8
    with stopwatch.section(SAVE):
        clock.now += 0.4
    with stopwatch.apart():
        clock.now += 100
    speeds = stopwatch.take(done.position)
    assert speeds == {
        "feed_ms": 100.0, "forward_ms": 400.0, "backward_ms": 800.0, "optimizer_ms": 300.0, "save_ms": 100.0,
        "images_per_s": round(32 / 6.8, 1),
    }  # fmt: skip
    assert speeds.keys() <= set(SPEEDS)
    assert stopwatch.take(done.position) == {}  # no new samples since


def test_a_gpus_time_is_told_by_events_that_are_read_at_logged_points_alone_and_used_again(clock, monkeypatch):
    made = []

    class Event:  # of a GPU as fast as the host
        def __init__(self, enable_timing):
            assert enable_timing
            made.append(self)

        def record(self):
            self.at = clock.now

        def elapsed_time(self, end):
            assert is_synchronised
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch, position = Stopwatch(torch.device("cuda"), clock), 0
    for number, _ in enumerate(stopwatch.feeding(waited(clock, 12, 0.1), lambda: 0), start=1):
        is_synchronised = False
        for section, seconds in ((FORWARD, 0.2), (BACKWARD, 0.4), (OPTIMIZER, 0.3)):
            clock.now += seconds
            stopwatch.lap(section)
        clock.now += 0.5
        if number % 4 == 0:
            is_synchronised, position = True, position + 32
            speeds = stopwatch.take(position)
            assert speeds == {
                "feed_ms": 100.0, "forward_ms": 200.0, "backward_ms": 400.0, "optimizer_ms": 300.0, "save_ms": 0.0,
                "images_per_s": round(32 / 6.0, 1),
            }  # fmt: skip
    assert len(made) <= 4 * 4 + 1


def test_the_queue_of_batches_is_told_where_there_is_one(clock):
    stopwatch = Stopwatch(clock=clock)
    made = prefetched((number for number in waited(clock, 5, 1.0)), 2, stopwatch.note_queue)
    assert list(stopwatch.feeding(made, lambda: 0)) == [0, 1, 2, 3, 4]
    assert 0 <= stopwatch.take(40)["feed_queue"] <= 2
    for num_ready in (0, 1, 2, 2):
        stopwatch.note_queue(num_ready)
    list(stopwatch.feeding(waited(clock, 1, 1.0), lambda: 40))
    assert stopwatch.take(48)["feed_queue"] == 1.25


def test_a_run_that_went_back_tells_no_speed(clock):
    stopwatch = Stopwatch(clock=clock)
    list(stopwatch.feeding(waited(clock, 2, 1.0), lambda: 64))
    assert stopwatch.take(32) == {}


def test_points_tell_of_speed_and_checkpoints_do_not(monkeypatch):
    job = make_job()
    monkeypatch.setattr(job.data.rows["train"], "costs_ms", lambda: {"decode_ms": 1.5})
    fed = job.stopwatch.feeding((b for b in job.data.feed.from_position(0)), lambda: job.progress.position)
    job.data.feed = SimpleNamespace(from_position=lambda _: fed)
    train(job)
    log_train(job)
    (point,) = [sent.values for sent in job.channel.points()]
    assert set(SPEEDS) - {"mfu", "teacher_ms", "feed_queue", *RANKS} <= point.keys()
    assert min(point[f"{section}_ms"] for section in (FORWARD, BACKWARD, OPTIMIZER)) > 0
    assert point["decode_ms"] == 1.5
    assert not {*SPEEDS, "decode_ms"} & job.progress.metrics.keys()


def test_flops_are_those_of_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    convolution, linear = 2 * 3 * 8 * 9 * 256, 2 * 8 * 256 * 10
    # backward: as much for the weights, and as much for the inputs, except those of the first layer
    assert flops_per_image(model, (3, 16, 16)) == 2 * convolution + 3 * linear


@pytest.mark.parametrize("arguments", [{}, {"model": RESNET}], ids=["vit", "resnet"])
def test_counting_leaves_a_model_as_it_is(arguments):
    model = make_job(**arguments).learner.model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert flops_per_image(model, (1, 8, 8)) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("A card of tomorrow", "bf16", None),
    ],
)
def test_an_unknown_peak_is_never_guessed(device, precision, peak):
    assert peak_flops(device, precision) == peak


def test_utilisation_is_the_share_of_all_devices_peaks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(ftexp.job.mfu, "flops_per_image", lambda model, shape: 121e9)
    assert Utilisation(torch.device("cuda"), "bf16", 2, (3, 8, 8)).at(500.0, nn.Identity()) == 0.25
    assert Utilisation(torch.device("cpu"), "bf16", 2, (3, 8, 8)).at(500.0, nn.Identity()) is None


def test_what_is_unfrozen_counts_from_then_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    job = make_job(freeze={"backbone": 1})
    job = dataclasses.replace(job, utilisation=Utilisation(torch.device("cuda"), "bf16", 1, (1, 8, 8)))
    thaw(job)
    frozen = job.utilisation.at(1e9, job.learner.model)
    job.progress.epoch = 1
    thaw(job)
    assert job.utilisation.at(1e9, job.learner.model) > 2 * frozen


def test_a_model_that_cannot_be_counted_has_no_utilisation_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")

    class Odd(nn.Module):
        def forward(self, images):
            return images.sum().item()

    utilisation = Utilisation(torch.device("cuda"), "bf16", 1, (1, 8, 8))
    assert utilisation.at(1.0, Odd()) is None
    assert "item" in utilisation.problem


@pytest.mark.parametrize(("first", "count", "traced"), [(2, 3, 3), (10, 5, 3), (13, 2, 0)])
def test_a_trace_of_the_chosen_steps_is_left(tmp_path, first, count, traced):
    job, run_dir = make_job(), Storage.at(str(tmp_path))  # 12 steps
    job.config.profile.enabled, job.config.profile.start_step, job.config.profile.num_steps = True, first, count
    feed = job.data.feed
    job.data.feed = SimpleNamespace(
        from_position=lambda at: profiled(job, run_dir, (b for b in feed.from_position(at)))
    )
    train(job)
    assert job.progress.step == 12
    sent = job.channel.events(events.ProfileWritten)
    assert len(sent) == (1 if traced else 0)
    failed = [event.error for event in job.channel.events(events.ProfileFailed)]
    assert failed == ([] if traced else ["profile.start_step=13 never comes: the run has 12 steps"])
    if traced:
        content = gzip.decompress((tmp_path / PROFILE / "rank0.json.gz").read_bytes())
        names = [event.get("name", "") for event in json.loads(content)["traceEvents"]]
        assert sum(name.startswith("Optimizer.step#") for name in names) == traced


def test_a_profile_that_cannot_be_written_is_told_and_no_more(tmp_path):
    (tmp_path / PROFILE).write_text("in the way")
    job, run_dir = make_job(), Storage.at(str(tmp_path))
    job.config.profile.enabled, job.config.profile.start_step = True, 2
    feed = job.data.feed
    job.data.feed = SimpleNamespace(
        from_position=lambda at: profiled(job, run_dir, (b for b in feed.from_position(at)))
    )
    train(job)
    assert [type(event) for event in job.channel.events()] == [events.ProfileFailed]
