"""HTML and SVG out of calls, in which every text that isn't markup already is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

from ftexp.report.text import plain

_VOID = frozenset({"img", "meta", "br", "hr"})
Child = object  # Markup, None, an iterable of such, or anything else: its text


class Markup(str):
    """Text that is markup, and not escaped again."""

    __slots__ = ()


def element(name: str, /, *children: Child, **attributes: Child) -> Markup:
    """`<name attribute="...">children</name>`; class_ is class, and stroke_width stroke-width. None leaves out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in _VOID else f"{joined(children)}</{name}>"
    return Markup(f"<{name}{given}>{end}")


def joined(children: Iterable[Child]) -> Markup:
    """Children one after the other."""
    return Markup("".join(map(_rendered, children)))


def _rendered(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return str(child)
    if isinstance(child, Iterable) and not isinstance(child, str):
        return joined(child)
    return html.escape(plain(child))
