"""Run a full epoch of each photo experiment, augmentation string and feature, on photograph-like images of real size.

    uv run python scripts/check_epochs.py [--pictures 5000] [--only experiments] [--json FILE]

The command trains an experiment with its own recipe and image size on JPEGs of 500x375 (scripts/photo_like.py); only
the model is replaced by a small one in fp32, because the data is what is checked. A string is checked by an epoch of a
worker's feed without a model: images are decoded, augmented, normalised, erased, mixed and counted. The command trains
a feature (a loss, task, metric, teacher, ...) at 64 px. Exits with 1 if anything fails, an image is missing or a value
isn't finite. Takes 20 minutes on 2 cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch
from bench_feed import BATCH, ray_of_this_machine, training_data
from benching import composed, describe_machine, finish, options_parser
from photo_like import write_photos
from rich.console import Console
from rich.table import Table

EXPERIMENTS, STRINGS, FEATURES = PARTS = ("experiments", "strings", "features")
IMAGE_SIZE = 224
SMALL_MODELS = {"vit": "test_vit", "deit": "test_vit", "convnext": "test_convnext", "resnet": "test_resnet"}  # timm's
AUTO_AUGMENTS = (
    *("rand-m9-mstd0.5-inc1", "rand-m7-mstd0.5-inc1", "rand-m15-n3-mmax20-p0.7", "rand-m9-n2-tweights"),
    *("original", "originalr-mstd0.5", "v0", "v0r-mstd0.5", "3a", "augmix-m3", "augmix-m5-w4-d2"),
)
OTHERS = {
    "augment=deit": ["augment=deit"],
    "rkrc": ["augment.crop=rkrc", "augment.hflip=0.5"],
    "rkrr, jitter, grey, blur": [
        *("augment.crop=rkrr", "augment.vflip=0.5", "augment.color_jitter=[0.4,0.4,0.4,0.1]"),
        *("augment.color_jitter_prob=0.8", "augment.grayscale=0.2", "augment.gaussian_blur=0.5"),
    ],
    "rand_augment in the worker": ["augment.rand_augment=rand-m9-mstd0.5-inc1", "augment.hflip=0.5"],
}
METRICS = "[top5,f1_macro,balanced_accuracy,auroc,average_precision,calibration_error]"
OF_DIRECTORIES, OF_LABELS, OF_NUMBERS = "photos", "labels.csv", "numbers.csv"  # data.root of the features' runs
BY_FEATURE: dict[str, tuple[str, list[str]]] = {
    "teacher": (OF_DIRECTORIES, []),  # the teacher of the distill runs below
    "loss=jsd": (OF_DIRECTORIES, ["loss=jsd", "augment.splits=3", "augment.auto_augment=augmix-m3"]),
    "loss=bce, mixing": (OF_DIRECTORIES, ["loss=bce", "augment.mixup_alpha=0.2", "augment.cutmix_alpha=1"]),
    "loss=focal, class weights": (OF_DIRECTORIES, ["loss=focal", "loss.class_weights=effective_num"]),
    "loss=asl": (OF_DIRECTORIES, ["loss=asl"]),
    "loss=poly, balanced": (OF_DIRECTORIES, ["loss=poly", "data.sampling=balanced"]),
    "metrics, beside, EMA": (
        OF_DIRECTORIES,
        [f"train.metrics={METRICS}", "train.eval=beside", "ema=warmup"],
    ),
    "distill=logits": (OF_DIRECTORIES, ["distill=logits", "distill.teacher={runs}/teacher"]),
    "distill=features": (OF_DIRECTORIES, ["distill=features", "distill.teacher={runs}/teacher"]),
    "resizing=progressive": (OF_DIRECTORIES, ["resizing=progressive"]),
    "multi_label": (OF_LABELS, ["data.task=multi_label", "loss=asl", "train.metrics=[average_precision]"]),
    "regression": (OF_NUMBERS, ["data.task=regression", "loss=huber", "train.metrics=[mae,r2]"]),
}


def main() -> None:
    """Run every epoch, print a line for each, and exit with 1 if one fails."""
    parser = options_parser(__doc__, 1, "unused")
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    console = Console(highlight=False, width=120)
    describe_machine(console)
    seconds: dict[str, float] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_photos(directory / "photos", options.pictures)
        if STRINGS in options.only:
            words = {f"auto_augment={words}": ["augment.crop=rrc", f"augment.auto_augment={words}"]
                     for words in AUTO_AUGMENTS}  # fmt: skip
            with ray_of_this_machine():
                for title, overrides in (words | OTHERS).items():
                    seconds[title] = epoch_of_feed(directory / "photos", options.pictures, overrides)
                    console.print(f"{title}: {options.pictures:,} images in {seconds[title]:.0f} s")
        for experiment in photo_experiments() if EXPERIMENTS in options.only else ():
            began_s = time.perf_counter()
            outcome = epoch_of_experiment(directory, experiment)
            seconds[experiment] = time.perf_counter() - began_s
            console.print(f"experiment={experiment}: {outcome} in {seconds[experiment]:.0f} s")
            if outcome != "finished":
                failed.append(f"experiment={experiment}: {outcome}")
        if FEATURES in options.only:
            write_lists(directory, directory / "photos")
            for title, (root, overrides) in BY_FEATURE.items():
                began_s = time.perf_counter()
                outcome = epoch_of_feature(directory, title, root, overrides)
                seconds[title] = time.perf_counter() - began_s
                console.print(f"{title}: {outcome} in {seconds[title]:.0f} s")
                if outcome != "finished":
                    failed.append(f"{title}: {outcome}")
    table = Table("one epoch", "seconds", box=None)
    for title, value in seconds.items():
        table.add_row(title, f"{value:.0f}")
    console.print(table)
    finish(console, seconds, options.json, failed, check=True)


def photo_experiments() -> list[str]:
    """Return the experiments whose data is image_folder."""
    from ftexp.config.schema import config_dir

    names = sorted(file.stem for file in (config_dir() / "experiment").glob("*.yaml"))
    return [name for name in names if composed(f"experiment={name}").data.name == "image_folder"]


def epoch_of_feed(root: Path, num_images: int, overrides: list[str]) -> float:
    """Return the seconds of an epoch; exit unless every image comes once, with finite values."""
    began_s, seen = time.perf_counter(), []
    data = training_data(root, IMAGE_SIZE, "streaming", *overrides)
    with closing(data.feed.from_position(0)) as batches:
        for number in range(-(-num_images // BATCH)):
            batch = next(batches)
            seen += batch.samples[: num_images - number * BATCH].tolist()
            for micro in batch.micro_batches:
                images = data.augmented(micro, batch.start).images
                if not torch.isfinite(images).all():
                    raise SystemExit(f"{overrides}: batch {number} holds what isn't finite")
    if sorted(seen) != list(range(num_images)):
        raise SystemExit(f"{overrides}: {len(set(seen)):,} of {num_images:,} images came")
    return time.perf_counter() - began_s


def epoch_of_experiment(directory: Path, experiment: str) -> str:
    """Return the status of a run of one epoch."""
    family = composed(f"experiment={experiment}").model.name
    small = next(name for prefix, name in SMALL_MODELS.items() if family.startswith(prefix))
    changed = [f"model.name={small}", "model.pretrained=false", "train.precision=fp32", "model.drop_path_rate=null"]
    return _status(directory, experiment, [f"experiment={experiment}", f"data.root={directory / 'photos'}", *changed])


def epoch_of_feature(directory: Path, title: str, root: str, overrides: list[str]) -> str:
    """Return the status of a run of one epoch at 64 px."""
    source = "image_folder" if root == OF_DIRECTORIES else "image_list"
    given = [override.format(runs=directory / "runs") for override in overrides]
    common = ["data.image_size=64", "augment=none", "augment.crop=rrc", "augment.hflip=0.5", "model.name=test_resnet"]
    name = title.translate(str.maketrans(" ,=", "___"))
    return _status(directory, name, [f"data={source}", f"data.root={directory / root}", *common, *given])


def write_lists(directory: Path, photos: Path) -> None:
    """Write two lists of the photos: one with the labels class and parity, one with a number as label."""
    classes = sorted(path.name for path in photos.iterdir())
    labels, numbers = ["path,label"], ["path,label"]
    for number, name in enumerate(classes):
        for path in sorted((photos / name).iterdir()):
            where = path.relative_to(directory)
            labels.append(f"{where},{name};{'odd' if number % 2 else 'even'}")
            numbers.append(f"{where},{number / len(classes)}")
    (directory / OF_LABELS).write_text("\n".join(labels) + "\n")
    (directory / OF_NUMBERS).write_text("\n".join(numbers) + "\n")


def _status(directory: Path, name: str, overrides: list[str]) -> str:
    given = [
        *overrides,
        *("train.epochs=1", "scaling.num_workers=1", "scaling.resources_per_worker={CPU: 1}"),
        *("data.val_fraction=0.02", "data.test_fraction=0.02"),
        *(f"run.storage={directory / 'runs'}", f"run.name={name}"),
    ]
    code = subprocess.run([sys.executable, "-m", "ftexp.train", *given], check=False).returncode
    record = directory / "runs" / name / "run.json"
    return str(json.loads(record.read_text())["status"]) if record.exists() else f"exit code {code}"


if __name__ == "__main__":
    main()
