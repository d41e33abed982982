"""A chart as a list of shapes, in pixels, and its conversion to SVG.

Colours are roles: the page or the PNG defines how they look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A polyline."""

    points: Sequence[Point]
    role: str
    width: float = 1.0
    dashed: bool = False
    opacity: float = 1.0
    title: str | None = None  # tooltip, as for the other shapes


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: Sequence[Point]
    role: str
    opacity: float = 1.0
    title: str | None = None


@dataclass(frozen=True)
class Box:
    """A filled rectangle. With the role "none", it is invisible but has a tooltip."""

    x: float
    y: float
    width: float
    height: float
    role: str
    opacity: float = 1.0
    title: str | None = None


@dataclass(frozen=True)
class Dot:
    """A filled circle."""

    x: float
    y: float
    radius: float
    role: str
    title: str | None = None


@dataclass(frozen=True)
class Label:
    """A line of text; y is its base line."""

    x: float
    y: float
    text: str
    role: str = "faint"
    anchor: str = "start"  # start, middle, end
    size: float = 11.0


Shape = Line | Area | Box | Dot | Label


@dataclass
class Drawing:
    """Shapes, later ones over earlier ones."""

    title: str
    width: float
    height: float
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        """Add shapes on top of the others."""
        self.shapes.extend(shapes)


def svg(drawing: Drawing) -> Markup:
    """Return the drawing as inline SVG, as wide as its container."""
    box = f'viewBox="0 0 {drawing.width:g} {drawing.height:g}" role="img"'
    return Markup(f"<svg {box}>{_title(drawing.title)}{''.join(map(_as_svg, drawing.shapes))}</svg>")


def _as_svg(shape: Shape) -> str:
    if isinstance(shape, Label):
        look = f'class="f-{shape.role}" text-anchor="{shape.anchor}" font-size="{_n(shape.size)}"'
        return f'<text x="{_n(shape.x)}" y="{_n(shape.y)}" {look}>{escape(shape.text)}</text>'
    if isinstance(shape, Dot):
        place = f'cx="{_n(shape.x)}" cy="{_n(shape.y)}" r="{_n(shape.radius)}"'
        return f'<circle {place} class="f-{shape.role}">{_title(shape.title)}</circle>'
    opacity = f' opacity="{_n(shape.opacity)}"' if shape.opacity < 1 else ""
    if isinstance(shape, Box):
        place = f'x="{_n(shape.x)}" y="{_n(shape.y)}" width="{_n(shape.width)}" height="{_n(shape.height)}"'
        return f'<rect {place} class="f-{shape.role}"{opacity}>{_title(shape.title)}</rect>'
    points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
    if isinstance(shape, Area):
        return f'<polygon points="{points}" class="f-{shape.role}"{opacity}>{_title(shape.title)}</polygon>'
    look = f'class="s-{shape.role}" stroke-width="{_n(shape.width)}"{opacity}'
    dashes = ' stroke-dasharray="3 3"' if shape.dashed else ""
    return f'<polyline points="{points}" {look}{dashes}>{_title(shape.title)}</polyline>'


def _title(text: str | None) -> str:
    return "" if text is None else f"<title>{escape(text)}</title>"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 1 else f"{value:.3g}"
