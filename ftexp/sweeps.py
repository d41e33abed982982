"""`python -m ftexp.sweeps <sweep directory>`: the leaderboard of a sweep, also while it runs.

Exit codes: 0 printed, 2 the command was wrong.
"""

from __future__ import annotations

import argparse
import sys

from ftexp.cli.entry import as_value, exiting_on_error, prepare_streams
from ftexp.cli.wrapping import say
from ftexp.storage.directory import Storage


def main() -> None:
    """Run the command."""
    prepare_streams()
    parser = argparse.ArgumentParser(prog="python -m ftexp.sweeps", description=__doc__.partition("\n\n")[0])
    parser.add_argument("sweep", type=as_value, help="a directory or URI: <run.storage>/sweeps/<sweep.name>")
    options = parser.parse_args()
    with exiting_on_error():
        show(Storage.at(options.sweep))


def show(directory: Storage) -> None:
    """Print the table, and the error of each failed trial."""
    from rich.console import Console

    from ftexp.rundir.ranking import ranked
    from ftexp.rundir.sweep_record import look
    from ftexp.sweep.show.leaderboard import table

    record, trials = look(directory)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table(record, ranked(record, trials), console))
    for each in trials:
        if each.trial.error is not None:
            say(console, f"{each.trial.name}: {each.trial.error}")


if __name__ == "__main__":
    main()
