"""What every page has: its head, its look, sections, tiles, a footer."""

from __future__ import annotations

import time
from pathlib import Path

from ftexp.report.markup import Child, Markup, element
from ftexp.report.palette import DARK, LIGHT, css, css_classes

_DARK_IF = "@media (prefers-color-scheme: dark)"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is loaded, nothing runs


def document(name: str, *parts: Child) -> str:
    """A whole file, in light and in dark, that loads nothing."""
    styles = f":root{{color-scheme:light dark;{css(LIGHT)}}}{_DARK_IF}{{:root{{{css(DARK)}}}}}{css_classes()}"
    page = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{name} · ftexp"),
        element("style", Markup(styles + page)),
    )
    footer = element("footer", f"Written by ftexp on {time.strftime('%Y-%m-%d %H:%M:%S')}.", class_="faint")
    body = element("body", element("main", *parts, footer))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def section(title: str, *children: Child, note: str = "") -> Markup:
    """A part of the page with a heading, and a line below it."""
    return element("section", element("h2", title), element("p", note, class_="faint") if note else None, children)


def tile(title: str, value: str, below: str) -> Markup:
    """A number of the headline."""
    return element("div", element("dt", title), element("dd", value), element("dd", below, class_="faint"))
