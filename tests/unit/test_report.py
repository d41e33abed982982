"""The report agrees with the records, escapes all text in them, and stays small for long runs."""

import dataclasses
import json
import math
from itertools import pairwise

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from ftexp.cli.compose import to_config
from ftexp.config.masking import masked
from ftexp.config.schema import config_dir
from ftexp.counting import counted
from ftexp.errors import ConfigError
from ftexp.evaluation.mistakes import ClassFindings, _together, described
from ftexp.report.page import Report
from ftexp.report.series import Axis, Series, duration
from ftexp.report.source import read_run
from ftexp.report.tables import stragglers
from ftexp.report.timeline import PHASES, build_timeline
from ftexp.report.write import write_report
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import RunState, read_state
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.messages import Happened, Hello, Lost, Metrics, Ready, Tick
from tests.support.pages import HOSTILE, Page, assert_only_text

SCORE = ("val_accuracy", "max")


class Story:
    """Writes the records of a run through RunRecord, with its own clock."""

    def __init__(self, storage, name="told", now=1_700_000_000.0, state=None):
        self.storage, self.now = storage, now
        self.record = RunRecord(
            storage, state or RunState(name=name, started=now), SCORE, lambda: self.now, steady=lambda: self.now
        )
        self.record.event(events.CommandStarted())

    def after(self, seconds):
        self.now += seconds
        return self

    def attempt(self, step, workers=2):
        for rank in range(workers):
            self.tell(Hello(rank, workers, 100 + rank, "n"))
        self.after(0.5)
        if step:
            self.event(events.Restored(0, 0.1, f"step_{step:08d}.a1", step, 0, "memory"))
        hardware = {"processor": "a fast one", "memory_bytes": 2**31}
        self.tell(Ready(step, 100, "cpu", {}, 5, hardware, source="memory" if step else "start"))

    def steps(self, first, last, seconds_each=0.1, **values):
        for step in range(first, last + 1):
            self.after(seconds_each)
            self.tell(Tick(step, step // 40))
            self.point("train", step, train_loss=math.exp(-step / 50), train_accuracy=0.5, lr=1e-3, **values)

    def point(self, split, step, **values):
        self.tell(Metrics(split, step, step // 40, values))

    def save(self, step, write_s=0.25):
        name, metrics = f"step_{step:08d}.a1", {"val_accuracy": 0.5}
        self.event(events.CheckpointSaved(step, name, 3_000_000, write_s, metrics, ["epoch"], 0.004))

    def killed(self, rank=1, error="the process died"):
        self.tell(Lost(rank, 100 + rank))
        self.after(0.25)
        self.record.fail("crash", rank, error, "failure 1 of 3 allowed: restarting the workers")

    def event(self, event):
        self.tell(Happened(event))

    def tell(self, message):
        self.record.handle(dataclasses.replace(message, time=self.now))

    def end(self, status="finished", error=None):
        self.record.close(status, error)


def write_config(storage, *overrides):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = to_config(compose("config", overrides=list(overrides)))
    storage.write_bytes("config.yaml", OmegaConf.to_yaml(OmegaConf.create(masked(config))).encode())
    storage.write_bytes("overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(list(overrides))).encode())


def three_kills(storage):
    story = Story(storage)
    story.after(3).attempt(0)
    story.steps(1, 50)
    story.save(40)
    for number, lost in enumerate((7, 12, 3)):
        story.killed()
        story.after(2 + number).attempt(story.record.state.step - lost)
        story.steps(story.record.state.step + 1, story.record.state.step + 50)
    story.point("val", story.record.state.step, val_loss=0.3, val_accuracy=0.9)
    story.after(1.5).point("test", story.record.state.step, test_loss=0.3, test_accuracy=0.9)
    story.after(0.5).end()
    write_config(storage, "failure.max_failures=5")
    return story


EVALUATION = {
    "run": "r", "checkpoint": None, "step": 158, "epoch": 3, "split": "test", "num_samples": 4, "accuracy": 0.75,
    "loss": 0.3, "confusion": [[2, 0], [1, 1]],
    "classes": [
        {"class": "cat", "num_samples": 2, "recall": 1.0, "precision": 2 / 3},
        {"class": "dog", "num_samples": 2, "recall": 0.5, "precision": 1.0},
    ],
    "mistakes": [{"label": "dog", "prediction": "cat", "confidence": 0.987, "png": "aGVsbG8="}],
}  # fmt: skip


@pytest.fixture
def storage(tmp_path):
    return Storage.at(str(tmp_path / "run"))


def test_the_timeline_of_three_kills_has_the_durations_that_the_records_have(storage):
    story = three_kills(storage)
    timeline = build_timeline(read_run(storage))
    failures = read_state(storage).failures
    assert len(timeline.interruptions) == len(failures) == 3
    for told, failure, replay_s in zip(timeline.interruptions, failures, (0.8, 1.3, 0.4), strict=True):
        assert told.step == failure.step
        assert told.seconds == pytest.approx(
            {
                "detecting": failure.seconds_to_detect,
                "restarting": failure.seconds_to_restart,
                "restoring": failure.seconds_to_restore,
                "replaying": replay_s,  # up to the end of the first new step
            },
            abs=1e-3,
        )
        assert told.steps_replayed == failure.steps_replayed
        assert told.restored == f"step_{failure.step - failure.steps_replayed:08d}.a1"
        assert told.recovery == failure.recovery == "memory"
    sums = timeline.seconds_by_phase()
    assert sums["starting"] == pytest.approx(3)
    assert sums["ending"] == pytest.approx(2)
    # every second belongs to one phase, and goodput counts the time of new steps
    assert sum(sums.values()) == pytest.approx(timeline.total_s) == pytest.approx(read_state(storage).seconds)
    assert timeline.total_s == pytest.approx(story.now - 1_700_000_000)
    assert all(one.end == two.begin for one, two in pairwise(timeline.segments))
    # the first new step after a replay is part of the replay in the timeline, but a new step for goodput
    assert read_state(storage).productive_s == pytest.approx(sums["training"] + 3 * 0.1, abs=0.01)


def test_a_driver_that_was_killed_is_an_interruption_and_the_night_after_it_is_left_out(storage):
    first = Story(storage)
    first.after(2).attempt(0)
    first.steps(1, 60)
    first.record.write()  # then the driver was killed
    again = Story(storage, now=first.now + 8 * 3600, state=read_state(storage))
    again.after(4).attempt(40)
    again.steps(41, 80)
    again.end()
    timeline = build_timeline(read_run(storage))
    (told,) = timeline.interruptions
    assert (told.cause, told.step, told.steps_replayed) == ("driver died", 60, 20)
    assert told.seconds == pytest.approx({"starting": 4, "restoring": 0.5, "replaying": 2.1})
    assert timeline.total_s == pytest.approx((2 + 0.5 + 6) + (4 + 0.5 + 4))
    assert timeline.running_s(again.now) == pytest.approx(timeline.total_s)
    write_config(storage)
    assert "2 invocations; the time between them is not shown" in Report(read_run(storage)).html()


def test_what_comes_after_a_run_was_finished_is_not_charged_to_a_failure_that_was_over(storage):
    story = three_kills(storage)
    story.record.late_event(events.ReportFailed("x"))
    before = [one.seconds for one in build_timeline(read_run(storage)).interruptions]
    again = Story(storage, now=story.now + 60, state=read_state(storage))
    again.after(9).attempt(again.record.state.step)
    again.steps(again.record.state.step + 1, again.record.state.step + 20)
    again.end("failed")
    timeline = build_timeline(read_run(storage))
    assert [one.seconds for one in timeline.interruptions] == before
    assert timeline.seconds_by_phase()["starting"] == pytest.approx(3 + 9)


def test_the_page_shows_what_the_records_hold_and_loads_nothing(storage):
    three_kills(storage)
    storage.write_bytes("evaluation_test.json", json.dumps(EVALUATION).encode())
    assert write_report(storage) == f"{storage.uri}/report.html"
    page = Page(storage.read_bytes("report.html").decode())
    state = read_state(storage)
    for part in (
        "finished", "0.9000", f"{state.goodput:.1%}", "crash of rank 1", "250 ms", "step_00000040.a1", "removed",
        "dog predicted as cat", "confidence 98.7%", "failure.max_failures 5 3",
        "python -m ftexp.train failure.max_failures=5", "a fast one", "2.0 GiB",
    ):  # fmt: skip
        assert part in page.text, part
    assert not page.tags["script"] + page.tags["link"]
    assert page.tags["table"] == page.tags["caption"] > 4
    assert ("img", "alt", "A sample of class dog") in page.attributes
    assert [value for _, name, value in page.attributes if name in ("src", "href")] == [
        "data:image/png;base64,aGVsbG8="
    ]
    for chart in ("loss", "accuracy", "throughput", "learning_rate", "timeline", "confusion"):
        with Image.open(f"{storage.uri}/charts/{chart}.png") as picture:
            assert picture.width > 400


def test_a_test_without_mistakes_has_no_empty_table(storage):
    three_kills(storage)
    for number, text in ((3, "class predicted as samples share of the class"), (0, "None: every sample is right.")):
        found = {**EVALUATION, "confusion": [[7, 0], [number, 7]]}
        storage.write_bytes("evaluation_test.json", json.dumps(found).encode())
        page = Page(Report(read_run(storage)).html()).text
        assert ("None: every sample is right." in page) == (number == 0)
        assert text in page


def test_a_run_of_one_attempt_and_one_epoch_is_counted_in_the_singular(storage):
    story = Story(storage)
    story.after(1).attempt(0)
    story.steps(1, 20)
    story.end("finished")
    text = Page(Report(read_run(storage)).html()).text
    assert "1 attempt " in text
    assert "attempts" not in text
    assert [counted(number, "epoch") for number in (0, 1, 1200)] == ["0 epochs", "1 epoch", "1,200 epochs"]
    assert [counted(number, "class") for number in (1, 10)] == ["1 class", "10 classes"]


def test_the_page_shows_ranks_that_stayed_slow_and_until_when(storage):
    story = Story(storage)
    story.after(1).attempt(0)
    ranks = {"rank_ms_min": 40.0, "rank_ms_median": 40.0, "rank_ms_max": 100.0, "slowest_rank": 1}
    story.steps(1, 20, **ranks)
    slow = events.Straggler(1, "feed", 2.5, 101.5, 40.0, 20, "n2")
    for end in (None, events.StragglerOver(0, 30), events.StragglerOver(1, 40)):
        story.event(slow if end is None else end)
        story.after(1).steps(story.record.state.step + 1, story.record.state.step + 10)
    story.event(dataclasses.replace(slow, rank=0, node="n1"))
    story.end("finished", "")
    assert [(event["rank"], over) for event, over in stragglers(read_run(storage))] == [(1, 40), (0, None)]
    write_report(storage)
    page = Page(storage.read_bytes("report.html").decode())
    assert "20 1 n2 feed 101.5 ms 40.0 ms 2.5 40" in page.text
    with Image.open(f"{storage.uri}/charts/rank_time.png") as picture:
        assert picture.width > 400


def test_the_page_shows_other_metrics_and_why_a_run_stopped_early(storage):
    write_config(storage, "train.metrics=[auroc,top5]")
    run = Story(storage)
    run.attempt(0)
    run.point("val", 4, val_loss=1.0, val_auroc=0.75)
    run.point("val", 8, val_loss=1.1, val_auroc=0.76)
    run.event(events.StoppedEarly(8, 2, "val_loss has not improved", {}))
    run.end()
    evaluation = {**EVALUATION, "metrics": {"auroc": 0.71234, "top5": None}}
    storage.write_bytes("evaluation_test.json", json.dumps(evaluation).encode())
    write_report(storage)
    page = Page(storage.read_bytes("report.html").decode())
    assert "stopped early epoch 2 val_loss has not improved" in page.text
    assert "auroc 0.7123, top5 ." in page.text
    directory = storage.child("charts")
    assert directory.exists("auroc.png")
    assert not directory.exists("top5.png")


def test_the_curves_mark_failures_where_they_were_and_shade_every_other_attempt(storage):
    three_kills(storage)
    drawing = Report(read_run(storage)).charts["loss"]
    steps = [failure.step for failure in read_state(storage).failures]
    titles = [
        shape.title for shape in drawing.shapes if getattr(shape, "role", "") == "fault" and hasattr(shape, "title")
    ]
    assert [title for title in titles if title] == [f"crash after step {step}" for step in steps]
    shades = [shape for shape in drawing.shapes if getattr(shape, "role", "") == "shade"]
    assert len(shades) == 2  # every second of four attempts
    dashed = [shape.points[0][0] for shape in drawing.shapes if getattr(shape, "dashed", False)]
    assert [shade.x for shade in shades] == pytest.approx(dashed[::2])


def test_whatever_comes_from_a_run_is_only_text(storage):
    calm = Page(_hostile_page(storage.child("calm"), ["x" * len(text) for text in HOSTILE]))
    page = Page(_hostile_page(storage.child("wild"), HOSTILE))
    assert_only_text(page, calm, at_least=8)


def _hostile_page(storage, texts):
    evil = iter(texts * 100)
    story = Story(storage, name=texts[0])
    story.after(1).attempt(0)
    story.steps(1, 20)
    for text in texts:
        story.event(events.CheckpointRejected(f"step_00000040.a1{text}", text))
        story.event(events.CheckpointSaved(9, f"step_00000040.a1{text}", 1, 0, {}, [], 0))
        story.event(events.CheckpointFailed(9, text))
        story.event(events.Straggler(1, text, 2.0, 80.0, 40.0, 9, text))
        story.tell(Lost(0, 100))
        story.record.fail(text, 0, text, text)
        story.after(1).attempt(story.record.state.step)
        story.steps(story.record.state.step + 1, story.record.state.step + 20)
    state = story.record.state
    state.data = {"name": next(evil)}
    state.versions = {text + str(number): text for number, text in enumerate(texts)}
    state.hardware = {text + str(number): text for number, text in enumerate(texts)}
    story.end("failed", "".join(texts))
    config = {"run": {"name": "".join(texts)}, "model": {"name": next(evil)}, "plugins": texts}
    storage.write_bytes("config.yaml", json.dumps(config).encode())
    storage.write_bytes("overrides.yaml", json.dumps(texts).encode())
    number = len(texts)
    evaluation = {
        **EVALUATION, "confusion": [[1] * number] * number,
        "checkpoint": texts[0], "split": texts[1],
        "classes": [{"class": text, "num_samples": 6, "recall": 0.1, "precision": None} for text in texts],
        "mistakes": [{"label": text, "prediction": text, "confidence": 0.5, "png": text} for text in texts],
    }  # fmt: skip
    storage.write_bytes("evaluation_test.json", json.dumps(evaluation).encode())
    write_report(storage)
    return storage.read_bytes("report.html").decode()


def test_a_run_of_100_000_steps_and_300_failures_gives_a_small_page(storage):
    text, (points, events) = long_run(300)
    storage.write_bytes("run.json", json.dumps(text).encode())
    storage.write_bytes("metrics.jsonl", points)
    storage.write_bytes("events.jsonl", events)
    write_config(storage)
    write_report(storage)
    size = len(storage.read_bytes("report.html"))
    page = Page(storage.read_bytes("report.html").decode())
    assert size < 1_500_000
    assert page.tags["polyline"] + page.tags["rect"] + page.tags["polygon"] < 6000
    assert "failures 300" in page.text
    assert "… 100 more …" in page.text


def long_run(failures):
    """Return run.json and the lines of metrics.jsonl, one per step, and events.jsonl; faster than with `Story`."""
    steps, points, events = 100_000, [], []
    now, failure_every = 0.0, steps // (failures + 1)
    events.append({"event": "command_started", "time": now, "step": 0})
    events.append({"event": "attempt_started", "time": now + 3, "step": 0})
    events.append({"event": "ready", "time": now + 4, "step": 0, "device": "cpu"})
    now = 4.0
    for step in range(1, steps + 1):
        now += 0.05
        values = {"train_loss": 1 / step + (50 if step == 70_003 else 0), "train_accuracy": 0.9, "lr": 1e-3}
        points.append({"time": now, "split": "train", "step": step, "epoch": 0, **values})
        if step % 100 == 0:
            saved = {"checkpoint": f"step_{step:08d}.a1", "bytes": 1, "blocked_s": 0.1, "write_s": 0.1}
            events.append({"event": "checkpoint_saved", "time": now, "step": step, **saved})
            points.append({"time": now, "split": "val", "step": step, "epoch": 0, "val_loss": 1.0})
        if step % failure_every == 0 and step <= failures * failure_every:
            fields = {"cause": "crash", "rank": 1, "error": "died", "decision": "again", "seconds_to_detect": 0.2}
            events.append({"event": "failure", "time": now + 0.2, "step": step, **fields})
            events.append({"event": "attempt_started", "time": now + 2, "step": step})
            events.append({"event": "ready", "time": now + 3, "step": step - 5, "device": "cpu"})
            events.append({"event": "caught_up", "time": now + 3.2, "step": step})
            now += 3.2
    events.append({"event": "finished", "time": now, "step": steps})
    state = {**dataclasses.asdict(RunState(name="long")), "failures": [{}] * failures, "status": "finished"}
    return state, (b"".join(json.dumps(line).encode() + b"\n" for line in lines) for lines in (points, events))


def test_a_thinned_out_curve_keeps_its_spikes_and_its_ends():
    ys = [1.0] * 100_000
    ys[70_003], ys[31] = 50.0, -3.0
    buckets = Series("loss", "train", [(float(x), y) for x, y in enumerate(ys)]).buckets(400)
    assert len(buckets) == 400
    (high,), (low,) = ([b for b in buckets if b.high == 50], [b for b in buckets if b.low == -3])
    assert abs(high.x - 70_003) < 250
    assert abs(low.x - 31) < 250
    assert sum(bucket.mean for bucket in buckets) == pytest.approx(400, rel=0.01)
    few = Series("loss", "train", [(1.0, 2.0), (5.0, 3.0)]).buckets(400)
    assert [(b.x, b.low, b.mean, b.high) for b in few] == [(1, 2, 2, 2), (5, 3, 3, 3)]


@pytest.mark.parametrize(
    "values", [[0.0], [1e-9, 1e-9], [-5.0, 3.0], [0, 1e9], [1e-6, 1e3], [0.97, 0.98], [2.0, 2.0001]]
)
@pytest.mark.parametrize("log", [False, True])
def test_an_axis_has_a_few_round_numbers_and_room_for_every_value(values, log):
    axis = Axis.over(values, log)
    assert all(-1e-9 <= axis.at(value) <= 1 + 1e-9 for value in values)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 13
    assert ticks == sorted(set(ticks))


def test_durations_are_read_at_a_glance():
    seconds = (0.0, 0.785, 43.14, 99.99, 723, 7200, 19_230)
    assert [duration(one) for one in seconds] == [
        "0 ms", "785 ms", "43.1 s", "100.0 s", "12 min 3 s", "2 h", "5 h 20 min",
    ]  # fmt: skip


def test_without_a_test_the_page_says_how_to_get_one(storage):
    story = Story(storage)
    story.after(1).attempt(0)
    story.steps(1, 5)
    story.killed(error="boom")
    story.end("failed", "boom: spent")
    write_config(storage)
    page = Page(Report(read_run(storage)).html())
    assert f"python -m ftexp.evaluate run={storage.uri}" in page.text
    assert "boom: spent" in page.text
    assert {one.phase for one in build_timeline(read_run(storage)).segments} <= PHASES.keys()


def test_a_run_that_has_just_begun_and_a_torn_record_give_a_page_too(storage):
    Story(storage).record.write()
    write_config(storage)
    assert "running" in Page(Report(read_run(storage)).html()).text
    path = storage.local_path / "events.jsonl"
    path.write_text(path.read_text() + '{"time": 3, "eve')
    storage.write_bytes("evaluation_test.json", b'{"torn')
    assert "running" in Page(Report(read_run(storage)).html()).text


def test_a_report_goes_to_an_object_store_and_from_there(memory):
    storage = Storage.at(memory)
    three_kills(storage)
    assert write_report(storage) == f"{memory}/report.html"
    assert b"<h1>told" in storage.read_bytes("report.html")
    assert storage.child("charts").read_bytes("loss.png").startswith(b"\x89PNG")


def test_where_there_is_no_run_the_command_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run\.json: give the directory of a run"):
        read_run(Storage.at(str(tmp_path)))


def test_a_report_that_fails_is_an_event_and_a_line_and_no_more(storage, monkeypatch, capsys):
    from ftexp.driver.session import _leave_report
    from ftexp.driver.terminal import Terminal

    story = three_kills(storage)
    monkeypatch.setattr("ftexp.report.write.read_run", lambda run_dir: 1 / 0)
    _leave_report(story.record, Terminal())
    assert "! the report can't be written: ZeroDivisionError" in capsys.readouterr().out
    last = json.loads(storage.read_bytes("events.jsonl").splitlines()[-1])
    assert (last["event"], last["error"]) == ("report_failed", "ZeroDivisionError: division by zero")
    assert read_state(storage).status == "finished"


def found_on(parts, num_classes=3):
    """Return the findings over all ranks; each rank has one part (images, labels, logits)."""
    together = []
    for images, labels, logits in parts:
        findings = ClassFindings(num_classes, lambda chosen: chosen.mul(255).byte().permute(0, 2, 3, 1).numpy())
        for start in range(0, len(labels), 7):
            rows = slice(start, start + 7)
            findings.add(images[rows], labels[rows], logits[rows])
        together.append(findings.gathered())
    return _together(together)


@pytest.mark.parametrize("cuts", [(40, 80), (1, 99), (0, 100)])
def test_every_sample_is_counted_once_however_many_ranks_share_the_split(cuts):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(100, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 3, (100,), generator=generator)
    logits = torch.randn(100, 3, generator=generator).round()  # so that some confidences are equal
    whole = described(found_on([(images, labels, logits)]), ["a", "b", "c"])
    bounds = [0, *cuts, 100]
    pieces = [tuple(t[a:b] for t in (images, labels, logits)) for a, b in pairwise(bounds)]
    assert described(found_on(pieces), ["a", "b", "c"]) == whole
    assert whole["num_samples"] == 100
    predictions = logits.argmax(1)
    for label in range(3):
        for guess in range(3):
            assert whole["confusion"][label][guess] == int(((labels == label) & (predictions == guess)).sum())
    sure = [mistake["confidence"] for mistake in whole["mistakes"]]
    wrong = logits.softmax(1).max(1).values[predictions != labels].sort(descending=True).values
    assert sure == wrong[:24].tolist()
    assert all(mistake["label"] != mistake["prediction"] for mistake in whole["mistakes"])
    assert whole["classes"][0]["recall"] == whole["confusion"][0][0] / sum(whole["confusion"][0])
