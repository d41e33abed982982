"""Sending of alerts from a run's records, on threads: it neither delays nor fails the run."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable

from ftexp.config.masking import masked
from ftexp.config.schema import NotifyConfig
from ftexp.driver.alerts.mailbox import Body, Mailbox
from ftexp.driver.alerts.rules import Alert, Rules
from ftexp.rundir.record import RunRecord
from ftexp.wire.events import AlertFailed, AlertSent, Event

_LOOK_EVERY_S = 1.0  # interval of checks for new steps


class Alerts:
    """The alerts of one invocation. `report`, once set, records an outcome; it returns False if it can't any more."""

    def __init__(self, config: NotifyConfig, look_every_s: float = _LOOK_EVERY_S) -> None:
        self._config, self._look_every_s = config, look_every_s
        self.report: Callable[[Event], bool] = lambda _: False
        self._unreported: list[AlertSent | AlertFailed] = []
        self._mailboxes = [Mailbox(url, config.timeout_s, self._report) for url in config.urls]
        self._ended = threading.Event()
        self._record: RunRecord | None = None

    def follow(self, record: RunRecord) -> None:
        """Watch the run of `record` from now on."""
        if not self._mailboxes:
            return
        self._record, rules = record, Rules(self._config, record.state, time.monotonic())
        record.observers.append(lambda event, _: self._post(rules.after(event)))
        threading.Thread(target=self._look, args=(rules,), daemon=True, name="alerts").start()

    def close(self, warn: Callable[[AlertFailed], object]) -> None:
        """Wait for unsent alerts, up to `notify.timeout_s`; record all open outcomes, and `warn` of failed alerts."""
        self._ended.set()
        end = time.monotonic() + self._config.timeout_s
        late = [failed for each in self._mailboxes for failed in each.close(max(0.0, end - time.monotonic()))]
        for event in [*self._unreported, *late]:
            if isinstance(event, AlertFailed):
                warn(event)
            if self._record is not None:
                with contextlib.suppress(OSError):
                    self._record.late_event(event)

    def _look(self, rules: Rules) -> None:
        while not self._ended.wait(self._look_every_s):
            self._post(rules.at(time.monotonic()))

    def _post(self, alert: Alert | None) -> None:
        if alert is not None and alert.kind in self._config.alerts:
            body = self._body(alert)
            for mailbox in self._mailboxes:
                mailbox.post(body)

    def _body(self, alert: Alert) -> Body:
        """Return the content of an alert. Chat services show `text` of a JSON POST."""
        assert self._record is not None, "it has alerts"
        state, run_dir = self._record.state, self._record.storage.uri
        body: Body = masked(
            {
                "text": f"ftexp: {state.name} on {socket.gethostname()} {_verb(alert)}",
                "alert": alert.kind,
                "run": state.name,
                "run_dir": run_dir,
                "step": state.step,
                "epoch": state.epoch,
                "time": time.time(),
                "id": secrets.token_hex(8),  # the same when an alert is sent again because no answer came
                "details": alert.details,
            }
        )
        return body

    def _report(self, event: AlertSent | AlertFailed) -> None:
        if not self.report(event):
            self._unreported.append(event)


def _verb(alert: Alert) -> str:
    """Return the alert's text as it follows the run's name."""
    return alert.text if alert.kind in ("gave_up", "finished", "recoveries") else f"has a problem: {alert.text}"
