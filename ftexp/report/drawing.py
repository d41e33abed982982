"""A chart as a list of shapes, in pixels, and as SVG.

Colours are roles: the page, or the PNG, says what they look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ftexp.report.markup import Markup, element

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A polyline."""

    points: Sequence[Point]
    role: str
    width: float = 1.0
    dashed: bool = False
    opacity: float = 1.0
    title: str | None = None  # shown when the mouse is over it, as with the other shapes


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: Sequence[Point]
    role: str
    opacity: float = 1.0
    title: str | None = None


@dataclass(frozen=True)
class Box:
    """A filled rectangle. The role "none" is seen by the mouse only."""

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
    """What is drawn, later shapes over earlier ones."""

    title: str
    width: float
    height: float
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        """Draw over what is there."""
        self.shapes.extend(shapes)


def svg(drawing: Drawing) -> Markup:
    """The drawing inline, as wide as its place."""
    return element(
        "svg",
        element("title", drawing.title),
        map(_as_svg, drawing.shapes),
        viewBox=f"0 0 {drawing.width:g} {drawing.height:g}",
        role="img",
    )


def _as_svg(shape: Shape) -> Markup:
    if isinstance(shape, Label):
        return element(
            "text", shape.text, x=_n(shape.x), y=_n(shape.y), class_=f"f-{shape.role}", text_anchor=shape.anchor,
            font_size=_n(shape.size),
        )  # fmt: skip
    title = element("title", shape.title) if shape.title is not None else None
    if isinstance(shape, Dot):
        return element("circle", title, cx=_n(shape.x), cy=_n(shape.y), r=_n(shape.radius), class_=f"f-{shape.role}")
    opacity = _n(shape.opacity) if shape.opacity < 1 else None
    if isinstance(shape, Box):
        return element(
            "rect", title, x=_n(shape.x), y=_n(shape.y), width=_n(shape.width), height=_n(shape.height),
            class_=f"f-{shape.role}", opacity=opacity,
        )  # fmt: skip
    points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
    if isinstance(shape, Area):
        return element("polygon", title, points=points, class_=f"f-{shape.role}", opacity=opacity)
    return element(
        "polyline", title, points=points, class_=f"s-{shape.role}", stroke_width=_n(shape.width), opacity=opacity,
        stroke_dasharray="3 3" if shape.dashed else None,
    )  # fmt: skip


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 1 else f"{value:.3g}"
