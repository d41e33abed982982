"""Masking of secrets in configs, before they are logged or written to files."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

_SECRET = re.compile(r"(secret|password|passwd|token|api_?key|access_?key|credential)", re.IGNORECASE)

_URI_USER = re.compile(r"(?<=://)[^/\s]+(?=@)")

_URI_OPTION = re.compile(rf"({_SECRET.pattern}\w*=)[^&\s]+", re.IGNORECASE)

# an override of notify.urls, whose URLs are secret as a whole
_OF_SECRET_URLS = re.compile(r"^\+*notify\.urls\b")
_SECRET_URLS_KEY = "urls"
_URL = re.compile(r"\w+://[^\s,\]\"']+")

_MASK = "***"


def masked(value: Any) -> Any:
    """Return a copy of a config, dict or list with secrets replaced by ***."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return masked(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _masked_under(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item) for item in value]
    return _masked_text(value) if isinstance(value, str) else value


def without_path(url: str) -> str:
    """Return the part of an alert URL that isn't secret: the scheme and, for http, the host."""
    scheme, _, rest = url.partition("://")
    host = re.split(r"[/?#]", rest)[0].rpartition("@")[2] if scheme.lower() in ("http", "https") else ""
    return f"{scheme}://{host}{'/' if host else ''}{_MASK}"


def _masked_text(text: str) -> str:
    if _OF_SECRET_URLS.match(text):  # an override
        return _URL.sub(lambda found: without_path(found.group()), text)
    return _URI_OPTION.sub(rf"\1{_MASK}", _URI_USER.sub(_MASK, text))


def _masked_under(key: str, value: Any) -> Any:
    if _SECRET.search(key):
        return _without_text(value)
    if key == _SECRET_URLS_KEY and isinstance(value, (list, tuple)):
        return [without_path(url) if isinstance(url, str) else url for url in value]
    return masked(value)


def _without_text(value: Any) -> Any:
    """Return a copy with every string masked; numbers stay, since class_token=1 or reg_tokens=4 are not secret."""
    if isinstance(value, dict):
        return {key: _without_text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_text(item) for item in value]
    return _MASK if isinstance(value, str) else value


def flat(values: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """Return (dotted key, value) for all nested keys; each key starts with `prefix`."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
