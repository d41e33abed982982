"""Writing the report of a run or a sweep into its directory."""

from __future__ import annotations

from ftexp.report.page import Report
from ftexp.report.png import png
from ftexp.report.source import read_run
from ftexp.report.sweep_page import SweepReport
from ftexp.rundir.names import CHARTS, REPORT_FILE
from ftexp.rundir.sweep_record import read_sweep_record
from ftexp.storage.directory import Storage


def open_report(run_dir: Storage) -> Report | SweepReport:
    """Read the content of a report; ConfigError if there is neither a run nor a sweep in `run_dir`."""
    if read_sweep_record(run_dir) is not None:
        return SweepReport(run_dir, REPORT_FILE)
    return Report(read_run(run_dir))


def save_report(report: Report | SweepReport, target: Storage, name: str = REPORT_FILE) -> str:
    """Write a report and its PNGs into `target`; return the report's path or URI. OSError if that fails."""
    target.write_bytes(name, report.html().encode())
    for chart, drawing in report.charts.items():
        target.child(CHARTS).write_bytes(f"{chart}.png", png(drawing))
    return target.child(name).uri


def write_report(run_dir: Storage) -> str:
    """Write the report and its PNGs into the run's or sweep's directory. Raises as the two functions above."""
    return save_report(open_report(run_dir), run_dir)
