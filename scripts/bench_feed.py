"""How fast images come, side by side: ftexp's feeds, torch's DataLoader and a plain Ray Data pipeline.

    uv run python scripts/bench_feed.py [--rounds 5] [--only rates] [--check] [--json FILE]

JPEG files of ImageNet's usual size (500x375, to 224) and of 160x160 pixels (to 128), cut from scikit-learn's two
photographs, so that decoding costs what it does in real data. Every side decodes by the same function, on all cores,
and hands over normalised batches of 64; sides take turns, and what comes before a side is warm isn't counted. No epoch
ends while the others are measured: they begin each anew. The cached feed runs on the smaller images, from its second
epoch on. Sides are compared within each round, since a shared machine changes its speed by the minute. Besides: the
memory of all processes with 1 and 10 times the data, and the time to the first batch at three positions, with a million
files listed.
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
from dataclasses import dataclass, field
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
    "ImageNet's": ((500, 375), 224, 1500, 2048),
    SMALL: ((160, 160), 128, 4000, 5120),
}  # stored, fed; files; counted
WARM_IMAGES = 1024
STREAMING, CACHED, LOADER, RAY_DATA = "ftexp streaming", "ftexp cached", "DataLoader", "Ray Data"
POSITIONS = {"position 0": 0.0, "half an epoch": 0.5, "epoch 1,000": 1000.0}
MILLION = 1_000_000
RATES, FIRSTS, MEMORY = "rates", "first", "memory"


def main() -> None:
    """Measure, print tables, and exit with 1 under --check if a target is missed."""
    parser = options_parser(__doc__, 5, "turns of each side")
    parser.add_argument("--files", type=int, default=MILLION, help="files listed for the time to the first batch")
    parser.add_argument("--only", nargs="+", choices=(MEMORY, RATES, FIRSTS), help="measure no more than these")
    options = parser.parse_args()
    parts, results = options.only or (MEMORY, RATES, FIRSTS), Results()
    console = Console(highlight=False, width=120)
    describe_machine(console)
    with tempfile.TemporaryDirectory() as folder, ray_of_this_machine():
        if MEMORY in parts:  # first, while this process holds nothing else
            results.memory_mib = measure_memory(Path(folder))
            console.print("memory: measured")
        if RATES in parts:
            results.rates = {name: measure_rates(Path(folder) / name, name, options.rounds) for name in SETS}
            console.print("rates: measured")
        if FIRSTS in parts:
            results.first_batch_s = measure_first_batches(Path(folder), options.files, options.rounds)
            console.print("first batches: measured")
    finish(console, vars(results), options.json, report(console, results), options.check)


@dataclass
class Results:
    """What was measured; empty: it wasn't."""

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # images/s a round, by images and side
    first_batch_s: dict[str, list[float]] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)


@contextlib.contextmanager
def ray_of_this_machine() -> Iterator[None]:
    """Ray as a run starts it, with CPUs to decode on beside those of the workers."""
    from ftexp.cluster.ray_cluster import prepare_environment, quiet_data, start_ray

    config = run_config()
    prepare_environment(config)
    # as the DataLoader's workers have; with Ray's own, 15, whatever else runs on this machine decides
    os.environ |= {"RAY_worker_niceness": "0"}
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

    from ftexp.cluster.resources import decoding_cpus, no_workers
    from ftexp.data.augment.pixels import Augment
    from ftexp.data.build import build_data
    from ftexp.data.feeds.feed import IndexedFeed, ToTensors
    from ftexp.data.feeds.streamed import bundle_rows
    from ftexp.data.order import SampleOrder
    from ftexp.data.plan import ShardPlan

    config = run_config(
        f"data.image_size={image_size}", f"data.feed={feed}", "data.val_fraction=0", "data.test_fraction=0"
    )
    data = dataclasses.replace(config.data, root=str(root))
    bundle = build_data(data)

    def fail(found: object) -> None:
        raise RuntimeError(f"no image should be bad: {found}")

    rows = bundle_rows(bundle, "train", decoding_cpus(config, no_workers()) // 2, fail)
    plan = ShardPlan(BATCH, 1, 10**12, rank=0, world_size=1)
    to_tensors = ToTensors(bundle.info, torch.device("cpu"), channels_last=False)
    return IndexedFeed(rows, SampleOrder(0, len(rows)), plan, to_tensors, Augment(config.augment, 0)).from_position


def measure_rates(root: Path, name: str, rounds: int) -> dict[str, list[float]]:
    """Images per second of each side, a figure a round."""
    import ray
    from baselines.feeds import data_loader, ray_data

    size, image_size, num_files, num_counted = SETS[name]
    paths = write_images(root, size, num_files)
    streamed = ftexp_feed(root, image_size, "streaming")
    num_cores = int(ray.cluster_resources()["CPU"]) // 2
    endless = paths * (1 + (WARM_IMAGES + num_counted) // num_files)
    sides: dict[str, Callable[[], Iterator[Any]]] = {
        STREAMING: lambda: streamed(0),
        LOADER: lambda: data_loader(endless, image_size, BATCH, num_cores),
        RAY_DATA: lambda: ray_data(endless, image_size, BATCH),
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
        rate(from_position(0), 4 * WARM_IMAGES)  # all processes have begun, and done all that they will do
        with closing(from_position(0)) as batches:  # type: ignore[type-var]
            held = []
            for number in range(num_files // BATCH):
                next(batches)
                if number % 4 == 0:
                    held.append(memory_mib())
        most[f"{num_files:,} images"] = max(held)
    return most


def memory_mib(root: int | None = None) -> float:
    """Of a process (None: this one) and all below it, shared pages counted once (proportional set size)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    total, waiting = 0, [root or os.getpid()]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


def report(console: Console, results: Results) -> list[str]:
    """Print the tables; returns a line for each target that is missed."""
    checks: list[Check] = []
    if results.rates:
        checks += report_rates(console, results.rates)
    if results.first_batch_s:
        table = Table("first batch from", "seconds", "least", "most", box=None)
        for name, values in results.first_batch_s.items():
            table.add_row(name, *(f"{value:.2f}" for value in figures(values)))
        console.print(table)
        medians = [statistics.median(values) for values in results.first_batch_s.values()]
        spread = max(max(values) - min(values) for values in results.first_batch_s.values())
        apart = (max(medians) - min(medians)) / spread
        checks.append(("first batch: slowest position less fastest, in spreads", apart, 1.0, False))
    if results.memory_mib:
        told = ", ".join(f"{value:,.0f} MiB over {name}" for name, value in results.memory_mib.items())
        console.print(f"most memory: {told}")
        one, ten = results.memory_mib.values()
        checks.append(("memory: 10 times the data : 1 time", ten / one, 1.1, False))
    return print_targets(console, checks)


def report_rates(console: Console, rates: dict[str, dict[str, list[float]]]) -> list[Check]:
    """Print how fast each side is, and how many times as fast as the DataLoader; returns what is to be checked."""
    table = Table("images", "feed", "images/s", "least", "most", f": {LOADER}", "least", "most", box=None)
    checks: list[Check] = []
    for name, sides in rates.items():
        for side, values in sides.items():
            speeds, ratios = figures(values), figures(quotients(values, sides[LOADER]))
            table.add_row(name, side, *(f"{speed:,.0f}" for speed in speeds), *(f"{ratio:.2f}" for ratio in ratios))
        for other, target in ((LOADER, 0.9), (RAY_DATA, 1.0)):
            ratio = statistics.median(quotients(sides[STREAMING], sides[other]))
            checks.append((f"{name}: streaming : {other}", ratio, target, True))
    console.print(table)
    cached = statistics.median(quotients(rates[SMALL][CACHED], rates[SMALL][LOADER]))
    return [*checks, (f"{SMALL}: cached : {LOADER}", cached, 5.0, True)]


def figures(values: list[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    return statistics.median(values), min(values), max(values)


def quotients(ours: list[float], theirs: list[float]) -> list[float]:
    """Of each round."""
    return [our / their for our, their in zip(ours, theirs, strict=True)]


if __name__ == "__main__":
    main()
