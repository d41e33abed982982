"""The Grafana dashboard for the series of `tracker=prometheus`, in the JSON that Grafana imports.

Its queries find a series under its own name and under Ray's name for it, so one dashboard serves both exporters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftexp.trackers import series
from ftexp.trackers.series import RAY_PREFIX, Series

_WIDTH, _HEIGHT = 24, 8  # columns of Grafana's grid; rows of a panel
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SCHEMA_VERSION = 39  # Grafana 10.2 and later; older dashboards are migrated by Grafana


@dataclass(frozen=True)
class Query:
    """A PromQL expression and its legend, where {{name}} is replaced by a label."""

    expression: str
    legend: str = "{{run}}"


@dataclass(frozen=True)
class Panel:
    """A panel. `unit`: Grafana's name of the unit."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "none"
    width: int = 8
    kind: str = "timeseries"


def selected(of: Series) -> str:
    """Return the selector of a series of the chosen runs, under either name."""
    return f'{{__name__=~"({RAY_PREFIX})?{of.name}",run=~"$run"}}'


def _one(of: Series, *labels: str) -> str:
    """Return the query for one value per run and value of `labels`: Ray's agents add labels of their own."""
    return f"max by ({', '.join(('run', *labels))}) ({selected(of)})"


def _of_each(of: Series) -> Query:
    (label,) = of.labels
    return Query(_one(of, label), f"{{{{run}}}} {{{{{label}}}}}")


def _stat(title: str, of: Series, unit: str = "none") -> Panel:
    return Panel(title, (Query(_one(of)),), unit, width=4, kind="stat")


def _metrics(condition: str) -> Query:
    chosen = f"{selected(series.METRIC)[:-1]},{condition}}}"
    return Query(f"max by (run, metric) ({chosen})", "{{run}} {{metric}}")


def _mean_blocked() -> Query:
    return Query(f"{_one(series.BLOCKED_SUM)} / {_one(series.SAVES)}", "{{run}} mean of all checkpoints")


PANELS = (
    _stat("Step", series.STEP),
    _stat("Epochs", series.EPOCH),
    _stat("Workers", series.WORKERS),
    _stat("Attempts", series.ATTEMPTS),
    _stat("Goodput", series.GOODPUT, "percentunit"),
    _stat("Heard from a worker", series.HEARTBEAT_AGE, "s"),
    Panel("Loss", (_metrics('metric=~".*loss.*"'),), width=12),
    Panel("Metrics", (_metrics('metric!~".*loss.*"'),), width=12),
    Panel("Images per second", (Query(_one(series.IMAGES)),)),
    Panel("Where a step's time goes, on rank 0", (_of_each(series.STEP_PART),), "s"),
    Panel("Making a sample, in a task", (_of_each(series.SAMPLE_PART),), "s"),
    Panel("Prefetched batches ready", (Query(_one(series.FEED_QUEUE)),)),
    Panel("Model FLOPs utilisation", (Query(_one(series.MFU)),), "percentunit"),
    Panel("A step's time that a rank spends alone", (_of_each(series.RANK_STEP),), "s"),
    Panel("Slowest rank", (Query(_one(series.SLOWEST_RANK)),)),
    Panel(
        "Stragglers, in medians",
        (Query(f"{_one(series.STRAGGLER, *series.STRAGGLER.labels)} > 0", "{{run}} rank {{rank}} {{node}} {{part}}"),),
    ),
    Panel("Goodput", (Query(_one(series.GOODPUT)),), "percentunit"),
    Panel("Step", (Query(_one(series.STEP)), Query(_one(series.CHECKPOINT_STEP), "{{run}} last checkpoint"))),
    Panel("Failures by cause", (Query(f"{_one(series.FAILURES, 'cause')} > 0", "{{run}} {{cause}}"),)),
    Panel("Steps done again", (Query(_one(series.REPLAYED)),)),
    Panel("Time from failure to first batch, in all", (Query(_one(series.RESTART)),), "s"),
    Panel("Age of the last verified checkpoint", (Query(_one(series.CHECKPOINT_AGE)),), "s"),
    Panel("Size of the last verified checkpoint", (Query(_one(series.CHECKPOINT_BYTES)),), "bytes"),
    Panel(
        "Training blocked by a checkpoint",
        (Query(_one(series.BLOCKED), "{{run}} last checkpoint"), _mean_blocked()),
        "s",
    ),
    Panel("Failed saves", (Query(_one(series.FAILED_SAVES)),)),
    Panel("Seconds since a worker was heard", (Query(_one(series.HEARTBEAT_AGE)),), "s"),
    Panel("Runs", (Query(_one(series.INFO, *series.INFO.labels)),), width=24, kind="table"),
)


def dashboard() -> dict[str, Any]:
    """Return the dashboard's JSON model."""
    return {
        "title": "ftexp",
        "uid": "ftexp",
        "tags": ["ftexp"],
        "schemaVersion": _SCHEMA_VERSION,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": _placed(PANELS),
    }


def _variables() -> list[dict[str, Any]]:
    """Return the viewer's choices: the Prometheus, and the runs."""
    runs = f'label_values({{__name__=~"({RAY_PREFIX})?{series.STEP.name}"}}, run)'
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "run",
            "label": "run",
            "type": "query",
            "datasource": _DATASOURCE,
            "definition": runs,
            "query": {"query": runs, "refId": "run"},
            "refresh": 2,  # refresh whenever the time range changes
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _placed(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Return the panels' models, placed from left to right and row by row."""
    placed, x, y, row_height = list[dict[str, Any]](), 0, 0, 0
    for number, panel in enumerate(panels, start=1):
        height = _HEIGHT // 2 if panel.kind == "stat" else _HEIGHT
        if x + panel.width > _WIDTH:
            x, y, row_height = 0, y + row_height, 0
        placed.append(_model(panel, number, {"x": x, "y": y, "w": panel.width, "h": height}))
        x, row_height = x + panel.width, max(row_height, height)
    return placed


def _model(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "title": panel.title,
        "type": panel.kind,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + place_in_panel),
                "datasource": _DATASOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
                "instant": panel.kind == "table",
                "range": panel.kind != "table",
                **({"format": "table"} if panel.kind == "table" else {}),
            }
            for place_in_panel, query in enumerate(panel.queries)
        ],
    }
