"""The charts of a run: curves by step, and the timeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ftexp.report.drawing import Area, Box, Dot, Drawing, Label, Line, Point
from ftexp.report.series import Axis, Series, duration, round_step, short
from ftexp.report.source import RunFiles
from ftexp.report.text import cut
from ftexp.report.timeline import PHASES, TRAINING, Timeline, saves

_WIDTH, _HEIGHT = 480.0, 250.0
LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 10.0, 30.0, 34.0
_HOVERS = 120  # tooltips along a curve
_NEAR = 5.0  # pixels; marks that are closer are merged
LETTER = 6.8  # pixels; approximate width of a label's letter, in a wide font
_ROW = 14.0  # pixels between rows of labels
_LOG_FROM = 30.0  # ratio of the largest to the smallest value from which the axis is logarithmic
_MAX_TITLES = 3  # titles that merged marks show
_MAX_LINES = 30  # vertical lines through a chart; more would hide it, so then only the marks above it are drawn


@dataclass(frozen=True)
class Mark:
    """An event on the x axis."""

    at: float
    title: str


def line_chart(
    title: str,
    series: Sequence[Series],
    attempts: Sequence[float] = (),
    faults: Sequence[Mark] = (),
    from_zero: bool = False,
) -> Drawing:
    """Draw curves by step. `attempts`: steps at which a new attempt started; `faults`: events to mark."""
    series = [one for one in series if one.points]
    drawing = Drawing(title, _WIDTH, _HEIGHT)
    values = [y for one in series for y in one.values]
    low, high = min(values, default=0.0), max(values, default=1.0)
    log = low > 0 and high / low >= _LOG_FROM and not from_zero
    steps = [*(x for one in series for x, _ in one.points), *(fault.at for fault in faults)]
    x_axis, y_axis = Axis(min([0.0, *steps]), max(steps, default=1.0) or 1.0), Axis.over(values, log, from_zero)
    plot = Plot(drawing, x_axis, y_axis)
    plot.shade(attempts)
    plot.grid("log scale" if log else "")
    for one in series:
        plot.curve(one)
    plot.faults(faults)
    plot.hovers(series)
    legend(drawing, [(one.name, one.role) for one in series], LEFT)
    return drawing


class Plot:
    """The frame of a line chart, to draw into. `x_name`: name of the x axis."""

    def __init__(self, drawing: Drawing, x_axis: Axis, y_axis: Axis, x_name: str = "step") -> None:
        self._drawing, self._x_axis, self._y_axis, self._x_name = drawing, x_axis, y_axis, x_name
        self._right, self._bottom = drawing.width - _RIGHT, drawing.height - _BOTTOM

    def x(self, value: float) -> float:
        """Return the x coordinate of a step."""
        return LEFT + self._x_axis.at(value) * (self._right - LEFT)

    def y(self, value: float) -> float:
        """Return the y coordinate of a value."""
        return self._bottom - self._y_axis.at(value) * (self._bottom - _TOP)

    def shade(self, attempts: Sequence[float]) -> None:
        """Shade every other attempt."""
        if len(attempts) > _MAX_LINES:
            return
        edges = [LEFT, *(self.x(step) for step in attempts), self._right]
        for begin, end in list(pairwise(edges))[1::2]:
            self._drawing.add(Box(begin, _TOP, max(end - begin, 0.5), self._bottom - _TOP, "shade"))

    def grid(self, note: str, x_marks: Sequence[tuple[float, str]] = ()) -> None:
        """Draw the axes and their labels. `x_marks`: (value, text); round integers if there are none."""
        for value in self._y_axis.ticks():
            y = self.y(value)
            self._drawing.add(Line([(LEFT, y), (self._right, y)], "grid"))
            self._drawing.add(Label(LEFT - 6, y + 4, short(value), anchor="end"))
        rows = self._mark_x(x_marks or [(x, short(x)) for x in self._x_axis.ticks() if abs(x - round(x)) < 1e-9])
        self._drawing.add(Line([(LEFT, self._bottom), (self._right, self._bottom)], "faint"))
        self._drawing.height = self._bottom + _BOTTOM + _ROW * (rows - 1)
        self._drawing.add(Label(self._right, self._drawing.height - 4, self._x_name, anchor="end"))
        self._drawing.add(Label(self._right, 14, note, anchor="end"))

    def _mark_x(self, marks: Sequence[tuple[float, str]]) -> int:
        """Draw ticks with texts, in as many rows as needed; return the number of rows."""
        ends: list[float] = []  # x at which the last text of each row ends
        for value, text in marks:
            x, half = self.x(value), LETTER * len(text) / 2
            middle = min(x, self._drawing.width - half)
            row = next((number for number, end in enumerate(ends) if end < middle - half), len(ends))
            ends[row : row + 1] = [middle + half + LETTER]
            self._drawing.add(Line([(x, self._bottom), (x, self._bottom + 4)], "faint"))
            self._drawing.add(Label(middle, self._bottom + 17 + _ROW * row, text, anchor="middle"))
        return len(ends)

    def curve(self, series: Series) -> None:
        """Draw a line through the buckets' means, and a fainter one through their extremes."""
        buckets = series.buckets()
        if any(bucket.low < bucket.high for bucket in buckets):
            extremes = [(self.x(bucket.x), self.y(y)) for bucket in buckets for y in (bucket.low, bucket.high)]
            self._drawing.add(Line(extremes, series.role, 1, opacity=0.45))
        if len(buckets) == 1:
            self._drawing.add(Dot(self.x(buckets[0].x), self.y(buckets[0].mean), 3.5, series.role))
        points = [(self.x(bucket.x), self.y(bucket.mean)) for bucket in buckets]
        self._drawing.add(Line(points, series.role, 1.6))

    def faults(self, faults: Sequence[Mark]) -> None:
        """Draw a vertical line for each fault; faults that are close together share one."""
        merged = _merged(faults, self.x)
        for x, title in merged:
            if len(merged) <= _MAX_LINES:
                self._drawing.add(Line([(x, _TOP), (x, self._bottom)], "fault", 1.2, True, 0.75))
            self._drawing.add(Area(_triangle(x, _TOP), "fault", title=title))
            self._drawing.add(Box(x - 3, _TOP, 6, self._bottom - _TOP, "none", title=title))

    def hovers(self, series: Sequence[Series]) -> None:
        """Add tooltips with numbers."""
        texts_at: dict[float, list[str]] = {}
        for one in series:
            for bucket in one.buckets(_HOVERS):
                texts_at.setdefault(bucket.x, []).append(f"{one.name} {bucket.mean:.4g}")
        for x, texts in texts_at.items():
            title = f"step {x:,.0f}: {', '.join(texts)}"
            self._drawing.add(Box(self.x(x) - 2, _TOP + 8, 4, self._bottom - _TOP - 8, "none", title=title))


def _merged(marks: Sequence[Mark], place: Callable[[float], float]) -> list[tuple[float, str]]:
    """Return (x, title) of marks, with nearby marks merged."""
    groups: list[tuple[float, list[str]]] = []
    for mark in sorted(marks, key=lambda mark: mark.at):
        x = place(mark.at)
        if groups and x - groups[-1][0] < _NEAR:
            groups[-1][1].append(mark.title)
        else:
            groups.append((x, [mark.title]))
    return [(x, "\n".join([*titles[:_MAX_TITLES], *_more(len(titles) - _MAX_TITLES)])) for x, titles in groups]


def _more(number: int) -> list[str]:
    return [f"and {number} more"] if number > 0 else []


def _triangle(x: float, y: float) -> list[Point]:
    return [(x - 4, y - 7), (x + 4, y - 7), (x, y)]


def legend(drawing: Drawing, entries: Sequence[tuple[str, str]], x: float, y: float = 14) -> float:
    """Draw swatches with names, in as many lines as needed; return the y of the last line."""
    begin = x
    for name, role in entries:
        width = 22 + LETTER * len(name)
        if x + width > drawing.width and x > begin:
            x, y = begin, y + 16
        drawing.add(Box(x, y - 8, 10, 8, role), Label(x + 14, y, name, "ink"))
        x += width
    return y


def timeline_chart(run: RunFiles, timeline: Timeline, width: float) -> Drawing:
    """Draw the phase of each second as a strip, with checkpoints below it and failures above."""
    drawing = Drawing("Timeline", width, 0)
    sums = timeline.seconds_by_phase()
    used = [(phase, phase) for phase in PHASES if sums[phase]]
    top = legend(drawing, [*used, ("checkpoint", "save")], 0) + 28

    def place(when: float) -> float:
        return timeline.running_s(when) / (timeline.total_s or 1) * width

    for begin, end in pairwise([0.0, *(place(invocation.end) for invocation in timeline.invocations)]):
        drawing.add(Box(begin, top, max(end - begin - 1, 0.5), 34, TRAINING))
    lost = [(place(s.begin), place(s.end), s.phase, s.seconds) for s in timeline.segments if s.phase != TRAINING]
    for x, right, phase, title in _strips(lost):
        drawing.add(Box(x, top, right - x, 34, phase, title=title))
    written = [(place(begin), place(end), "save", end - begin) for begin, end, _ in saves(run)]
    for x, right, role, title in _strips(written):
        drawing.add(Box(x, top + 38, right - x, 10, role, title=title))
    marks = [
        Mark(cause.at, f"{cause.cause} after step {cause.step:,}: {cut(cause.error, 80)}".rstrip(": "))
        for cause in timeline.interruptions
    ]
    for x, title in _merged(marks, place):
        drawing.add(Area(_triangle(min(max(x, 4), width - 4), top - 2), "fault", title=title))
    _time_axis(drawing, timeline.total_s, top + 52)
    drawing.height = top + 76
    return drawing


def _strips(found: Sequence[tuple[float, float, str, float]]) -> list[tuple[float, float, str, str]]:
    """Return (x, right, role, title), each at least a pixel wide; touching ones of less than two pixels are merged."""
    strips: list[tuple[float, float, str, list[tuple[str, float]]]] = []
    for x, right, role, seconds in found:
        right = max(right, x + 1)
        if strips and x < strips[-1][1] and right - strips[-1][0] < 2:
            strips[-1][3].append((role, seconds))
        else:
            strips.append((x, right, role, [(role, seconds)]))
    return [(x, right, *_summary(inside)) for x, right, _, inside in strips]


def _summary(inside: list[tuple[str, float]]) -> tuple[str, str]:
    """Return the role that took most of the time, and a title."""
    total = sum(seconds for _, seconds in inside)
    role = max(inside, key=lambda one: one[1])[0]
    name = role if len(inside) == 1 else f"{len(inside)} stretches, most of it {role}"
    return role, f"{name}: {duration(total)}"


def _time_axis(drawing: Drawing, total_s: float, y: float) -> None:
    unit, name = next((u, n) for u, n, min_s in ((3600, "h", 7200), (60, "min", 180), (1, "s", 0)) if total_s >= min_s)
    total = total_s / unit or 1.0
    step = round_step(total / max(3, drawing.width // 110))
    drawing.add(Line([(0, y), (drawing.width, y)], "faint"))
    for number in range(int(total / step + 1e-9) + 1):
        x = number * step / total * drawing.width
        anchor = "start" if number == 0 else "end" if x > drawing.width - 20 else "middle"
        drawing.add(Line([(x, y), (x, y + 4)], "faint"))
        drawing.add(Label(x, y + 17, f"{number * step:g} {name}", anchor=anchor))
