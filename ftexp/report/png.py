"""Drawings as PNG, for places without HTML. Drawn larger and scaled down, since Pillow does not smooth edges."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

from ftexp.report.drawing import Area, Box, Dot, Drawing, Label, Line, Point, Shape
from ftexp.report.palette import LIGHT

_SCALE, _OVER = 2, 2  # pixels of the picture per pixel of the drawing; oversampling factor
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
_MARGIN, _DASH = 10, 3


def png(*drawings: Drawing, title: str = "") -> bytes:
    """Return the drawings on white, side by side, each below its own title, all below `title`."""
    scale, top = _SCALE * _OVER, _MARGIN * (6 if title else 3)
    width, height = sum(_outer_width(one) for one in drawings), top + _MARGIN + max(one.height for one in drawings)
    picture = Image.new("RGB", (round(width) * scale, round(height) * scale), LIGHT["paper"])
    draw = ImageDraw.Draw(picture, "RGBA")
    if title:
        _Pen(draw, scale, _MARGIN, _MARGIN).draw(Label(0, 14, title, "ink", size=15))
    left = _MARGIN
    for drawing in drawings:
        pen = _Pen(draw, scale, left, top)
        for shape in (Label(0, -_MARGIN, drawing.title, "ink", size=13), *drawing.shapes):
            pen.draw(shape)
        left += _outer_width(drawing)
    stream = io.BytesIO()
    few = picture.reduce(_OVER).quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)  # the fastest
    few.save(stream, "png")
    return stream.getvalue()


def _outer_width(drawing: Drawing) -> int:
    return round(drawing.width) + 2 * _MARGIN


def _corners(box: Box) -> list[Point]:
    right, bottom = box.x + box.width, box.y + box.height
    return [(box.x, box.y), (right, box.y), (right, bottom), (box.x, bottom)]


class _Pen:
    def __init__(self, draw: ImageDraw.ImageDraw, scale: int, left: int, top: int) -> None:
        self._draw, self._scale, self._left, self._top = draw, scale, left, top

    def draw(self, shape: Shape) -> None:
        """Draw any shape."""
        if isinstance(shape, Label):
            self.label(shape)
        elif isinstance(shape, Line):
            self.line(shape)
        elif isinstance(shape, Dot):
            self.dot(shape)
        elif isinstance(shape, Area):
            self.area(shape.points, shape.role, shape.opacity)
        elif shape.role != "none":
            self.area(_corners(shape), shape.role, shape.opacity)

    def label(self, shape: Label) -> None:
        """Draw text in Pillow's own font."""
        font = ImageFont.load_default(shape.size * self._scale)
        (at,) = self._moved([(shape.x, shape.y)])
        self._draw.text(at, shape.text, _colour(shape.role), font, anchor=_ANCHORS[shape.anchor])

    def line(self, shape: Line) -> None:
        """Draw a polyline; dashes are drawn one by one."""
        width = max(1, round(shape.width * self._scale))
        for points in _dashes(shape.points) if shape.dashed else [shape.points]:
            self._draw.line(self._moved(points), _colour(shape.role, shape.opacity), width, joint="curve")

    def dot(self, shape: Dot) -> None:
        """Draw a circle."""
        r = shape.radius
        corners = self._moved([(shape.x - r, shape.y - r), (shape.x + r, shape.y + r)])
        self._draw.ellipse(corners, _colour(shape.role))

    def area(self, points: Sequence[Point], role: str, opacity: float) -> None:
        """Draw a polygon."""
        self._draw.polygon(self._moved(points), _colour(role, opacity))

    def _moved(self, points: Sequence[Point]) -> list[Point]:
        return [((x + self._left) * self._scale, (y + self._top) * self._scale) for x, y in points]


def _dashes(points: Sequence[Point]) -> list[list[Point]]:
    """Return the dashes of a polyline; dashes and gaps continue around its corners."""
    dashes, walked = [], 0.0
    for (x, y), (to_x, to_y) in pairwise(points):
        length = max(math.hypot(to_x - x, to_y - y), 1e-9)
        begin = -(walked % (2 * _DASH))
        while begin < length:
            ends = max(begin, 0.0) / length, min(begin + _DASH, length) / length
            if ends[0] < ends[1]:
                dashes.append([(x + (to_x - x) * part, y + (to_y - y) * part) for part in ends])
            begin += 2 * _DASH
        walked += length
    return dashes


def _colour(role: str, opacity: float = 1.0) -> tuple[int, int, int, int]:
    value = LIGHT[role].removeprefix("#")
    red, green, blue = (int(value[place : place + 2], 16) for place in (0, 2, 4))
    return red, green, blue, round(255 * opacity)
