"""The charts of a sweep: every trial as a line over the swept keys, and all learning curves in one chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ftexp.report.charts import LEFT, Plot, legend
from ftexp.report.drawing import Box, Dot, Drawing, Label, Line, Point
from ftexp.report.series import Axis, Series, short
from ftexp.report.text import cut
from ftexp.rundir.ranking import has_place
from ftexp.rundir.sweep_record import Reached, SweepRecord, curve
from ftexp.storage.directory import Storage

_TOP, _BOTTOM, _SIDE = 52.0, 24.0, 46.0  # margins around the axes of the wide chart
_HEIGHT = 300.0
_ROW, _FIRST_ROW, _ROW_SIDE = 62.0, 44.0, 14.0  # for the narrow chart, whose axes are stacked
_LOG_SPAN = 8.0  # numbers that span more than this factor get a logarithmic axis
_MAX_PLACES = 12  # labels of values that are words: more would overlap
_BEST, _OTHER, _OPEN = "val", "train", "faint"
_FAINTEST, _STRONGEST = 0.18, 0.85
_CURVE_HEIGHT = 300.0
_NARROW, PANEL = 360.0, 420.0
_INSET = 0.07  # margin at both ends of a panel without trials, as a share of its width
_NAME_LETTERS, _TITLE_LETTERS = 14, 55
_LETTER = 6.6  # pixels; largest width of a label's letter
_FEW = 6  # up to so many numbers, each one is a tick; with more, ticks are round numbers


@dataclass(frozen=True)
class TrialLine:
    """A trial, as charts show it."""

    name: str
    values: dict[str, str]  # values of the swept keys
    score: float | None  # None: no value yet
    finished: bool
    place: int  # 0: the best

    def tooltip(self, metric: str) -> str:
        """Return the text of the tooltip."""
        score = "no " + metric if self.score is None else f"{metric} {self.score:.4g}"
        return cut(", ".join([score, *(f"{key}={value}" for key, value in self.values.items())]), 200)


def trial_lines(record: SweepRecord, ordered: Sequence[Reached], keys: Sequence[str]) -> list[TrialLine]:
    """Return the trials as charts show them. `ordered`: best first."""
    return [
        TrialLine(
            each.trial.name,
            {key: each.trial.values.get(key, "") for key in keys},
            each.value(record.metric),
            has_place(record, each),
            place,
        )
        for place, each in enumerate(ordered)
    ]


def learning_curve(directory: Storage, record: SweepRecord, each: Reached) -> list[Point]:
    """Return the (epoch, metric) points of a trial."""
    return [(float(epoch), value) for epoch, value in curve(directory, each.trial, record.metric)]


@dataclass(frozen=True)
class _Scale:
    """One axis: the position of each value, in 0..1, and its ticks."""

    name: str
    at: dict[str, float]  # text of a value -> its position
    marks: list[tuple[float, str]]


def parallel_chart(trials: Sequence[TrialLine], keys: Sequence[str], metric: str, wide: float | None) -> Drawing:
    """Draw a line for each trial, from axis to axis; the last axis is the metric.

    wide: the chart's width, with axes side by side; None: for a phone, with stacked axes.
    """
    scored = [trial for trial in trials if trial.score is not None]
    scales = [_scale(key, [trial.values.get(key, "") for trial in scored]) for key in keys]
    scales.append(_scale(metric, [repr(trial.score) for trial in scored]))
    upright = wide is not None
    drawing = Drawing("Trials", wide or _NARROW, _HEIGHT if upright else _FIRST_ROW + _ROW * len(scales))
    entries = [("best", _BEST), ("other trials", _OTHER)]
    entries += [("not finished", _OPEN)] if any(not trial.finished for trial in scored) else []
    legend(drawing, entries, 0)
    for trial in sorted(scored, key=lambda one: -one.place):
        values = [*(trial.values.get(key, "") for key in keys), repr(trial.score)]
        shares = [scale.at[value] for scale, value in zip(scales, values, strict=True)]
        points = [_point(drawing, share, number, len(scales), upright) for number, share in enumerate(shares)]
        role = _OPEN if not trial.finished else _BEST if trial.place == 0 else _OTHER
        drawing.add(
            Line(
                points, role, 2.6 if role == _BEST else 1.5, not trial.finished, _strength(trial, len(scored)),
                trial.tooltip(metric),
            )
        )  # fmt: skip
    for number, scale in enumerate(scales):  # on top of the lines, so that it is readable
        (_upright_axis if upright else _flat_axis)(drawing, scale, number, len(scales))
    return drawing


def _strength(trial: TrialLine, number: int) -> float:
    """Return the opacity of a trial's line: the better the trial, the stronger."""
    if trial.place == 0 or not trial.finished:
        return 1.0
    return _STRONGEST - (_STRONGEST - _FAINTEST) * trial.place / max(number, 1)


def _scale(name: str, texts: Sequence[str]) -> _Scale:
    """Return a scale: for numbers, linear, or logarithmic if they span much; otherwise one place per text."""
    distinct = list(dict.fromkeys(texts))
    numbers = {text: number for text in distinct if (number := _number(text)) is not None}
    if len(numbers) < len(distinct) or not numbers:
        ordered = sorted(distinct)
        last = max(len(ordered) - 1, 1)
        places = {text: number / last if len(ordered) > 1 else 0.5 for number, text in enumerate(ordered)}
        step = math.ceil(len(ordered) / _MAX_PLACES) or 1
        return _Scale(name, places, [(places[text], cut(text, _NAME_LETTERS)) for text in ordered[::step]])
    low, high, few = min(numbers.values()), max(numbers.values()), len(numbers) <= _FEW
    axis = Axis.over(list(numbers.values()), log=low > 0 and high / low > _LOG_SPAN)
    return _Scale(
        name,
        {text: axis.at(number) for text, number in numbers.items()},
        [(axis.at(value), short(value)) for value in (sorted(numbers.values()) if few else axis.ticks(5))],
    )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _point(drawing: Drawing, share: float, number: int, total: int, upright: bool) -> Point:
    if upright:
        x = _SIDE + number * (drawing.width - 2 * _SIDE) / max(total - 1, 1)
        return x, drawing.height - _BOTTOM - share * (drawing.height - _TOP - _BOTTOM)
    return _ROW_SIDE + share * (drawing.width - 2 * _ROW_SIDE), _FIRST_ROW + number * _ROW + 16


def _upright_axis(drawing: Drawing, scale: _Scale, number: int, total: int) -> None:
    top, bottom = (_point(drawing, share, number, total, True) for share in (1.0, 0.0))
    edge = "start" if number == 0 else "end" if number == total - 1 else "middle"
    shift = {"start": -_SIDE, "end": _SIDE, "middle": 0.0}[edge]
    room = int((drawing.width - 2 * _SIDE) / max(total - 1, 1) / 6.5)
    drawing.add(Line([top, bottom], "faint"))
    _label(drawing, top[0] + shift, _TOP - 14, cut(scale.name, room), edge, "ink")
    outside = number == total - 1  # the last axis, the metric, has its numbers on the right: no lines there
    for share, text in scale.marks:
        x, y = _point(drawing, share, number, total, True)
        anchor = "start" if outside else "end"
        drawing.add(Line([(x - 3, y), (x + 3, y)], "faint"))
        _label(drawing, x + (7 if outside else -7), y + 4, text, anchor)


def _flat_axis(drawing: Drawing, scale: _Scale, number: int, total: int) -> None:
    left, right = (_point(drawing, share, number, total, False) for share in (0.0, 1.0))
    drawing.add(Line([left, right], "faint"))
    _label(drawing, 0, left[1] - 8, cut(scale.name, 50), "start", "ink")
    beyond = -math.inf  # where the last label ends
    for share, text in scale.marks:
        x, y = _point(drawing, share, number, total, False)
        drawing.add(Line([(x, y - 3), (x, y + 3)], "faint"))
        width = _LETTER * len(text)
        left_end = min(max(x - width / 2, 0), drawing.width - width)
        if left_end > beyond + 6:
            anchor, at = ("start", 0.0) if left_end == 0 else ("middle", left_end + width / 2)
            _label(drawing, at, y + 15, text, anchor)
            beyond = left_end + width


def _label(drawing: Drawing, x: float, y: float, text: str, anchor: str, role: str = "faint") -> None:
    """Draw text on a background, above the lines."""
    width = _LETTER * len(text)
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    drawing.add(Box(left - 1, y - 9, width + 2, 12, "paper", 0.8), Label(x, y, text, role, anchor))


def values_chart(trials: Sequence[TrialLine], key: str, metric: str) -> Drawing:
    """Draw the metric of finished trials against a swept key, the best trial on top of the others."""
    done = [(trial, trial.score) for trial in trials if trial.finished and trial.score is not None]
    drawing = Drawing(cut(f"{metric} by {key}", _TITLE_LETTERS), PANEL, _CURVE_HEIGHT)
    scale = _scale(key, [trial.values.get(key, "") for trial, _ in done])
    plot = Plot(drawing, Axis(-_INSET, 1 + _INSET), Axis.over([score for _, score in done]), cut(key, _TITLE_LETTERS))
    plot.grid("", scale.marks)
    for trial, score in reversed(done):
        radius, role = (5.5, _BEST) if trial.place == 0 else (3.5, _OTHER)
        drawing.add(
            Dot(plot.x(scale.at[trial.values.get(key, "")]), plot.y(score), radius, role, trial.tooltip(metric))
        )
    legend(drawing, [("best", _BEST), ("others", _OTHER)], LEFT)
    return drawing


def curves_chart(
    metric: str, curves: Sequence[tuple[TrialLine, list[tuple[float, float]]]], wide: float | None
) -> Drawing:
    """Draw the metric by epoch, the best trial on top; unfinished trials are dashed. `wide`: as for parallel_chart."""
    drawing = Drawing(f"{metric} by epoch", wide or _NARROW, _CURVE_HEIGHT)
    finite = [(trial, [(x, y) for x, y in points if math.isfinite(y)]) for trial, points in curves]
    drawn = [(trial, Series(trial.name, _OTHER, points)) for trial, points in finite if points]
    values = [y for _, series in drawn for y in series.values]
    last = max((x for _, series in drawn for x, _ in series.points), default=1.0)
    plot = Plot(drawing, Axis(0.0, last or 1.0), Axis.over(values), "epoch")
    plot.grid("")
    for trial, series in sorted(drawn, key=lambda pair: -pair[0].place):
        role = _OPEN if not trial.finished else _BEST if trial.place == 0 else _OTHER
        line = [(plot.x(bucket.x), plot.y(bucket.mean)) for bucket in series.buckets()]
        if len(line) == 1:
            drawing.add(Box(line[0][0] - 2, line[0][1] - 2, 4, 4, role, title=trial.tooltip(metric)))
        width = 2.4 if role == _BEST else 1.3
        strength = _strength(trial, len(drawn))
        drawing.add(Line(line, role, width, not trial.finished, strength, trial.tooltip(metric)))
    entries = [("best", _BEST), ("others", _OTHER)]
    entries += [("not finished", _OPEN)] if any(not trial.finished for trial, _ in drawn) else []
    legend(drawing, entries, LEFT)
    return drawing
