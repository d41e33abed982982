"""Alerts: their conditions, and their delivery: once, from a thread, without their URL in any file."""

import dataclasses
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from ftexp.config.fingerprint import fingerprint
from ftexp.config.masking import masked, without_path
from ftexp.config.schema import ALERTS, Config, NotifyConfig
from ftexp.driver.alerts.mailbox import Mailbox
from ftexp.driver.alerts.rules import Rules
from ftexp.driver.alerts.watch import Alerts
from ftexp.rundir.names import EVENTS_FILE
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import Failure, RunState
from ftexp.storage.append_log import read_lines
from ftexp.storage.directory import Storage
from ftexp.wire import events
from tests.support.hooks import AlertServer

READY = events.Ready("cpu", [1, 2])
SLOW = events.Straggler(1, "feed", 2.0, 80.0, 40.0, 50, "n2")
PATIENCE_S = 20.0


def failed(cause="crash", over=True):
    return Failure(attempt=1, cause=cause, rank=0, step=5, error="gone", steps_replayed=1 if over else None)


def rules(state=None, now=0.0, **settings):
    return Rules(NotifyConfig(**settings), state or RunState(name="first"), now)


def kind(alert):
    return alert and alert.kind


def test_a_runs_end_is_an_alert_unless_somebody_stopped_it():
    gave_up = rules(RunState(name="first", step=7)).after(events.Failed("rank 1: no"))
    assert (gave_up.kind, gave_up.text) == ("gave_up", "gave up at step 7: rank 1: no")
    state = RunState(name="first", step=9, metrics={"last": {"val_loss": 0.5, "lr": None}, "best": {}})
    finished = rules(state).after(events.Finished())
    assert (finished.kind, finished.details) == ("finished", {"metrics": {"val_loss": 0.5}})
    assert rules().after(events.Interrupted()) is None


def test_only_the_first_recovery_beyond_the_limit_is_an_alert():
    state = RunState(name="first")
    watched = rules(state, max_recoveries=1)
    assert watched.after(READY) is None  # the start of the run
    found = []
    for cause in ("crash", "hang", "crash"):
        state.failures.append(failed(cause))
        found.append(watched.after(READY))
    assert [kind(alert) for alert in found] == [None, "recoveries", None]
    assert found[1].text == "recovered 2 times, more than notify.max_recoveries=1: crash, hang"
    assert rules(state, max_recoveries=1).after(READY) is None  # failures of another invocation
    assert rules(RunState(name="a", failures=[failed()]), max_recoveries=None).after(READY) is None


def test_a_group_that_starts_without_a_failure_recovers_from_nothing():
    state = RunState(name="first", failures=[failed(), failed(over=False)])
    assert rules(state, max_recoveries=0).after(READY) is None


def test_the_first_failed_save_of_several_in_a_row_is_an_alert():
    watched = rules()
    saved = events.CheckpointSaved(1, "step_1", 1, 0.1, {}, [], 0.1)
    told = [watched.after(event) for event in (*[events.CheckpointFailed(4, "disk full")] * 3, saved)]
    told.append(watched.after(events.CheckpointFailed(9, "disk full")))
    assert [kind(alert) for alert in told] == ["failing_saves", None, None, None, "failing_saves"]
    assert told[0].text == "the checkpoint of step 4 could not be saved: disk full"


def test_a_straggler_is_an_alert_once_for_each_rank_and_node():
    watched = rules()
    elsewhere = dataclasses.replace(SLOW, node="n3")
    told = [watched.after(event) for event in (SLOW, SLOW, events.StragglerOver(1, 60, "n2"), SLOW, elsewhere)]
    assert [kind(alert) for alert in told] == ["straggler", None, None, None, "straggler"]
    assert (told[0].details["node"], told[0].details["part"]) == ("n2", "feed")


def test_a_run_without_new_steps_is_an_alert_once_until_there_is_one():
    state = RunState(name="first", farthest_step=5)
    watched = rules(state, now=100.0, no_progress_s=10.0)
    assert watched.at(110.0) is None
    alert = watched.at(110.5)
    assert (alert.kind, alert.text) == ("no_progress", "no new step for 10 s, since step 5")
    state.step = 3  # a replayed step is no progress
    assert watched.at(200.0) is None
    state.farthest_step = 6
    assert watched.at(201.0) is None
    assert kind(watched.at(212.0)) == "no_progress"
    assert rules(state, no_progress_s=None).at(1e9) is None


@pytest.fixture
def server():
    server = AlertServer()
    yield server
    server.close()


class Told:
    """Collects the events that a mailbox reports."""

    def __init__(self):
        self.events, self._changed = [], threading.Condition()

    def __call__(self, event):
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()
        return True

    def wait_for(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= count, PATIENCE_S)
        return self.events


def test_a_server_that_refuses_is_tried_again_and_then_left(server):
    told = Told()
    mailbox = Mailbox(server.url("refuse"), 5.0, told, retry_s=(0.01, 0.01))
    mailbox.post({"alert": "finished"})
    (event,) = told.wait_for(1)
    assert (event.alert, event.to) == ("finished", f"http://{server.address}/***")
    assert event.reason == "HTTPError: HTTP Error 500: Internal Server Error"
    assert server.num_refused == 3
    assert mailbox.close(PATIENCE_S) == []


def test_a_server_that_hangs_costs_the_time_that_is_allowed(server):
    told = Told()
    mailbox = Mailbox(server.url("hang"), 0.05, told, retry_s=())
    mailbox.post({"alert": "finished"})
    (event,) = told.wait_for(1)
    assert "timed out" in event.reason
    mailbox = Mailbox(server.url("hang"), 600.0, told)
    for alert in ("failing_saves", "finished"):
        mailbox.post({"alert": alert})
    began = time.monotonic()
    late = mailbox.close(0.2)
    assert time.monotonic() - began < 5
    assert [(each.alert, each.reason) for each in late] == [
        (alert, "it has not answered in time") for alert in ("failing_saves", "finished")
    ]


def test_each_alert_is_sent_once_to_each_url_and_what_becomes_of_it_is_recorded(server, tmp_path):
    urls = [server.url(path) for path in ("hang", "refuse", "ok")]
    record = RunRecord(Storage.at(str(tmp_path / "first")), RunState(name="first"), ("val_accuracy", "max"))
    alerts, warned = Alerts(NotifyConfig(urls=urls, timeout_s=1.0, no_progress_s=0.001), look_every_s=0.01), []
    alerts.follow(record)
    record.event(events.CheckpointFailed(4, "s3://key:word@bucket is full"))
    end = time.monotonic() + PATIENCE_S
    while len(server.taken) < 2 and time.monotonic() < end:  # the alerts on the checkpoint and on no new step
        time.sleep(0.01)
    record.close("finished")
    alerts.close(warned.append)
    assert sorted(body["alert"] for body in server.taken) == ["failing_saves", "finished", "no_progress"]
    (body,) = (body for body in server.taken if body["alert"] == "failing_saves")
    assert body["text"].endswith("has a problem: the checkpoint of step 4 could not be saved: s3://***@bucket is full")
    assert (body["run"], body["run_dir"], body["step"]) == ("first", str(tmp_path / "first"), 0)
    assert len({body["id"] for body in server.taken}) == 3
    lines = read_lines(record.storage, EVENTS_FILE)
    assert sorted(line["alert"] for line in lines if line["event"] == "alert_sent") == sorted(
        ["failing_saves", "finished", "no_progress"]
    )
    assert len([line for line in lines if line["event"] == "alert_failed"]) == len(warned) == 6
    assert "very-secret" not in (tmp_path / "first" / EVENTS_FILE).read_text()


def test_alerts_that_are_not_asked_for_are_not_sent(server, tmp_path):
    record = RunRecord(Storage.at(str(tmp_path / "first")), RunState(name="first"), ("val_accuracy", "max"))
    alerts = Alerts(NotifyConfig(urls=[server.url("ok")], alerts=["gave_up"]))
    alerts.follow(record)
    record.event(events.CheckpointFailed(4, "disk full"))
    record.close("failed", "no")
    alerts.close(lambda _: None)
    assert [body["alert"] for body in server.taken] == ["gave_up"]


def test_other_urls_go_through_apprise(monkeypatch):
    sent = []

    class Apprise:
        def add(self, url):
            return url != "slack://unknown"

        def notify(self, title, body):
            sent.append((title, body))
            return body != "lost"

    monkeypatch.setitem(sys.modules, "apprise", SimpleNamespace(Apprise=Apprise))
    told = Told()
    mailboxes = [Mailbox(url, 1.0, told, retry_s=()) for url in ("slack://a/b/c", "slack://unknown")]
    mailboxes[0].post({"alert": "finished", "run": "first", "text": "done"})
    mailboxes[0].post({"alert": "finished", "run": "first", "text": "lost"})
    mailboxes[1].post({"alert": "finished", "run": "first", "text": "done"})
    told.wait_for(3)
    assert sent == [("ftexp: first", "done"), ("ftexp: first", "lost")]
    assert sorted((event.to, getattr(event, "reason", None) or "") for event in told.events) == [
        ("slack://***", ""),
        ("slack://***", "OSError: apprise could not deliver it"),
        ("slack://***", "ValueError: apprise does not know such a URL"),
    ]


def test_urls_to_notify_are_secret_wherever_configs_are_written():
    config = Config()
    config.notify.urls = ["https://hooks.example.com:8443/services/T0/secret?x=1", "mailto://me:secret@example.com"]
    shown = ["https://hooks.example.com:8443/***", "mailto://***"]
    assert masked(config)["notify"]["urls"] == shown
    words = f"notify.urls=[{','.join(config.notify.urls)}]"
    assert masked([words, "++notify.urls=['http://u:secret@h/secret']"]) == [
        f"notify.urls=[{','.join(shown)}]",
        "++notify.urls=['http://h/***']",
    ]
    assert masked(["notify.urls=[${oc.env:HOOK}]"]) == ["notify.urls=[${oc.env:HOOK}]"]
    assert without_path("http://[::1]:80/a/b") == "http://[::1]:80/***"
    assert not any(key.startswith("notify") for key in fingerprint(config))


def test_there_is_a_rule_for_every_kind_of_alert():
    told = [
        *(rules(max_recoveries=0, state=RunState(name="a", failures=[failed()])).after(READY), rules().at(1e9)),
        *map(rules().after, (events.Failed("no"), events.Finished(), events.CheckpointFailed(1, "no"), SLOW)),
    ]
    assert {alert.kind for alert in told} == {*ALERTS}
