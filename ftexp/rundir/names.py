"""Names of the files and directories in a run or sweep directory."""

CONFIG_FILE = "config.yaml"
OVERRIDES_FILE = "overrides.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
METRICS_CSV_FILE = "metrics.csv"
EVENTS_FILE = "events.jsonl"
TRACKERS_FILE = "trackers.json"  # {"id": the run's id in every tracker, "complete": trackers that have every point}
REPORT_FILE = "report.html"
SWEEP_FILE = "sweep.json"
LEADERBOARD_CSV_FILE = "leaderboard.csv"
LEADERBOARD_PNG_FILE = "leaderboard.png"

CHECKPOINTS = "checkpoints"
HANGS = "hangs"  # stacks of workers that made no progress
CHAOS = "chaos"  # a file for each injected fault
LEDGER = "ledger"
PROFILE = "profile"
CHARTS = "charts"  # the report's charts, as PNG
PREDICTIONS = "predictions"
EXPORTS = "exports"


def evaluation_file(split: str) -> str:
    """Return the name of the file with a report's evaluation of the split `train`, `val` or `test`."""
    return f"evaluation_{split}.json"
