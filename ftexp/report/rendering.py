"""Pages from templates, in which every value is escaped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from ftexp.report.drawing import svg
from ftexp.report.palette import DARK, LIGHT
from ftexp.report.series import duration
from ftexp.report.text import cut, decimals, digits, plain


def render(template: str, **values: Any) -> str:
    """Return a whole HTML file."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return plain(_TEMPLATES.get_template(template).render(values, light=LIGHT, dark=DARK, now=now))


def _some_duration(seconds: float) -> str:
    return duration(seconds) if seconds else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _setting(value: Any) -> str:
    texts = {None: "null", True: "true", False: "false"}
    return cut(texts[value] if value is None or isinstance(value, bool) else value, 300)


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "cut": cut,
    "decimals": decimals,
    "digits": digits,
    "duration": duration,
    "percent": _percent,
    "setting": _setting,
    "some_duration": _some_duration,
    "svg": svg,
    "thousands": "{:,}".format,
}
