"""Measure tasks on real pixels: multi-label sets of digits, and a rare digit with and without remedies.

    uv run python scripts/bench_tasks.py [--rounds 3] [--epochs 10] [--check] [--json FILE]

Both parts write scikit-learn's digits as PNGs with a CSV list. The first pastes two digits into quarters of a 16x16
picture and learns which digits are present (data.task=multi_label); its figure is the mean average precision. The
second reduces the eights to 2 % of the training samples and measures their recall on a complete test split: without
a remedy, with loss.class_weights=inv_freq, and with data.sampling=balanced. The default model; rounds are seeds. Takes
6 minutes on 2 cores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from benching import Check, describe_machine, finish, options_parser, print_targets
from PIL import Image
from rich.console import Console
from rich.table import Table

SIDE, CANVAS = 8, 16
NUM_TEST = 360  # test digits, out of 1,797; training pictures contain none of them
NUM_PAIRS = {"train": 2000, "test": 500}
RARE, RARE_SHARE = 8, 0.02
NEITHER = "neither"
REMEDIES: dict[str, list[str]] = {
    NEITHER: [],
    "loss.class_weights=inv_freq": ["loss.class_weights=inv_freq"],
    "data.sampling=balanced": ["data.sampling=balanced"],
}
SHAPE = ["data.channels=1", "data.mean=[0.3053]", "data.std=[0.3760]", "data.background=null"]


def main() -> None:
    """Measure, print the tables, and exit with 1 under --check if a target is missed."""
    parser = options_parser(__doc__, 3, "seeds")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    console = Console(highlight=False, width=120)
    describe_machine(console)
    results = dict[str, list[dict[str, float]]]()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        pairs, rare = write_pairs(directory / "pairs"), write_rare(directory / "rare")
        words = ["data.task=multi_label", "loss=bce", f"data.image_size={CANVAS}"]
        results["pairs"] = list(map(of_pairs, trained(pairs, options.epochs, options.rounds, "pairs", words)))
        console.print(f"pairs: {results['pairs']}")
        for number, (remedy, words) in enumerate(REMEDIES.items()):
            words = [*words, f"data.image_size={SIDE}"]
            runs = trained(rare, options.epochs, options.rounds, f"rare_{number}", words)
            results[remedy] = list(map(of_rare, runs))
            console.print(f"{remedy}: {results[remedy]}", markup=False)
    _print(console, results)
    means = {remedy: statistics.mean(run["recall"] for run in results[remedy]) for remedy in REMEDIES}
    precision = statistics.mean(run["average_precision"] for run in results["pairs"])
    checks: list[Check] = [("mean average precision of pairs", precision, 0.9, True)]
    checks += [
        (f"recall of the rare class gained by {remedy}", mean - means[NEITHER], 0.0, True)
        for remedy, mean in means.items()
        if remedy != NEITHER
    ]
    finish(console, results, options.json, print_targets(console, checks), options.check)


def _print(console: Console, results: dict[str, list[dict[str, float]]]) -> None:
    table = Table("run", "figure", "mean", "by seed", box=None)
    for run, rows in results.items():
        for figure in rows[0]:
            values = [row[figure] for row in rows]
            listed = ", ".join(f"{value:.3f}" for value in values)
            table.add_row(run, figure, f"{statistics.mean(values):.3f}", listed)
    console.print(table)


def digits() -> dict[str, tuple[Any, Any]]:
    """Return {split: (images uint8 [n, 8, 8], labels [n])}."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, SIDE, SIDE) * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(labels))
    parts = {"test": order[:NUM_TEST], "train": order[NUM_TEST:]}
    return {split: (images[part], labels[part]) for split, part in parts.items()}


def write_pairs(directory: Path) -> Path:
    """Write pictures of two digits, each in its own quarter; return their list."""
    draws, rows = np.random.default_rng(1), list[tuple[str, Any, str]]()
    for split, (images, labels) in digits().items():
        for _ in range(NUM_PAIRS[split]):
            canvas = np.zeros((CANVAS, CANVAS), np.uint8)
            chosen = draws.integers(len(labels), size=2)
            for number, place in zip(chosen, draws.choice(4, size=2, replace=False), strict=True):
                top, left = (SIDE * part for part in divmod(int(place), 2))
                canvas[top : top + SIDE, left : left + SIDE] = images[number]
            found = ";".join(str(label) for label in sorted(set(labels[chosen].tolist())))
            rows.append((_saved(directory, len(rows), canvas), found, split))
    return _listed(directory, rows)


def write_rare(directory: Path) -> Path:
    """Write single digits, with few of one class in the training split; return their list."""
    rows = list[tuple[str, Any, str]]()
    for split, (images, labels) in digits().items():
        is_rare, kept = labels == RARE, np.ones(len(labels), bool)
        if split == "train":
            wanted = round(RARE_SHARE / (1 - RARE_SHARE) * int((~is_rare).sum()))
            kept[np.flatnonzero(is_rare)[wanted:]] = False
        for number in np.flatnonzero(kept):
            rows.append((_saved(directory, len(rows), images[number]), labels[number], split))
    return _listed(directory, rows)


def _saved(directory: Path, number: int, pixels: Any) -> str:
    directory.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(directory / f"{number:05d}.png")
    return f"{number:05d}.png"


def _listed(directory: Path, rows: list[tuple[str, Any, str]]) -> Path:
    file = directory / "list.csv"
    file.write_text("path,label,split\n" + "".join(f"{path},{label},{split}\n" for path, label, split in rows))
    return file


def trained(listed: Path, epochs: int, rounds: int, name: str, words: list[str]) -> list[Path]:
    """Train one run per seed, as a sweep, two at a time; return their directories."""
    seeds = ",".join(map(str, range(rounds)))
    subprocess.run(
        [
            *(sys.executable, "-m", "ftexp.train", "-m", f"seed={seeds}"),
            *("data=image_list", f"data.root={listed}", "augment=digits", *SHAPE, *words),
            *(f"train.epochs={epochs}", "scaling.num_workers=1", "train.eval_every_epochs=100"),
            *(f"run.storage={listed.parent}", f"sweep.name={name}", "sweep.max_concurrent=2"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return sorted(file.parent for file in (listed.parent / "sweeps" / name).glob("*/evaluation_test.json"))


def of_pairs(run: Path) -> dict[str, float]:
    """Return the multi-label metrics on the test split."""
    found = _tested(run)
    return {"average_precision": found["average_precision"], "exact match": found["accuracy"]}


def of_rare(run: Path) -> dict[str, float]:
    """Return the metrics of the rare class and of all classes on the test split."""
    found = _tested(run)
    row = next(row for row in found["classes"] if row["class"] == str(RARE))
    return {"recall": row["recall"], "precision": row["precision"] or 0.0, "accuracy": found["accuracy"]}


def _tested(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "evaluation_test.json").read_text())
    return found


if __name__ == "__main__":
    main()
