"""tracker=prometheus: the figures of a run, its endpoint, the copies in Ray's metrics, and the dashboard."""

import re
import socket
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ftexp.config.schema import CAUSES, Config
from ftexp.config.tracker_schema import PrometheusConfig
from ftexp.data.feeds.decoding import PARTS
from ftexp.job.stopwatch import SECTIONS, TEACHER
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import RunState, read_state
from ftexp.storage.directory import Storage
from ftexp.trackers.dashboard import PANELS, dashboard
from ftexp.trackers.figures import RunFigures
from ftexp.trackers.prometheus import PrometheusTracker
from ftexp.trackers.registry import Outcome, trackers
from ftexp.trackers.run import tracked_run
from ftexp.trackers.series import RUN_LABELS, SAMPLE_PARTS, SERIES, STEP_PARTS
from ftexp.wire import events
from ftexp.wire.messages import Happened, Hello, Metrics, Ready, Tick

DONE = Outcome(status="finished")
SAVED = events.CheckpointSaved(40, "step_00000040.a1", 1234, 0.5, {}, ["epoch"], 0.25)
RANKS = {"rank_ms_min": 40.0, "rank_ms_median": 40.0, "rank_ms_max": 100.0, "slowest_rank": 1}
POINT = {
    "train_loss": 0.5,
    "images_per_s": 640.0,
    "feed_ms": 2.5,
    "decode_ms": 1.5,
    "feed_queue": 1.75,
    "mfu": 0.3,
    **RANKS,
}


@pytest.fixture
def clock():
    return SimpleNamespace(now=1000.0)


@pytest.fixture
def record(tmp_path, clock):
    return opened(tmp_path, clock)


def opened(tmp_path, clock):
    directory = Storage.at(str(tmp_path / "first"))
    state = RunState(name="first") if not (tmp_path / "first" / "run.json").exists() else read_state(directory)
    return RunRecord(directory, state, ("val_accuracy", "max"), clock=lambda: clock.now, steady=lambda: clock.now)


def figures_of(record):
    return RunFigures(record, "vit", "digits", "/runs/first")


def trained(record, clock):
    """Record a crash after step 50, detected after 1 s, a restart of 2 s and a restore of 3 s to step 40."""
    record.handle(Hello(0, 2, 11, "node"))
    record.handle(Ready(0, 100, "cpu", {}, 5))
    clock.now += 10
    record.handle(Metrics("train", 40, 1, POINT))
    record.handle(Happened(SAVED, time=clock.now))
    record.handle(Happened(events.CheckpointFailed(45, "disk full"), time=clock.now))
    clock.now += 10
    record.handle(Tick(50, 1))
    record.clock.process_ended(clock.now)
    clock.now += 1
    record.fail("crash", 1, "gone")
    clock.now += 2
    record.handle(Hello(0, 2, 12, "node"))
    clock.now += 3
    record.handle(Ready(40, 100, "cpu", {}, 5))
    record.handle(Happened(events.Straggler(1, "feed", 2.5, 100.0, 40.0, 50, "n2"), time=clock.now))
    clock.now += 4


def values(figures):
    return {(each.series.name, *each.labels): each.value for each in figures()}


def test_figures_are_what_the_records_say(record, clock):
    figures = figures_of(record)
    assert ("ftexp_checkpoint_age_seconds",) not in values(figures)
    trained(record, clock)
    found = values(figures)
    assert {key: value for key, value in found.items() if key[0] == "ftexp_failures_total"} == {
        ("ftexp_failures_total", cause): cause == "crash" for cause in CAUSES
    }
    assert {key: value for key, value in found.items() if key[0] != "ftexp_failures_total"} == {
        ("ftexp_run_info", "vit", "digits", "/runs/first"): 1,
        ("ftexp_workers",): 2,
        ("ftexp_attempts_total",): 2,
        ("ftexp_step",): 40,
        ("ftexp_epoch",): 1,
        ("ftexp_metric", "train_loss"): 0.5,
        ("ftexp_images_per_second",): 640,
        ("ftexp_mfu_ratio",): 0.3,
        ("ftexp_step_part_seconds", "feed"): 0.0025,
        ("ftexp_sample_part_seconds", "decode"): 0.0015,
        ("ftexp_feed_queue_batches",): 1.75,
        ("ftexp_rank_step_seconds", "min"): 0.04,
        ("ftexp_rank_step_seconds", "median"): 0.04,
        ("ftexp_rank_step_seconds", "max"): 0.1,
        ("ftexp_slowest_rank",): 1,
        ("ftexp_straggler_ratio", "1", "n2", "feed"): 2.5,
        ("ftexp_goodput_ratio",): round(20 / 30, 4),
        ("ftexp_replayed_steps_total",): 10,
        ("ftexp_restart_seconds_total",): 6,
        ("ftexp_checkpoint_age_seconds",): 20,
        ("ftexp_checkpoint_bytes",): 1234,
        ("ftexp_checkpoint_step",): 40,
        ("ftexp_saves_total",): 1,
        ("ftexp_failed_saves_total",): 1,
        ("ftexp_save_blocked_seconds",): 0.25,
        ("ftexp_save_blocked_seconds_total",): 0.25,
        ("ftexp_heartbeat_age_seconds",): 4,
    }
    assert {name for name, *_ in found} == {series.name for series in SERIES}


def test_counters_go_on_where_an_earlier_invocation_ended(record, clock, tmp_path):
    figures = figures_of(record)
    trained(record, clock)
    before = values(figures)
    record.close("interrupted")
    again = values(figures_of(opened(tmp_path, clock)))
    # this invocation has its own clock and no messages from workers yet
    own = ("ftexp_heartbeat_age_seconds", "ftexp_straggler_ratio")
    assert {key: value for key, value in before.items() if key[0] not in own} == again


def test_a_straggler_is_0_once_it_is_none_any_more_or_its_group_has_ended(record, clock):
    figures = figures_of(record)
    trained(record, clock)
    for end in (Happened(events.StragglerOver(1, 60, "n2")), Hello(0, 2, 13, "node")):
        record.handle(end)
        assert values(figures)["ftexp_straggler_ratio", "1", "n2", "feed"] == 0
        record.handle(Happened(events.Straggler(1, "feed", 3.0, 120.0, 40.0, 50, "n2")))
        assert values(figures)["ftexp_straggler_ratio", "1", "n2", "feed"] == 3.0


def test_a_value_that_is_not_finite_is_left_out(record):
    record.handle(Metrics("train", 1, 0, {"train_loss": float("nan"), "lr": 0.1}))
    assert [key[1] for key in values(figures_of(record)) if key[0] == "ftexp_metric"] == ["lr"]


def test_parts_are_those_that_are_timed():
    assert ((*SECTIONS, TEACHER), PARTS) == (STEP_PARTS, SAMPLE_PARTS)


def tracked(record, address=None, **settings):
    config = Config()
    config.tracker.prometheus = PrometheusConfig(**settings)
    config.scaling.address = address
    run = tracked_run(config, record.storage, "first", 1e9, figures=figures_of(record))
    return PrometheusTracker(config.tracker, run)


def scraped(url):
    """Scrape `url`; return ({sample's name: type}, {(sample's name, its labels): value})."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    types = {sample.name: family.type for family in families for sample in family.samples}
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value for each in families for sample in each.samples
    }
    return types, found


def test_the_endpoint_answers_in_prometheus_text_format_and_ends_with_the_tracker(record, clock):
    tracker = tracked(record)
    trained(record, clock)
    types, found = scraped(tracker.where)
    own = {series.name: dict.fromkeys(series.labels) for series in SERIES}
    assert types == {name: "counter" if name.endswith("_total") else "gauge" for name in own}
    for name, labels in found:
        assert dict(labels).keys() == {*RUN_LABELS, *own[name]}
    crashes = frozenset({"run": "first", "sweep": "", "cause": "crash"}.items())
    assert found["ftexp_failures_total", crashes] == 1
    tracker.close(DONE)
    with pytest.raises(urllib.error.URLError):
        scraped(tracker.where)


def test_a_port_that_is_taken_is_stepped_over(record, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        tracker = tracked(record, port=port)
        assert int(re.findall(r":(\d+)/", tracker.where)[0]) > port
        tracker.close(DONE)
        monkeypatch.setattr("ftexp.trackers.prometheus._MAX_PORTS", 1)
        with pytest.raises(OSError, match=f"ports {port} to {port} of 127.0.0.1 are taken: set tracker.prom"):
            tracked(record, port=port)


def test_on_a_cluster_rays_metrics_get_each_gauge_and_what_each_counter_has_grown_by(record, clock, monkeypatch):
    given = []

    def kind(word):
        def make(name, description, tag_keys):
            def take(value, tags):
                assert tags.keys() == {*tag_keys}
                given.append((word, name, tuple(tags[key] for key in tag_keys), value))

            return SimpleNamespace(**{word: take})

        return make

    monkeypatch.setattr("ray.util.metrics.Counter", kind("inc"))
    monkeypatch.setattr("ray.util.metrics.Gauge", kind("set"))
    tracker = tracked(record, address="auto")
    assert ("set", "ftexp_step", ("first", ""), 0) in given
    assert not [each for each in given if each[0] == "inc"]
    trained(record, clock)
    for _ in range(2):  # a counter that has not grown is not incremented again
        tracker._exporter._update()
    assert [each for each in given if each[1] == "ftexp_failures_total"] == [
        ("inc", "ftexp_failures_total", ("first", "", "crash"), 1)
    ]
    assert ("set", "ftexp_checkpoint_bytes", ("first", ""), 1234) in given
    tracker.close(DONE)


def test_how_it_exports_follows_the_address_unless_it_is_set():
    assert [PrometheusConfig().exporter(address) for address in (None, "auto")] == ["http", "ray"]
    assert PrometheusConfig(export="http").exporter("auto") == "http"
    assert not trackers.get("prometheus").keeps


def test_the_dashboard_asks_for_every_series_and_for_no_other():
    queries = [query for panel in PANELS for query in panel.queries]
    asked = {name for query in queries for name in re.findall(r'\(ray_\)\?(\w+)"', query.expression)}
    assert asked == {series.name for series in SERIES}
    for query in queries:
        name = re.findall(r'\(ray_\)\?(\w+)"', query.expression)[0]
        (series,) = (each for each in SERIES if each.name == name)
        grouped = set(re.findall(r"by \(([^)]*)\)", query.expression)[0].split(", "))
        assert grouped <= {*RUN_LABELS, *series.labels}
        assert {*re.findall(r"{{(\w+)}}", query.legend)} <= grouped
        assert {*series.labels} <= grouped


def test_the_dashboards_panels_lie_side_by_side_and_do_not_overlap():
    cells = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in dashboard()["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
