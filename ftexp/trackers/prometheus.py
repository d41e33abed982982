"""Prometheus: the current state of a run, on an endpoint of the driver, or on a cluster next to Ray's own series.

Prometheus polls and stores. So nothing is sent from here, and nothing can arrive twice. The figures are read from the
run's records at each request, or at regular intervals if Ray's agents export them.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from ftexp.config.tracker_schema import HTTP, TrackerConfig
from ftexp.trackers.figures import Figure
from ftexp.trackers.registry import Key, Outcome, Point, TrackedRun, register_tracker
from ftexp.trackers.series import RUN_LABELS, SERIES, Series

_MAX_PORTS = 100  # number of ports to try: trials of a sweep run in parallel
_UPDATE_EVERY_S = 5.0  # seconds between updates of Ray's copies; its agents export every 10 s by default
_TOTAL = "_total"


class _Exporter(Protocol):
    where: str

    def close(self) -> None: ...


@register_tracker("prometheus", package="prometheus_client", keeps=False)
class PrometheusTracker:
    """The run's series, while the command runs."""

    def __init__(self, config: TrackerConfig, run: TrackedRun) -> None:
        wanted, labels = config.prometheus, (run.name, run.sweep or "")
        self._exporter: _Exporter
        if wanted.exporter(run.ray_address) == HTTP:
            self._exporter = _Endpoint(wanted.host, wanted.port, _Collector(run, labels))
        else:
            self._exporter = _RayMetrics(run, labels)
        self.where = self._exporter.where

    def held(self) -> Iterable[Key]:
        """Return nothing: Prometheus stores what it has polled."""
        return ()

    def log(self, points: Sequence[Point]) -> None:
        """Do nothing: the figures are read at each request."""

    def close(self, outcome: Outcome) -> None:  # noqa: ARG002 - the series end with the command
        """Stop exporting."""
        self._exporter.close()


class _Collector:
    """The collector that prometheus_client calls at each request."""

    def __init__(self, run: TrackedRun, labels: tuple[str, ...]) -> None:
        self._run, self._labels = run, labels

    def collect(self) -> Iterator[Any]:
        """Yield a family for each series that has a value now."""
        families: dict[str, Any] = {}
        for figure in self._run.figures():
            name = figure.series.name
            if name not in families:
                families[name] = _family(figure.series)
            families[name].add_metric((*self._labels, *figure.labels), figure.value)
        yield from families.values()


def _family(series: Series) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = (*RUN_LABELS, *series.labels)
    if series.is_counter:
        return CounterMetricFamily(series.name.removesuffix(_TOTAL), series.help, labels=labels)
    return GaugeMetricFamily(series.name, series.help, labels=labels)


class _Endpoint:
    """An HTTP server on a thread of the driver."""

    def __init__(self, host: str, port: int, collector: _Collector) -> None:
        from prometheus_client import CollectorRegistry

        registry = CollectorRegistry()
        registry.register(collector)
        self._server, self._thread = _serve(host, port, registry)
        shown = f"[{host}]" if ":" in host else host
        self.where = f"http://{shown}:{self._server.server_port}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _serve(host: str, first_port: int, registry: Any) -> tuple[Any, threading.Thread]:
    """Listen on the first free port from `first_port` on; OSError if all tried ports are taken."""
    from prometheus_client import start_http_server

    last = min(first_port + _MAX_PORTS, 65536)
    for port in range(first_port, last):
        try:
            server: tuple[Any, threading.Thread] = start_http_server(port, host, registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return server
    reason = f"ports {first_port} to {last - 1} of {host} are taken: set tracker.prometheus.port"
    raise OSError(errno.EADDRINUSE, reason)


class _RayMetrics:
    """Copy of the figures in Ray's metrics, which each node's agent exports under the same names with RAY_PREFIX."""

    def __init__(self, run: TrackedRun, labels: tuple[str, ...]) -> None:
        from ray.util import metrics

        self._run, self._run_tags = run, dict(zip(RUN_LABELS, labels, strict=True))
        kinds = {True: metrics.Counter, False: metrics.Gauge}
        self._metrics: dict[str, Any] = {
            series.name: kinds[series.is_counter](series.name, series.help, (*RUN_LABELS, *series.labels))
            for series in SERIES
        }
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}  # value of each counter so far
        self.where = "the metrics of Ray's nodes (ray_ftexp_...)"
        self._ended = threading.Event()
        self._update()
        threading.Thread(target=self._keep_updating, daemon=True, name="ray-metrics").start()

    def close(self) -> None:
        self._ended.set()
        self._update()

    def _keep_updating(self) -> None:
        while not self._ended.wait(_UPDATE_EVERY_S):
            with contextlib.suppress(Exception):  # Ray is ending; the run ends too, or restarts with a new Ray
                self._update()

    def _update(self) -> None:
        for figure in self._run.figures():
            metric = self._metrics[figure.series.name]
            tags = {**self._run_tags, **dict(zip(figure.series.labels, figure.labels, strict=True))}
            if not figure.series.is_counter:
                metric.set(figure.value, tags)
            elif (more := self._growth(figure)) > 0:
                metric.inc(more, tags)

    def _growth(self, figure: Figure) -> float:
        key = (figure.series.name, figure.labels)
        before = self._counted.get(key, 0.0)
        self._counted[key] = max(before, figure.value)
        return figure.value - before
