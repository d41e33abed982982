"""Compare the time of `--help` and `--cfg job` with a bare Hydra app's: the cost before heavy imports.

    uv run python scripts/bench_help.py [--repeats 5] [--check]

The bare app has the same groups, files and defaults, but nothing of ftexp. Both are started in turns, so that a busy
machine slows both. With --check, exits with 1 if ftexp takes more than 1.5 times as long.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ftexp.config.schema import config_dir

MAX_RATIO = 1.5
BARE_APP = """
import hydra

@hydra.main(version_base="1.3", config_path={directory!r}, config_name="config")
def app(config):
    pass

app()
"""


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as directory:
        bare = bare_app(Path(directory))
        for words in (["--help"], ["--cfg", "job"]):
            bare_s, own_s = median_times([[bare, *words], ["-m", "ftexp.train", *words]], options.repeats)
            ratios.append(own_s / bare_s)
            print(f"{' '.join(words):10} bare {bare_s:.3f} s, ftexp {own_s:.3f} s, ratio {ratios[-1]:.2f}")
    if options.check and max(ratios) > MAX_RATIO:
        sys.exit(f"more than {MAX_RATIO} times as long")


def bare_app(directory: Path) -> str:
    """Write a Hydra app with the same groups, files and defaults, without schema and help text; return its path."""
    conf = directory / "conf"
    shutil.copytree(config_dir(), conf, ignore=shutil.ignore_patterns("hydra"))
    main = conf / "config.yaml"
    lines = main.read_text().splitlines()
    main.write_text(
        "\n".join(line for line in lines if line.strip() not in ("- schema", "- override hydra/help: ftexp"))
    )
    script = directory / "bare.py"
    script.write_text(BARE_APP.format(directory=str(conf)))
    return str(script)


def median_times(commands: list[list[str]], repeats: int) -> list[float]:
    """Return each command's median wall-clock seconds."""
    times: list[list[float]] = [[] for _ in commands]
    for _ in range(repeats):
        for words, taken in zip(commands, times, strict=True):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
