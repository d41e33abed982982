"""Delivery of alerts to one URL, on its own thread: a server that doesn't answer delays nothing else."""

from __future__ import annotations

import base64
import json
import logging
import queue
import threading
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from ftexp.config.masking import masked, without_path
from ftexp.config.schema import HTTP_SCHEMES
from ftexp.wire.events import AlertFailed, AlertSent

_RETRY_S = (1.0, 5.0)  # pauses between tries to send an alert
_MAX_REASON_CHARS = 300

Body = dict[str, Any]
Send = Callable[[str, Body, float], None]


class Mailbox:
    """Sends alerts to `url`, each once, in order. `report` is called with the outcome of each."""

    def __init__(
        self,
        url: str,
        timeout_s: float,
        report: Callable[[AlertSent | AlertFailed], object],
        retry_s: tuple[float, ...] = _RETRY_S,
    ) -> None:
        self._url, self._timeout_s, self._report, self._retry_s = url, timeout_s, report, retry_s
        self._send = sender_of(url)
        self._waiting: queue.Queue[Body | None] = queue.Queue()
        self._pending: list[str] = []  # kinds of alerts that haven't been sent, nor failed
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="alerts-sender")
        self._thread.start()

    @property
    def to(self) -> str:
        """URL that alerts are sent to, with secrets masked."""
        return without_path(self._url)

    def post(self, body: Body) -> None:
        """Queue an alert and return at once."""
        self._pending.append(body["alert"])
        self._waiting.put(body)

    def close(self, timeout_s: float) -> list[AlertFailed]:
        """Wait until all alerts are sent, up to `timeout_s`; return an event for each that wasn't."""
        self._closing.set()
        self._waiting.put(None)
        self._thread.join(timeout_s)
        return [AlertFailed(kind, self.to, "it has not answered in time") for kind in self._pending.copy()]

    def _run(self) -> None:
        while (body := self._waiting.get()) is not None:
            problem = self._try(body)
            self._pending.pop(0)
            kind = body["alert"]
            self._report(AlertSent(kind, self.to) if problem is None else AlertFailed(kind, self.to, problem))

    def _try(self, body: Body) -> str | None:
        """Send an alert, with retries until `close` is called; return why it failed, or None."""
        for wait_s in (*self._retry_s, None):
            try:
                self._send(self._url, body, self._timeout_s)
                return None
            except Exception as error:  # whatever the server or a package raises, the run must not fail
                problem = self._without_url(f"{type(error).__name__}: {error}")
            if wait_s is None or self._closing.wait(wait_s):
                break
        return problem

    def _without_url(self, text: str) -> str:
        shown: str = masked(" ".join(text.replace(self._url, self.to).split()))
        return shown[:_MAX_REASON_CHARS]


def sender_of(url: str) -> Send:
    """Return the function that sends to URLs of this kind; it raises an exception if that fails."""
    scheme = url.partition("://")[0].lower()
    return post_json if scheme in HTTP_SCHEMES else notify_by_apprise


def post_json(url: str, body: Body, timeout_s: float) -> None:
    """POST an alert as JSON; urllib raises an exception if the status is an error."""
    url, headers = _apart(url)
    headers |= {"Content-Type": "application/json", "User-Agent": "ftexp"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        answer.read()


def _apart(url: str) -> tuple[str, dict[str, str]]:
    """Return a URL without its user and password, and the header that holds them."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    if not user:
        return url, {}
    encoded = base64.b64encode(unquote(user).encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {encoded}"}


def notify_by_apprise(url: str, body: Body, timeout_s: float) -> None:  # noqa: ARG001 - apprise has its own time limits
    """Send an alert to one of the services that apprise knows."""
    import apprise

    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # it logs URLs; errors are raised here
    sender = apprise.Apprise()
    if not sender.add(url):
        raise ValueError("apprise does not know such a URL")
    if not sender.notify(title=f"ftexp: {body['run']}", body=body["text"]):
        raise OSError("apprise could not deliver it")
