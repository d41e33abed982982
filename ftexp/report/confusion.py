"""The confusion matrix as a chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ftexp.report.drawing import Box, Drawing, Label, Line, Shape
from ftexp.report.series import short
from ftexp.report.text import cut

_SIDE, _MAX_CELL, _MIN_CELL = 400.0, 34.0, 5.0  # pixels
_MAX_NAMED = 30  # largest number of classes for which names fit
_LETTER, _TOP = 6.0, 24.0


def confusion_chart(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> Drawing:
    """Draw labels as rows, predictions as columns; correct ones in one colour, wrong ones in another."""
    cell = max(_MIN_CELL, min(_MAX_CELL, _SIDE / len(names)))
    shown = [cut(name, 12) for name in names] if len(names) <= _MAX_NAMED else []
    widest = max(map(len, shown), default=0) * _LETTER
    left, size = widest + 10, cell * len(names)
    drawing = Drawing("Confusion", max(left + size + 6, 260), _TOP + size + 22)
    drawing.add(Label(left, 14, "rows: label · columns: predicted"))
    drawing.add(*_cells(names, confusion, left, cell))
    bottom, right = _TOP + size, left + size
    drawing.add(Line([(left, _TOP), (right, _TOP), (right, bottom), (left, bottom), (left, _TOP)], "grid"))
    for number, name in enumerate(shown):
        middle = (number + 0.5) * cell
        drawing.add(Label(left - 5, _TOP + middle + 4, name, anchor="end"))
        if widest < cell + 4:
            drawing.add(Label(left + middle, bottom + 15, name, anchor="middle"))
    return drawing


def _cells(names: Sequence[str], confusion: Sequence[Sequence[int]], left: float, cell: float) -> Iterator[Shape]:
    wrong = (number for row, line in enumerate(confusion) for column, number in enumerate(line) if row != column)
    worst = max([1, *wrong])
    gap = 1.0 if cell > 8 else 0.0
    for row, line in enumerate(confusion):
        for column, number in enumerate(line):
            if not number:
                continue
            role, share = ("right", number / sum(line)) if row == column else ("fault", number / worst)
            x, y = left + column * cell, _TOP + row * cell
            title = f"{names[row]} predicted as {names[column]}: {number:,} of {sum(line):,}"
            yield Box(x + gap, y + gap, cell - 2 * gap, cell - 2 * gap, role, 0.15 + 0.75 * share, title)
            if cell > 20:
                yield Label(x + cell / 2, y + cell / 2 + 4, short(number), "ink", "middle")
