"""Writing a run's report where it belongs."""

from __future__ import annotations

from ftexp.report.page import Report
from ftexp.report.png import png
from ftexp.report.source import read_run
from ftexp.storage import Storage

REPORT_FILE = "report.html"
CHARTS = "charts"  # the folder of the PNGs


def write_report(run_dir: Storage, target: Storage | None = None, name: str = REPORT_FILE) -> str:
    """Write the report and its PNGs into the run directory, or into `target`; returns where the report is.

    Raises:
        ConfigError: there is no run in `run_dir`.
        OSError: it can't be written.
    """
    target = target or run_dir
    report = Report(read_run(run_dir))
    target.write_bytes(name, report.html().encode())
    for chart, drawing in report.charts.items():
        target.child(CHARTS).write_bytes(f"{chart}.png", png(drawing))
    return target.child(name).uri
