"""The page: sections one after the other, from what matters most to what is looked up."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Iterator
from typing import Any

from ftexp.job.stopwatch import SECTIONS
from ftexp.report import tables
from ftexp.report.charts import Mark, line_chart, timeline_chart
from ftexp.report.confusion import confusion_chart
from ftexp.report.drawing import Drawing, svg
from ftexp.report.frame import document, section, tile
from ftexp.report.markup import Markup, element
from ftexp.report.series import Series, curve, duration, throughput
from ftexp.report.source import RunFiles
from ftexp.report.text import cut
from ftexp.report.timeline import build_timeline

_WIDE, _NARROW = 1000.0, 360.0  # of the timeline, in pixels; which one is seen depends on the screen
_MOST_CELLS = 100  # classes of a confusion matrix that is drawn


class Report:
    """A run, drawn. `charts` are by the name of their PNG."""

    def __init__(self, run: RunFiles) -> None:
        self._run, self._state = run, run.state
        self._timeline = build_timeline(run)
        self._rates = throughput(run, self._timeline)
        self.charts = dict(self._charts())

    def _charts(self) -> Iterator[tuple[str, Drawing]]:
        run, timeline = self._run, self._timeline
        starts = [step for step, _ in timeline.attempts[1:]]
        faults = [Mark(one.step, f"{one.cause} after step {one.step:,}") for one in timeline.interruptions]

        def chart(title: str, *series: Series, from_zero: bool = False) -> Drawing:
            return line_chart(title, series, starts, faults, from_zero)

        for name in ("loss", "accuracy"):
            curves = [curve(run, split, f"{split}_{name}", split, split) for split in ("train", "val", "test")]
            if any(one.points for one in curves):
                yield name, chart(name.capitalize(), *curves)
        if self._rates:
            yield "throughput", chart("Throughput", Series("images/s", "train", self._rates), from_zero=True)
        parts = [curve(run, "train", f"{section}_ms", section, role) for section, role in _SECTIONS.items()]
        if any(one.points for one in parts):
            yield "step_time", chart("Where a step's time goes, in ms", *parts, from_zero=True)
        rates = curve(run, "train", "lr", "learning rate", "val")
        if rates.points:
            yield "learning_rate", chart("Learning rate", rates)
        if timeline.calls:
            yield "timeline", timeline_chart(run, timeline, _WIDE)
        found = run.evaluation
        if found and found.get("confusion") and len(found["classes"]) <= _MOST_CELLS:
            yield "confusion", confusion_chart([row["class"] for row in found["classes"]], found["confusion"])

    def html(self) -> str:
        """The whole file."""
        name = cut(str(self._state.get("name", "run")), 200)
        return document(name, self._header(name), *self._sections())

    def _header(self, name: str) -> Markup:
        state = self._state
        status = str(state.get("status", "unknown"))
        data, model = state.get("data", {}), self._run.config.get("model", {}).get("name", "")
        parameters = state.get("model", {}).get("num_parameters")
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(state["started"])) if "started" in state else ""
        told = (str(model), f"{parameters:,} parameters" if parameters else "", str(data.get("name", "")), began)
        subtitle = " · ".join(filter(None, told))
        return element(
            "header",
            element("h1", name, " ", element("span", status, class_=f"status {_STATUS.get(status, '')}")),
            element("p", subtitle, class_="faint"),
            element("p", element("code", self._run.uri), class_="faint"),
            element("p", state["error"], class_="error") if state.get("error") else None,
            element("dl", (tile(*one) for one in self._numbers()), class_="tiles"),
        )

    def _numbers(self) -> Iterator[tuple[str, str, str]]:
        """(title, value, what stands below) of the headline."""
        state = self._state
        last, best = (state.get("metrics", {}).get(which) or {} for which in ("last", "best"))
        if (accuracy := last.get("test_accuracy")) is not None:
            loss = last.get("test_loss")  # null where it was not finite
            yield "test accuracy", f"{accuracy:.4f}", "" if loss is None else f"loss {loss:.4f}"
        if (accuracy := last.get("val_accuracy")) is not None:
            top = f"best {best['val_accuracy']:.4f} at epoch {best['epoch']}" if best.get("val_accuracy") else ""
            yield "val accuracy", f"{accuracy:.4f}", top
        yield "steps", f"{state.get('step', 0):,}", f"{state.get('epoch', 0):,} epochs"
        goodput = state.get("goodput")
        yield "time", duration(state.get("seconds", 0.0)), f"{state.get('attempts', 0):,} attempts"
        if goodput is not None:
            yield "goodput", f"{goodput:.1%}", "on steps that counted"
        failures = state.get("failures", [])
        lost = sum(one.lost_s for one in self._timeline.interruptions)
        survived = len(failures) - (state.get("status") == "failed" and bool(failures))
        yield "failures", f"{survived:,}", f"survived, {duration(lost)} lost" if lost else "survived"
        if self._rates:
            yield "images/s", f"{statistics.median(rate for _, rate in self._rates):,.0f}", "median while training"

    def _sections(self) -> Iterator[Markup]:
        run, timeline = self._run, self._timeline
        pairs = [self._figure(name) for name in ("loss", "accuracy", "throughput", "step_time", "learning_rate")]
        if any(pairs):
            note = "Shaded: every other attempt. Dashed: failures. Fainter: the extremes of points that fall together."
            yield section("Curves", element("div", pairs, class_="grid"), note=note)
        if timeline.calls:
            both = (
                element("figure", svg(drawing), class_=kind)
                for kind, drawing in (
                    ("wide", self.charts["timeline"]),
                    ("narrow", timeline_chart(run, timeline, _NARROW)),
                )
            )
            note = "What is shorter than a pixel is drawn a pixel wide; the table has what it took."
            commands = f" The command was given {len(timeline.calls)} times; time between is left out."
            more = commands if len(timeline.calls) > 1 else ""
            yield section("Timeline", *both, tables.phases(timeline), note=note + more)
        if timeline.interruptions:
            yield section("Failures and recoveries", tables.interruptions(timeline))
        if run.named("checkpoint_saved", "checkpoint_failed"):
            yield section("Checkpoints", tables.checkpoints(run))
        yield self._evaluation()
        words = element("pre", " ".join(["python -m ftexp.train", *map(shlex.quote, run.overrides)]))
        whole = element("details", element("summary", "config.yaml"), element("pre", run.config_text))
        note = "Where it differs from the defaults; below, the whole."
        yield section("Config", words, tables.config(run), whole, note=note)
        yield section("Versions and hardware", tables.facts(run))

    def _figure(self, name: str) -> Markup | None:
        drawing = self.charts.get(name)
        if drawing is None:
            return None
        return element("figure", element("figcaption", drawing.title), svg(drawing))

    def _evaluation(self) -> Markup:
        found = self._run.evaluation
        if found is None:
            command = f"python -m ftexp.evaluate run={shlex.quote(self._run.uri)}"
            how = (element("code", command), " measures the best checkpoint; then write this report again.")
            return section("Test", element("p", "The run left no ", _FILE, ". ", how))
        where = f"{found['checkpoint']}, after" if found.get("checkpoint") else "The weights after"
        note = (
            f"{where} step {found['step']:,}, on {found['num_samples']:,} {found['split']} samples: "
            f"accuracy {found['accuracy']:.4f}."
        )
        matrix = self._figure("confusion")
        worst = tables.confused(found) if found.get("confusion") else None
        left = element("div", matrix, element("h3", "Taken for each other") if worst else None, worst)
        right = element("div", element("h3", "By class, the worst first"), tables.classes(found))
        mistakes = found.get("mistakes") or []
        pictures = element("div", (_mistake(one) for one in mistakes), class_="pictures")
        shown = (element("h3", "Most confident mistakes"), pictures) if mistakes else ()
        return section("Test", element("div", left, right, class_="grid"), *shown, note=note)


_FILE = element("code", "evaluation_test.json")
_SECTIONS = dict(zip(SECTIONS, ("val", "train", "restoring", "test", "replaying"), strict=True))  # their colours
_STATUS = {"finished": "good", "failed": "bad", "interrupted": "paused", "running": "paused"}


def _mistake(one: dict[str, Any]) -> Markup:
    told = element(
        "figcaption", element("b", cut(str(one["label"]), 40)), f" taken for {cut(str(one['prediction']), 40)}",
        element("span", f"{one['confidence']:.1%} sure", class_="faint"),
    )  # fmt: skip
    return element("figure", element("img", src=f"data:image/png;base64,{one['png']}", alt=""), told)
