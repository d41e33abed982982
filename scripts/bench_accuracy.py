"""Does training on photographs reach timm's accuracy? Compare ftexp with a loop around timm.data.create_loader.

    uv run python scripts/bench_accuracy.py [--rounds 3] [--epochs 12] [--check] [--json FILE]

Photograph-like JPEGs (scripts/photo_like.py: a glyph of any size, anywhere on a photograph), 4,096 of 200x150 to train
on and 2,048 to test on, in 10 classes. Both sides train a small ResNet at 64 px, with and without a random resized
crop, with the same epochs, batch, optimiser, schedule and flip. Rounds are seeds; each side has its own random draws.
Test images are scaled and cropped by the same crop_pct. The two means agree if they differ by at most twice the
standard error of their difference. Takes 25 minutes on 2 cores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benching import Check, describe_machine, finish, options_parser, print_targets
from photo_like import write_photos
from rich.console import Console
from rich.table import Table

LOOP = Path(__file__).parent / "baselines" / "timm_loop.py"
STORED = (200, 150)
NUM_CLASSES, NUM_TRAIN, NUM_TEST = 10, 4096, 2048
SETTINGS: dict[str, Any] = {
    "model": "test_resnet",
    "num_classes": NUM_CLASSES,
    "image_size": 64,
    "crop_pct": 1.0,
    "batch_size": 64,
    "lr": 4e-3,
    "weight_decay": 0.05,
    "warmup_epochs": 1,
    "warmup_lr": 1e-5,
    "min_lr": 1e-5,
    "label_smoothing": 0.1,
    "hflip": 0.5,
    "scale": (0.35, 1.0),  # the crop's share of the picture's area
}
FTEXP, TIMM = "ftexp", "timm's loader"
CROPPED, WHOLE = "with the crop", "without"
AGREE = 2.0  # standard errors of the difference of two means


def main() -> None:
    """Measure, print the table, and exit with 1 under --check if the sides' means don't agree."""
    parser = options_parser(__doc__, 3, "seeds of each side")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    console = Console(highlight=False, width=120)
    describe_machine(console)
    results: dict[str, dict[str, list[float]]] = {crop: {FTEXP: [], TIMM: []} for crop in (CROPPED, WHOLE)}
    sides: dict[str, Callable[[dict[str, Any], bool, Path], float]] = {FTEXP: ftexp_accuracy, TIMM: loop_accuracy}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for seed, (split, count) in enumerate((("train", NUM_TRAIN), ("test", NUM_TEST))):
            write_photos(directory / "photos" / split, count, NUM_CLASSES, STORED, seed)
        for seed in range(options.rounds):
            settings = {**SETTINGS, "root": str(directory / "photos"), "epochs": options.epochs, "seed": seed}
            for crop in (CROPPED, WHOLE):
                for side, measure in sides.items():
                    began_s = time.perf_counter()
                    results[crop][side].append(measure(settings, crop == CROPPED, directory))
                    seconds = time.perf_counter() - began_s
                    console.print(f"seed {seed}: {side} {crop}: {results[crop][side][-1]:.4f}, {seconds:.0f} s")
    finish(console, results, options.json, report(console, results), options.check)


def ftexp_accuracy(settings: dict[str, Any], is_cropped: bool, directory: Path) -> float:
    """Return the test accuracy of one run of the command, with one CPU left for decoding."""
    name = f"{'cropped' if is_cropped else 'whole'}_{settings['seed']}"
    scale = f"augment.scale={list(settings['scale'])}".replace(" ", "")
    augment = ["augment.crop=rrc", "augment.interpolation=bicubic", scale] if is_cropped else []
    overrides = [
        *("data=image_folder", f"data.root={settings['root']}", f"data.image_size={settings['image_size']}"),
        *("data.val_fraction=0", f"data.crop_pct={settings['crop_pct']}"),
        *("augment=none", f"augment.hflip={settings['hflip']}", *augment),
        f"model.name={settings['model']}",
        *("optim=adamw", f"optim.lr={settings['lr']}", f"optim.weight_decay={settings['weight_decay']}"),
        *("schedule=cosine", *(f"schedule.{key}={settings[key]}" for key in ("warmup_epochs", "warmup_lr", "min_lr"))),
        *(f"train.epochs={settings['epochs']}", f"train.global_batch_size={settings['batch_size']}"),
        f"train.label_smoothing={settings['label_smoothing']}",
        *("scaling.num_workers=1", "scaling.resources_per_worker={CPU: 1}", f"seed={settings['seed']}"),
        *(f"run.storage={directory / 'runs'}", f"run.name={name}", "checkpoint.every_epochs=null"),
    ]
    subprocess.run([sys.executable, "-m", "ftexp.train", *overrides], check=True, stdout=subprocess.DEVNULL)
    record = json.loads((directory / "runs" / name / "run.json").read_text())
    return float(record["metrics"]["last"]["test_accuracy"])


def loop_accuracy(settings: dict[str, Any], is_cropped: bool, _: Path) -> float:
    """Return the test accuracy of the hand-written loop, with the same number of processes."""
    crop = {"scale": settings["scale"]} if is_cropped else {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    argument = json.dumps({**settings, "crop": crop, "num_workers": 1, "num_threads": 1})
    done = subprocess.run([sys.executable, str(LOOP), argument], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["test_accuracy"])


def report(console: Console, results: dict[str, dict[str, list[float]]]) -> list[str]:
    """Print the table and the crop's gain; return a line for each comparison whose means don't agree."""
    table = Table("test accuracy", "", "mean", "standard deviation", "by seed", box=None)
    checks: list[Check] = []
    for crop, sides in results.items():
        for side, values in sides.items():
            by_seed = ", ".join(f"{value:.4f}" for value in values)
            table.add_row(crop, side, f"{statistics.mean(values):.4f}", f"{statistics.stdev(values):.4f}", by_seed)
        ours, theirs = sides[FTEXP], sides[TIMM]
        error = ((statistics.variance(ours) + statistics.variance(theirs)) / len(ours)) ** 0.5
        apart = abs(statistics.mean(ours) - statistics.mean(theirs))
        console.print(f"{crop}: means differ by {apart:.4f}; the standard error of that is {error:.4f}")
        checks.append((f"{crop}: difference of the means, in standard errors", apart / error, AGREE, False))
    console.print(table)
    for side in (FTEXP, TIMM):
        gain = statistics.mean(results[CROPPED][side]) - statistics.mean(results[WHOLE][side])
        console.print(f"gain from the crop, {side}: {gain:+.4f}")
    return print_targets(console, checks)


if __name__ == "__main__":
    main()
