"""Writing the report of a run, or of a sweep, where it belongs."""

from __future__ import annotations

from ftexp.report.page import Report
from ftexp.report.png import png
from ftexp.report.source import read_run
from ftexp.report.sweep_page import SweepReport
from ftexp.rundir.metrics import write_metrics_csv
from ftexp.rundir.names import CHARTS, REPORT_FILE
from ftexp.rundir.sweep_record import read_sweep_record
from ftexp.storage.directory import Storage


def write_report(run_dir: Storage, target: Storage | None = None, name: str = REPORT_FILE) -> str:
    """Write the report, its PNGs and metrics.csv into the run's or sweep's directory, or `target`; returns where it is.

    Raises:
        ConfigError: there is neither a run nor a sweep in `run_dir`.
        OSError: it can't be written.
    """
    target = target or run_dir
    report: Report | SweepReport
    if read_sweep_record(run_dir) is not None:
        report = SweepReport(run_dir, REPORT_FILE)
    else:
        run = read_run(run_dir)
        report = Report(run)
        write_metrics_csv(target, run.points)
    target.write_bytes(name, report.html().encode())
    for chart, drawing in report.charts.items():
        target.child(CHARTS).write_bytes(f"{chart}.png", png(drawing))
    return target.child(name).uri
