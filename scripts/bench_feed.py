"""How fast images come, side by side: ftexp's feeds, torch's DataLoader and a plain Ray Data pipeline.

    uv run python scripts/bench_feed.py [--rounds 5] [--check] [--json FILE]

JPEG files of ImageNet's usual size (500x375, to 224) and of 160x160 pixels (to 128), cut from scikit-learn's two
photographs, so that decoding costs what it does in real data. Every side decodes by the same function, on all cores,
and hands over normalised batches of 64; sides take turns, and what comes before a side is warm isn't counted. The
cached feed runs on the smaller images, from its second epoch on. Then the time to the first batch at three positions,
with a million files listed, and the memory of all processes with 1 and 10 times the data.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benching import Check, composed, describe_machine, finish, options_parser, print_targets
from rich.console import Console
from rich.table import Table

BATCH = 64
SMALL = "160 px"
SETS = {
    "ImageNet's": ((500, 375), 224, 1500, 3072),
    SMALL: ((160, 160), 128, 4000, 7168),
}  # stored, fed; files; counted
WARM_IMAGES = 1536
STREAMING, CACHED, LOADER, RAY_DATA = "ftexp streaming", "ftexp cached", "DataLoader", "Ray Data"
POSITIONS = {"position 0": 0.0, "half an epoch": 0.5, "epoch 1,000": 1000.0}
MILLION = 1_000_000


def main() -> None:
    """Measure, print tables, and exit with 1 under --check if a target is missed."""
    parser = options_parser(__doc__, 5, "turns of each side")
    parser.add_argument("--files", type=int, default=MILLION, help="files listed for the time to the first batch")
    options = parser.parse_args()
    console = Console(highlight=False, width=120)
    describe_machine(console)
    with tempfile.TemporaryDirectory() as folder, ray_of_this_machine():
        rates = {name: measure_rates(Path(folder) / name, name, options.rounds) for name in SETS}
        console.print("rates: measured")
        firsts = measure_first_batches(Path(folder), options.files, options.rounds)
        console.print("first batches: measured")
        memory = measure_memory(Path(folder))
    misses = report(console, rates, firsts, memory)
    results = {"rates": rates, "first_batch_s": firsts, "memory_mib": memory}
    finish(console, results, options.json, misses, options.check)


@contextlib.contextmanager
def ray_of_this_machine() -> Iterator[None]:
    """Ray as a run starts it, with CPUs to decode on beside those of the workers."""
    from ftexp.scaling import prepare_environment, quiet_data, start_ray

    config = run_config()
    prepare_environment(config)
    import ray

    start_ray(config)
    quiet_data(config)
    try:
        yield
    finally:
        ray.shutdown()


def run_config(*overrides: str) -> Any:
    """The config of a run on a folder of images."""
    return composed("data=image_folder", "data.root=.", "augment=none", *overrides)


def write_images(root: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Crops of scikit-learn's two photographs, in ten folders."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos, rng = load_sample_images().images, np.random.default_rng(0)
    paths = []
    for number in range(count):
        photo, (width, height) = photos[number % 2], size
        top, left = rng.integers(0, photo.shape[0] - height + 1), rng.integers(0, photo.shape[1] - width + 1)
        buffer = io.BytesIO()
        Image.fromarray(photo[top : top + height, left : left + width]).save(buffer, "JPEG", quality=90)
        paths.append(root / f"class_{number % 10}" / f"{number:06d}.jpg")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(buffer.getvalue())
    return paths


def ftexp_feed(root: Path, image_size: int, feed: str) -> Callable[[int], Iterator[Any]]:
    """A feed of one rank, as a worker builds it: from a position on."""
    import dataclasses

    from ftexp.data.augment import Augment
    from ftexp.data.build import build_data
    from ftexp.data.feeds import IndexedFeed, Plan, ToTensors
    from ftexp.data.order import Order
    from ftexp.data.stream import bundle_rows
    from ftexp.scaling import decoding_cpus, no_workers

    config = run_config(
        f"data.image_size={image_size}", f"data.feed={feed}", "data.val_fraction=0", "data.test_fraction=0"
    )
    data = dataclasses.replace(config.data, root=str(root))
    bundle = build_data(data)

    def fail(found: object) -> None:
        raise RuntimeError(f"no image should be bad: {found}")

    rows = bundle_rows(bundle, "train", decoding_cpus(config, no_workers()) // 2, fail)
    plan = Plan(BATCH, 1, 10**12, rank=0, world_size=1)
    to_tensors = ToTensors(bundle.info, torch.device("cpu"), channels_last=False)
    return IndexedFeed(rows, Order(0, len(rows)), plan, to_tensors, Augment(config.augment, 0)).from_position


def measure_rates(root: Path, name: str, rounds: int) -> dict[str, list[float]]:
    """Images per second of each side, a figure a round."""
    import ray
    from rivals.feeds import data_loader, ray_data

    size, image_size, num_files, num_counted = SETS[name]
    paths = write_images(root, size, num_files)
    streamed = ftexp_feed(root, image_size, "streaming")
    num_cores = int(ray.cluster_resources()["CPU"]) // 2
    sides: dict[str, Callable[[], Iterator[Any]]] = {
        STREAMING: lambda: streamed(0),
        LOADER: lambda: data_loader(paths, image_size, BATCH, num_cores),
        RAY_DATA: lambda: ray_data(paths, image_size, BATCH),
    }
    if name == SMALL:
        cached = ftexp_feed(root, image_size, "cached")
        sides[CACHED] = lambda: cached(num_files // BATCH * BATCH)  # the second epoch
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, start in sides.items():
            rates[side].append(rate(start(), num_counted))
    return rates


def rate(batches: Iterator[Any], num_counted: int) -> float:
    """Images per second once the pipeline runs."""
    with closing(batches):  # type: ignore[type-var]
        for _ in range(WARM_IMAGES // BATCH):
            next(batches)
        started = time.perf_counter()
        for _ in range(num_counted // BATCH):
            next(batches)
        return num_counted / (time.perf_counter() - started)


def measure_first_batches(folder: Path, num_files: int, rounds: int) -> dict[str, list[float]]:
    """Seconds from asking at a position to the first batch, with many files listed."""
    root, sources = folder / "many", write_images(folder / "few", *SETS[SMALL][:1], count=1000)
    for number in range(num_files):
        path = root / f"class_{number % 10}" / f"{number // 10000:04d}" / f"{number:08d}.jpg"
        if number % 10000 < 10:
            path.parent.mkdir(parents=True, exist_ok=True)
        os.link(sources[number % len(sources)], path)
    from_position = ftexp_feed(root, SETS[SMALL][1], "streaming")
    rate(from_position(0), 10 * BATCH)
    seconds: dict[str, list[float]] = {name: [] for name in POSITIONS}
    for _ in range(2 * rounds):
        for name, epochs in POSITIONS.items():
            started = time.perf_counter()
            with closing(from_position(int(epochs * num_files))) as batches:  # type: ignore[type-var]
                next(batches)
                seconds[name].append(time.perf_counter() - started)
    return seconds


def measure_memory(folder: Path) -> dict[str, float]:
    """The most memory that all processes held during an epoch of the data, and of ten times the data; MiB."""
    most = {}
    for times in (1, 10):
        root, num_files = folder / f"times_{times}", times * 2000
        write_images(root, *SETS[SMALL][:1], count=num_files)
        from_position = ftexp_feed(root, SETS[SMALL][1], "streaming")
        with closing(from_position(0)) as batches:  # type: ignore[type-var]
            held = []
            for number in range(num_files // BATCH):
                next(batches)
                if number % 8 == 0:
                    held.append(memory_mib())
        most[f"{num_files:,} images"] = max(held)
    return most


def memory_mib() -> float:
    """Of this process and all below it, shared pages counted once (proportional set size)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    total, waiting = 0, [os.getpid()]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


def report(
    console: Console,
    rates: dict[str, dict[str, list[float]]],
    firsts: dict[str, list[float]],
    memory: dict[str, float],
) -> list[str]:
    """Print the tables; returns a line for each target that is missed."""
    table = Table("images", "feed", "images/s", "least", "most", box=None)
    for name, sides in rates.items():
        for side, values in sides.items():
            figures = (statistics.median(values), min(values), max(values))
            table.add_row(name, side, *(f"{value:,.0f}" for value in figures))
    console.print(table)
    table = Table("first batch from", "seconds", "least", "most", box=None)
    for name, values in firsts.items():
        table.add_row(name, *(f"{value:.2f}" for value in (statistics.median(values), min(values), max(values))))
    console.print(table)
    console.print("most memory: " + ", ".join(f"{value:,.0f} MiB over {name}" for name, value in memory.items()))

    def ratio(name: str, side: str, other: str) -> float:
        return statistics.median(rates[name][side]) / statistics.median(rates[name][other])

    checks: list[Check] = []
    for name in rates:
        checks.append((f"{name}: streaming : DataLoader", ratio(name, STREAMING, LOADER), 0.9, True))
        checks.append((f"{name}: streaming : Ray Data", ratio(name, STREAMING, RAY_DATA), 1.0, True))
    checks.append((f"{SMALL}: cached : DataLoader", ratio(SMALL, CACHED, LOADER), 5.0, True))
    medians = [statistics.median(values) for values in firsts.values()]
    spread = max(max(values) - min(values) for values in firsts.values())
    checks.append(
        ("first batch: slowest position less fastest, in spreads", (max(medians) - min(medians)) / spread, 1.0, False)
    )
    one, ten = memory.values()
    checks.append(("memory: 10 times the data : 1 time", ten / one, 1.1, False))
    return print_targets(console, checks)


if __name__ == "__main__":
    main()
