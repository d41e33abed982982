"""Measure the accuracy lost to `data.shuffle_window`, by window, on data sorted by class.

    uv run python scripts/bench_window.py [--rounds 2] [--epochs 6] [--check] [--json FILE]

scikit-learn's digits in one parquet file, sorted by class, in row groups of 20: the worst case, in which a row group
holds one class. The default model is trained for a few epochs with each window, and with a shuffle of the whole epoch;
rounds are seeds. Takes 8 minutes on 2 cores.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from benching import Check, describe_machine, finish, options_parser, print_targets
from rich.console import Console
from rich.table import Table

ROW_GROUP = 20
WINDOWS = (1, 2, 4, 8, 16, None)  # row groups; None: the whole epoch
LARGEST = 16  # the window of the target: a quarter of an epoch


def main() -> None:
    """Measure, print the curve, and exit with 1 under --check if a large window costs accuracy."""
    parser = options_parser(__doc__, 2, "seeds")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    console = Console(highlight=False, width=120)
    describe_machine(console)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "sorted.parquet"
        write_sorted(file)
        accuracies = {
            str(window): [accuracy(file, window, options.epochs, seed) for seed in range(options.rounds)]
            for window in WINDOWS
        }
    table = Table("shuffle_window", "rows shuffled together", "test accuracy", "by seed", box=None)
    for window in WINDOWS:
        values = accuracies[str(window)]
        rows = f"{window * ROW_GROUP}" if window else "all"
        table.add_row(str(window), rows, f"{statistics.mean(values):.3f}", ", ".join(f"{v:.3f}" for v in values))
    console.print(table)
    lost = statistics.mean(accuracies["None"]) - statistics.mean(accuracies[str(LARGEST)])
    checks: list[Check] = [(f"accuracy lost at a window of {LARGEST} row groups", lost, 0.15, False)]
    finish(console, accuracies, options.json, print_targets(console, checks), options.check)


def write_sorted(file: Path) -> None:
    """Write the digits as PNGs, sorted by class."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    encoded = []
    by_class = np.argsort(labels, kind="stable")
    for pixels in images[by_class]:
        buffer = io.BytesIO()
        Image.fromarray(np.rint(pixels.reshape(8, 8) * (255 / 16)).astype(np.uint8)).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    table = pa.table({"image": encoded, "label": labels[by_class].astype(np.int64)})
    pq.write_table(table, file, row_group_size=ROW_GROUP)


def accuracy(file: Path, window: int | None, epochs: int, seed: int) -> float:
    """Return the test accuracy of one run."""
    name = f"window_{window}_{seed}"
    shape = [
        "data.image_size=8",
        "data.channels=1",
        "data.mean=[0.3053]",
        "data.std=[0.3760]",
        "data.test_fraction=0.2",
    ]
    words = [
        *("data=parquet", f"data.root={file}", "augment=digits", *shape),
        *(f"data.shuffle_window={window or 'null'}", f"train.epochs={epochs}", f"seed={seed}"),
        *(f"run.storage={file.parent}", f"run.name={name}"),
    ]
    subprocess.run([sys.executable, "-m", "ftexp.train", *words], check=True, stdout=subprocess.DEVNULL)
    record = json.loads((file.parent / name / "run.json").read_text())
    return float(record["metrics"]["last"]["test_accuracy"])


if __name__ == "__main__":
    main()
