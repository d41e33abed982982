"""`python -m ftexp.report <run directory or URI> [--out FILE]`: write one HTML file about a run or a sweep.

It is written into the directory as report.html, with its charts as PNG in charts/; or to FILE, with charts/ next to it.
A run writes its report itself when it ends, unless report.enabled=false.
"""

from __future__ import annotations

import argparse

from ftexp.cli.entry import as_value, exiting_on_error, prepare_streams
from ftexp.errors import StorageError
from ftexp.report.page import Report
from ftexp.report.write import open_report, save_report
from ftexp.rundir.metrics import write_metrics_csv
from ftexp.rundir.names import REPORT_FILE
from ftexp.storage.directory import Storage


def main() -> None:
    """Run the command; exit with 0, with 1 if the report can't be written, with 2 if there is no run or sweep."""
    prepare_streams()
    parser = argparse.ArgumentParser(prog="python -m ftexp.report", description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=as_value, help="the directory of a run or a sweep, or its URI")
    parser.add_argument("--out", help=f"a file or URI; {REPORT_FILE} in that directory if not given")
    options = parser.parse_args()
    target, name = None, REPORT_FILE
    if options.out is not None:
        place = Storage.at(options.out)
        target, name = place.parent, place.name
    with exiting_on_error():
        print(f"written to {_written(options.run, target, name)}")


def _written(run: str, target: Storage | None, name: str) -> str:
    try:
        run_dir = Storage.at(run)
        report, place = open_report(run_dir), target or run_dir
        if isinstance(report, Report):
            write_metrics_csv(place, report.run.points)
        return save_report(report, place, name)
    except OSError as error:
        where = target.uri if target else run
        raise StorageError(f"the report can't be written to {where}: {error}; give another file with --out") from error


if __name__ == "__main__":
    main()
