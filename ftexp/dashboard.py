"""`python -m ftexp.dashboard > dashboard.json`: a Grafana dashboard over the series of tracker=prometheus.

In Grafana: Dashboards, New, Import; it asks which Prometheus to read. See ftexp/trackers/README.md.
"""

from __future__ import annotations

import json

from ftexp.cli.entry import command_words, exiting_on_error
from ftexp.errors import ConfigError
from ftexp.trackers.dashboard import dashboard


def main() -> None:
    """Run the command."""
    words = command_words(__doc__)
    with exiting_on_error():
        if words:
            raise ConfigError(f"dashboard takes no arguments, but got {' '.join(words)}: python -m ftexp.dashboard")
        print(json.dumps(dashboard(), indent=1))


if __name__ == "__main__":
    main()
