"""Drawings as PNG, for where no HTML goes. Drawn larger and scaled down, since Pillow's edges are hard."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

from ftexp.report.drawing import Area, Box, Dot, Drawing, Label, Line, Point
from ftexp.report.palette import LIGHT

_SCALE, _OVER = 2, 2  # pixels of the picture for one of the drawing; drawn so many times larger still
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
_MARGIN, _DASH = 10, 3


def png(drawing: Drawing) -> bytes:
    """The drawing on white, with its title above."""
    scale = _SCALE * _OVER
    size = (round(drawing.width + 2 * _MARGIN) * scale, round(drawing.height + 4 * _MARGIN) * scale)
    picture = Image.new("RGB", size, LIGHT["paper"])
    pen = _Pen(ImageDraw.Draw(picture, "RGBA"), scale)
    pen.label(Label(0, -_MARGIN, drawing.title, "ink", size=13))
    for shape in drawing.shapes:
        if isinstance(shape, Label):
            pen.label(shape)
        elif isinstance(shape, Line):
            pen.line(shape)
        elif isinstance(shape, Dot):
            pen.dot(shape)
        elif isinstance(shape, Area):
            pen.area(shape.points, shape.role, shape.opacity)
        elif shape.role != "none":
            pen.area(_corners(shape), shape.role, shape.opacity)
    stream = io.BytesIO()
    few = picture.reduce(_OVER).quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)  # much the fastest
    few.save(stream, "png")
    return stream.getvalue()


def _corners(box: Box) -> list[Point]:
    right, bottom = box.x + box.width, box.y + box.height
    return [(box.x, box.y), (right, box.y), (right, bottom), (box.x, bottom)]


class _Pen:
    def __init__(self, draw: ImageDraw.ImageDraw, scale: int) -> None:
        self._draw, self._scale = draw, scale

    def label(self, shape: Label) -> None:
        """Text; its font is Pillow's own."""
        font = ImageFont.load_default(shape.size * self._scale)
        (at,) = self._moved([(shape.x, shape.y)])
        self._draw.text(at, shape.text, _colour(shape.role), font, anchor=_ANCHORS[shape.anchor])

    def line(self, shape: Line) -> None:
        """A polyline; dashes are drawn one by one."""
        width = max(1, round(shape.width * self._scale))
        for points in _dashes(shape.points) if shape.dashed else [shape.points]:
            self._draw.line(self._moved(points), _colour(shape.role, shape.opacity), width, joint="curve")

    def dot(self, shape: Dot) -> None:
        """A circle."""
        r = shape.radius
        corners = self._moved([(shape.x - r, shape.y - r), (shape.x + r, shape.y + r)])
        self._draw.ellipse(corners, _colour(shape.role))

    def area(self, points: Sequence[Point], role: str, opacity: float) -> None:
        """A polygon."""
        self._draw.polygon(self._moved(points), _colour(role, opacity))

    def _moved(self, points: Sequence[Point]) -> list[Point]:
        return [((x + _MARGIN) * self._scale, (y + 3 * _MARGIN) * self._scale) for x, y in points]


def _dashes(points: Sequence[Point]) -> list[list[Point]]:
    dashes = []
    for (x, y), (to_x, to_y) in pairwise(points):
        length = max(abs(to_x - x), abs(to_y - y), 1e-9)
        for start in range(0, round(length), 2 * _DASH):
            first, last = start / length, min(1.0, (start + _DASH) / length)
            dashes.append([(x + (to_x - x) * part, y + (to_y - y) * part) for part in (first, last)])
    return dashes


def _colour(role: str, opacity: float = 1.0) -> tuple[int, int, int, int]:
    value = LIGHT[role].removeprefix("#")
    red, green, blue = (int(value[place : place + 2], 16) for place in (0, 2, 4))
    return red, green, blue, round(255 * opacity)
