"""The page of a run: its charts, and the values of its template."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator

from ftexp.config.metric_names import ALWAYS_LOGGED
from ftexp.counting import counted
from ftexp.job.stopwatch import SECTIONS, TEACHER
from ftexp.report import tables
from ftexp.report.charts import Mark, line_chart, timeline_chart
from ftexp.report.confusion import confusion_chart
from ftexp.report.defaults import config_differences
from ftexp.report.drawing import Drawing
from ftexp.report.rendering import render
from ftexp.report.series import Series, curve, duration, minute, throughput
from ftexp.report.source import RunFiles
from ftexp.report.text import cut
from ftexp.report.timeline import PHASES, build_timeline

_WIDE, _NARROW = 1000.0, 360.0  # pixels; widths of the timeline, of which the screen shows one
_MAX_CELLS = 100  # largest number of classes for which a confusion matrix is drawn


class Report:
    """The report of a run. `charts`: {name of the PNG: drawing}."""

    def __init__(self, run: RunFiles) -> None:
        self.run, self._state = run, run.state
        self._timeline = build_timeline(run)
        self._rates = throughput(run, self._timeline)
        metrics = run.config.get("train", {}).get("metrics") or []
        # a chart's file is named after its metric
        self._metrics = (*ALWAYS_LOGGED, *(name for name in metrics if str(name).isidentifier()))
        self.charts = dict(self._charts())

    def _charts(self) -> Iterator[tuple[str, Drawing]]:
        run, timeline = self.run, self._timeline
        starts = [step for step, _ in timeline.attempts[1:]]
        faults = [Mark(one.step, f"{one.cause} after step {one.step:,}") for one in timeline.interruptions]

        def chart(title: str, *series: Series, from_zero: bool = False) -> Drawing:
            return line_chart(title, series, starts, faults, from_zero)

        for name in self._metrics:
            curves = [curve(run, split, f"{split}_{name}", split, split) for split in ("train", "val", "test")]
            if any(one.points for one in curves):
                yield name, chart(name.replace("_", " ").capitalize(), *curves)
        if self._rates:
            yield "throughput", chart("Throughput", Series("images/s", "train", self._rates), from_zero=True)
        parts = [curve(run, "train", f"{section}_ms", section, role) for section, role in _SECTIONS.items()]
        if any(one.points for one in parts):
            yield "step_time", chart("Where a step's time goes, in ms", *parts, from_zero=True)
        ranks = [curve(run, "train", f"rank_ms_{name}", title, role) for name, title, role in _RANKS]
        if any(one.points for one in ranks):
            yield "rank_time", chart("A step's time that a rank spends alone, in ms", *ranks, from_zero=True)
        rates = curve(run, "train", "lr", "learning rate", "val")
        if rates.points:
            yield "learning_rate", chart("Learning rate", rates)
        if timeline.invocations:
            yield "timeline", timeline_chart(run, timeline, _WIDE)
        found = run.evaluation
        if found and found.get("confusion") and len(found["classes"]) <= _MAX_CELLS:
            yield "confusion", confusion_chart([row["class"] for row in found["classes"]], found["confusion"])

    def html(self) -> str:
        """Return the whole HTML file."""
        run, state, timeline = self.run, self._state, self._timeline
        curves = (*self._metrics, "throughput", "step_time", "rank_time", "learning_rate")
        test = run.evaluation
        return render(
            "run.html",
            name=cut(state.get("name", "run"), 200),
            kind=_STATUS.get(str(state.get("status")), ""),
            subtitle=self._subtitle(),
            run=run,
            state=state,
            numbers=self._numbers(),
            charts=self.charts,
            curves=[self.charts[name] for name in curves if name in self.charts],
            timeline=timeline,
            narrow_timeline=timeline_chart(run, timeline, _NARROW),
            phases=[(phase, spent, PHASES[phase]) for phase, spent in timeline.seconds_by_phase().items() if spent],
            stragglers=tables.stragglers(run),
            checkpoints=tables.checkpoints(run),
            report_command=shlex.join(["python", "-m", "ftexp.report", run.uri]),
            evaluate_command=shlex.join(["python", "-m", "ftexp.evaluate", f"run={run.uri}"]),
            test=test,
            measured=tables.measured(test) if test else "",
            confused=tables.confused(test) if test and test.get("confusion") else [],
            classes=tables.worst_classes(test) if test else [],
            train_command=shlex.join(["python", "-m", "ftexp.train", *run.overrides]),
            differences=config_differences(run.config),
            facts=tables.facts(run),
        )

    def _subtitle(self) -> str:
        state, model = self._state, self.run.config.get("model", {}).get("name", "")
        parameters = state.get("model", {}).get("num_parameters")
        began = minute(state["started"]) if "started" in state else ""
        facts = (
            model,
            f"{parameters:,} parameters" if parameters else "",
            state.get("data", {}).get("name", ""),
            began,
        )
        return " · ".join(str(part) for part in facts if part)

    def _numbers(self) -> Iterator[tuple[str, str, str]]:
        """Yield (title, value, note below it) for each headline number."""
        state = self._state
        last, best = (state.get("metrics", {}).get(which) or {} for which in ("last", "best"))
        if (accuracy := last.get("test_accuracy")) is not None:
            loss = last.get("test_loss")  # null where it was not finite
            yield "test accuracy", f"{accuracy:.4f}", "" if loss is None else f"loss {loss:.4f}"
        if (accuracy := last.get("val_accuracy")) is not None:
            top = f"best {best['val_accuracy']:.4f} at epoch {best['epoch']}" if best.get("val_accuracy") else ""
            yield "val accuracy", f"{accuracy:.4f}", top
        yield "steps", f"{state.get('step', 0):,}", counted(state.get("epoch", 0), "epoch")
        if stopped := state.get("stopped"):
            yield "stopped early", f"epoch {stopped['epoch']:,}", cut(stopped["reason"], 120)
        goodput = state.get("goodput")
        yield "time", duration(state.get("seconds", 0.0)), counted(state.get("attempts", 0), "attempt")
        if goodput is not None:
            yield "goodput", f"{goodput:.1%}", "on steps that were kept"
        failures = state.get("failures", [])
        lost = sum(one.lost_s for one in self._timeline.interruptions)
        survived = len(failures) - (state.get("status") == "failed" and bool(failures))
        yield "failures", f"{survived:,}", f"survived, {duration(lost)} lost" if lost else "survived"
        if self._rates:
            yield "images/s", f"{statistics.median(rate for _, rate in self._rates):,.0f}", "median while training"


_ROLES = ("val", "train", "restoring", "test", "replaying", "restarting")
_SECTIONS = dict(zip((*SECTIONS, TEACHER), _ROLES, strict=True))  # section -> role, which gives its colour
_RANKS = (("max", "slowest", "fault"), ("median", "median", "val"), ("min", "fastest", "test"))
_STATUS = {"finished": "good", "failed": "bad", "interrupted": "paused", "running": "paused"}
