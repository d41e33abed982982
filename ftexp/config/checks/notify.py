"""Checks of the alert settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from urllib.parse import urlsplit

from ftexp.config.checks.wording import unknown, unused
from ftexp.config.masking import without_path
from ftexp.config.schema import ALERTS, HTTP_SCHEMES, Config

_NEEDS_URLS = ("alerts", "max_recoveries", "no_progress_s", "timeout_s")


def check_notify(config: Config) -> Iterator[str]:
    """Check the URLs, which messages never show in full, and the names of alerts."""
    notify = config.notify
    for number, url in enumerate(notify.urls):
        yield from _url_problem(f"notify.urls[{number}]", url)
    for alert in notify.alerts:
        if alert not in ALERTS:
            yield unknown("notify.alerts", alert, frozenset(ALERTS), f"Available: {', '.join(ALERTS)}")
    if not notify.urls:
        yield from unused(notify, "notify", _NEEDS_URLS, "is not used without notify.urls")


def _url_problem(key: str, url: str) -> Iterator[str]:
    scheme, is_url, rest = url.partition("://")
    if not is_url or not scheme or not rest:
        yield f"{key} is not a URL: write https://<host>/<path> for a JSON POST, or an apprise URL"
    elif scheme.lower() in HTTP_SCHEMES:
        if not urlsplit(url).hostname:
            yield f"{key}={without_path(url)} has no host: write {scheme}://<host>/<path>"
    elif importlib.util.find_spec("apprise") is None:
        yield (
            f"{key}={without_path(url)} needs the package apprise, which isn't installed: write uv run --extra apprise "
            "in front of the command, or pip install 'ftexp[apprise]'; http:// and https:// need none"
        )
