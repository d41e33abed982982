"""leaderboard.png: the objective against each swept parameter, and the learning curves laid over each other."""

from __future__ import annotations

import io
from typing import Any

from ftexp.rundir.ranking import varying
from ftexp.rundir.record import FINISHED
from ftexp.rundir.sweep_record import Reached, SweepRecord, curve
from ftexp.storage.directory import Storage

_BEST, _OTHER = "#c0392b", "#5b7083"
_PANEL_INCHES = (4.2, 3.6)
_LOG_SPAN = 8.0  # numbers that span more than this factor are drawn on a logarithmic axis


def draw(folder: Storage, ledger: SweepRecord, ordered: list[Reached]) -> bytes:
    """The picture as PNG; `ordered`: the best first."""
    from matplotlib.figure import Figure

    done = [each for each in ordered if each.status == FINISHED and each.value(ledger.metric) is not None]
    keys = varying(ledger, ordered)
    num = len(keys) + 1
    figure = Figure(figsize=(_PANEL_INCHES[0] * num, _PANEL_INCHES[1]), layout="constrained")
    panels = figure.subplots(1, num, squeeze=False)[0]
    for panel, key in zip(panels, keys, strict=False):
        _draw_values(panel, ledger, key, done)
    _draw_curves(panels[-1], folder, ledger, ordered, done)
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{ledger.name}: {len(done)} of {len(ordered)} trials finished", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return picture.getvalue()


def _draw_values(panel: Any, ledger: SweepRecord, key: str, done: list[Reached]) -> None:
    """Numbers get an axis to scale, anything else a place each."""
    words = [each.trial.values.get(key, "") for each in done]
    places, labels = _places(words)
    scores = [each.value(ledger.metric) for each in done]
    panel.scatter(places[1:], scores[1:], color=_OTHER, alpha=0.75, s=28, zorder=3)
    panel.scatter(places[:1], scores[:1], color=_BEST, s=70, marker="*", zorder=4, label="best")
    if labels:
        panel.set_xticks(range(len(labels)), labels, rotation=20 if max(map(len, labels)) > 8 else 0)
        panel.set_xlim(-0.5, len(labels) - 0.5)
    elif places and min(places) > 0 and max(places) / min(places) > _LOG_SPAN:
        panel.set_xscale("log")
    panel.set_xlabel(key)
    panel.set_ylabel(ledger.metric)


def _places(words: list[str]) -> tuple[list[float], list[str]]:
    """Where values stand on an axis, and the labels of the places if they are no numbers."""
    try:
        return [float(word) for word in words], []
    except ValueError:
        labels = sorted(set(words))
        return [float(labels.index(word)) for word in words], labels


def _draw_curves(panel: Any, folder: Storage, ledger: SweepRecord, ordered: list[Reached], done: list[Reached]) -> None:
    """The best in colour, the others behind it; those that didn't finish are dashed."""
    names = {each.trial.name for each in done}
    for each in reversed(ordered):
        points = curve(folder, each.trial, ledger.metric)
        is_best = bool(done) and each is done[0]
        style = {"color": _BEST, "linewidth": 2.2} if is_best else {"color": _OTHER, "linewidth": 1.1, "alpha": 0.6}
        if each.trial.name not in names:
            style["linestyle"] = "--"
        label = f"best: {_short(each)}" if is_best else None
        panel.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("epoch")
    panel.set_ylabel(ledger.metric)
    if done:
        panel.legend(frameon=False, fontsize=8, loc="best")


def _short(trial: Reached) -> str:
    return "\n".join(f"{key}={value}" for key, value in trial.trial.values.items()) or trial.trial.name
