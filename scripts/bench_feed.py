"""Compare the speed of image feeds: ftexp's, torch's DataLoader and a plain Ray Data pipeline.

    uv run python scripts/bench_feed.py [--rounds 7] [--only rates] [--set data.decoder=pillow] [--check] [--json FILE]

Photograph-like JPEG files (scripts/photo_like.py) of ImageNet's usual size (500x375, to 224) and of 160x160 pixels (to
128). Every side applies a random resized crop and a flip in two processes and returns normalised batches of 64; some
also apply RandAugment. Sides take turns. Every turn starts its side again and excludes the warm-up; the baselines'
epochs are long enough not to end within a turn, and the cached feeds run from their second epoch. Sides are compared
within each round, because the speed of a shared machine changes by the minute. CPU time per image, over all processes,
varies less.

Also measured: the training process's own CPU time by part, with augment=deit; the memory of all processes with 1 and 10
times the data, for both feeds, with data.sampling=balanced; and the time to the first batch at three positions, for
both feeds and both samplings (the streaming feed lists a million files).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from benching import (
    Check,
    composed,
    cpu_s,
    describe_machine,
    figures,
    finish,
    memory_mib,
    options_parser,
    print_targets,
    quotients,
)
from photo_like import write_photos
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ftexp.job.data import TrainingData

BATCH = 64
PHOTOS, SMALL = "500x375", "160x160"
# stored size, fed size, number of files, images counted
SETS = {PHOTOS: ((500, 375), 224, 1500, 1024), SMALL: ((160, 160), 128, 4000, 2560)}
WARM_IMAGES = 512
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
CROP = ["augment.crop=rrc", "augment.hflip=0.5"]
WITH_RAND_AUGMENT = " + RandAugment"
RECIPES = {
    "": [*CROP, "augment.interpolation=bilinear"],
    WITH_RAND_AUGMENT: [*CROP, "augment.interpolation=bicubic", f"augment.auto_augment={RAND_AUGMENT}"],
}
STREAMING, CACHED, WHOLE = "ftexp streaming", "ftexp cached", "ftexp cached, whole images"
LOADER, FAST, TIMM = "DataLoader, Pillow", "DataLoader, fast decoder", "DataLoader, timm + RandAugment"
RAY_DATA = "Ray Data"
TARGETS = [
    (STREAMING, LOADER, 1.6),
    (STREAMING, FAST, 0.9),
    (STREAMING, RAY_DATA, 1.5),
    (CACHED, STREAMING, 2.0),
    (STREAMING + WITH_RAND_AUGMENT, TIMM, 1.0),
    (WHOLE, LOADER, 5.0),
]
POSITIONS = {"position 0": 0.0, "half an epoch": 0.5, "epoch 1,000": 1000.0}
SAMPLINGS = ("shuffle", "balanced")
MILLION = 1_000_000
NUM_CACHED = 1000  # files of the cached feed whose first batches are timed
PARTS = RATES, PROCESS, FIRSTS, MEMORY = "rates", "process", "first", "memory"
FETCH, TENSORS, ERASE, MIX, ALL = "fetch", "normalise", "erase", "mix", "all, with Ray's threads"
PROCESS_PARTS = (FETCH, TENSORS, ERASE, MIX)


def main() -> None:
    """Measure, print tables, and exit with 1 under --check if a target is missed."""
    parser = options_parser(__doc__, 7, "turns of each side")
    parser.add_argument("--files", type=int, default=MILLION, help="files listed for the time to the first batch")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure no more than these")
    parser.add_argument("--images", nargs="+", choices=SETS, default=list(SETS), help="take rates of these alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more overrides of ftexp's sides")
    options = parser.parse_args()
    results = Results()
    console = Console(highlight=False, width=140)
    describe_machine(console)
    with tempfile.TemporaryDirectory() as directory, ray_of_this_machine():
        if MEMORY in options.only:  # first, because this process holds nothing else yet
            results.memory_mib = measure_memory(Path(directory))
            console.print("memory: measured")
        if RATES in options.only:
            for name in options.images:
                results.rates[name] = measure_rates(Path(directory) / name, name, options.rounds, options.set)
                print_rates(console, name, results.rates[name])
        if PROCESS in options.only:
            results.process_ms = measure_process(Path(directory) / PROCESS, options.rounds, options.set)
            console.print("training process: measured")
        if FIRSTS in options.only:
            results.first_batch_s = measure_first_batches(Path(directory), options.files, options.rounds)
            console.print("first batches: measured")
    finish(console, dataclasses.asdict(results), options.json, report(console, results), options.check)


@dataclass
class Turns:
    """The figures of a side, one per turn."""

    images_per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)  # CPU time of all processes, per image


@dataclass
class Results:
    """The measurements; a part that wasn't measured is empty."""

    rates: dict[str, dict[str, Turns]] = field(default_factory=dict)  # by images and side
    process_ms: dict[str, list[float]] = field(default_factory=dict)  # CPU time per image, by part
    first_batch_s: dict[str, list[float]] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)


@contextlib.contextmanager
def ray_of_this_machine() -> Iterator[None]:
    """Start Ray as a run does, with CPUs for decoding in addition to the workers'."""
    from ftexp.cluster.ray_cluster import prepare_environment, quiet_data, start_ray

    config = run_config()
    prepare_environment(config)
    # the niceness of the DataLoader's workers; with Ray's default, 15, the result would depend on other processes
    os.environ |= {"RAY_worker_niceness": "0"}
    import ray

    start_ray(config)
    quiet_data(config)
    try:
        yield
    finally:
        ray.shutdown()


def run_config(*overrides: str) -> Any:
    """Return the config of a run on a directory of images."""
    return composed("data=image_folder", "data.root=.", "augment=none", *overrides)


Start = Callable[[int], Iterator[Any]]  # (position in samples) -> batches


def ftexp_feed(root: Path, image_size: int, feed: str, *overrides: str) -> Start:
    """Return the function that starts the feed of a single rank, built as in a worker."""
    return training_data(root, image_size, feed, *overrides).feed.from_position


def training_data(root: Path, image_size: int, feed: str, *overrides: str) -> TrainingData:
    """Return the training data of a single rank."""
    from ftexp.cluster.resources import decoding_cpus, no_workers
    from ftexp.data.augment.erasing import Erasing
    from ftexp.data.augment.mixing import Mixing
    from ftexp.data.augment.pixels import Augment
    from ftexp.data.build import build_data, drawn_by_class
    from ftexp.data.feeds.feed import CachedRows, IndexedFeed, Rows, ToTensors
    from ftexp.data.feeds.streamed import StreamedRows
    from ftexp.data.plan import ShardPlan
    from ftexp.data.sampling import run_order
    from ftexp.job.build import picture_augment
    from ftexp.job.data import TrainingData

    sizes = [f"data.image_size={image_size}", "data.val_fraction=0", "data.test_fraction=0"]
    config = run_config(*sizes, f"data.feed={feed}", *overrides)
    augment, device = config.augment, torch.device("cpu")
    bundle = drawn_by_class(config, build_data(dataclasses.replace(config.data, root=str(root)), augment))

    def fail(found: object) -> None:
        raise RuntimeError(f"no image should be bad: {found}")

    rows: Rows
    if "train" in bundle.streams:
        num_tasks = decoding_cpus(config, no_workers()) // 2
        pictures = picture_augment(config, bundle.info)
        rows = StreamedRows(bundle.streams["train"], bundle.info, num_tasks, fail, lambda _: None, pictures)
    else:
        rows = CachedRows(bundle.datasets["train"].iterator())
    plan = ShardPlan(BATCH, 1, 10**12, rank=0, world_size=1, in_pairs=augment.mixes)
    to_tensors = ToTensors(bundle.info, device, channels_last=False)
    return TrainingData(
        feed=IndexedFeed(
            rows, run_order(config, len(rows), None, bundle.classes), plan, to_tensors, Augment(augment, 0)
        ),
        rows={"train": rows},
        to_tensors=to_tensors,
        accumulate_steps=1,
        erasing=Erasing(augment, 0, device) if augment.erase_prob else None,
        mixing=Mixing(augment, bundle.info.num_classes, 0.1, 0) if augment.mixes else None,
    )


def measure_rates(root: Path, name: str, rounds: int, overrides: list[str]) -> dict[str, Turns]:
    """Return the figures of every side."""
    size, _, num_files, num_counted = SETS[name]
    write_photos(root, num_files, size=size)
    sides = sides_of(root, name, overrides)
    turns = {side: Turns() for side in sides}
    for _ in range(rounds):
        for side, start in sides.items():
            images_per_s, cpu_ms = rate(start(), num_counted)
            turns[side].images_per_s.append(images_per_s)
            turns[side].cpu_ms.append(cpu_ms)
    return turns


def sides_of(root: Path, name: str, overrides: list[str]) -> dict[str, Callable[[], Iterator[Any]]]:
    """Return {side: function that starts it}."""
    import ray
    from baselines.feeds import data_loader, fast_loader, ray_data, timm_loader

    _, image_size, num_files, num_counted = SETS[name]
    num_cores = int(ray.cluster_resources()["CPU"]) // 2
    times = 1 + -(-(WARM_IMAGES + num_counted) // num_files)
    loading = (root, image_size, BATCH, num_cores, times)
    sides: dict[str, Callable[[], Iterator[Any]]] = {}
    second_epoch = num_files // BATCH * BATCH
    for recipe, words in RECIPES.items():
        for feed, side, position in (("streaming", STREAMING, 0), ("cached", CACHED, second_epoch)):
            start = ftexp_feed(root, image_size, feed, *words, *overrides)
            sides[side + recipe] = functools.partial(start, position)
        if recipe == WITH_RAND_AUGMENT:
            sides[TIMM] = functools.partial(timm_loader, *loading, RAND_AUGMENT)
        else:
            sides[LOADER] = functools.partial(data_loader, *loading)
            sides[FAST] = functools.partial(fast_loader, *loading)
            sides[RAY_DATA] = functools.partial(ray_data, root, image_size, BATCH, times)
    sides[WHOLE] = functools.partial(ftexp_feed(root, image_size, "cached", *overrides), second_epoch)
    return sides


def rate(batches: Iterator[Any], num_counted: int) -> tuple[float, float]:
    """Return images per second after the warm-up, and CPU milliseconds per image over all processes."""
    with closing(batches):  # type: ignore[type-var]
        for _ in range(WARM_IMAGES // BATCH):
            next(batches)
        started, used_s = time.perf_counter(), cpu_s()
        for _ in range(num_counted // BATCH):
            next(batches)
        seconds = time.perf_counter() - started
        return num_counted / seconds, 1000 * (cpu_s() - used_s) / num_counted


def measure_process(root: Path, rounds: int, overrides: list[str]) -> dict[str, list[float]]:
    """Return CPU milliseconds per image of a training process on one CPU, by part; streamed, with augment=deit."""
    size, image_size, num_files, num_counted = SETS[PHOTOS]
    write_photos(root, num_files, size=size)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        spent = dict.fromkeys(PROCESS_PARTS, 0.0)
        data = by_part(training_data(root, image_size, "streaming", "augment=deit", *overrides), spent)
        with closing(data.feed.from_position(0)) as batches:
            for number, batch in enumerate(itertools.islice(batches, (WARM_IMAGES + num_counted) // BATCH)):
                for micro in batch.micro_batches:
                    data.augmented(micro, batch.start)
                if number == WARM_IMAGES // BATCH - 1:
                    spent.update(dict.fromkeys(spent, 0.0))
                    began_s = time.process_time()
            spent[ALL] = time.process_time() - began_s
        for part, seconds in spent.items():
            found.setdefault(part, []).append(1000 * seconds / num_counted)
    torch.set_num_threads(num_threads)
    return found


def by_part(data: TrainingData, spent: dict[str, float]) -> TrainingData:
    """Return `data` with timed parts: each adds its CPU seconds on the training thread to `spent`."""

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began_s = time.thread_time()
            try:
                return function(*arguments)
            finally:
                spent[part] += time.thread_time() - began_s

        return call

    feed, rows = data.feed, data.rows["train"]
    opened = rows.open

    @contextlib.contextmanager
    def open_timed(requests: Any) -> Iterator[Any]:
        with opened(requests) as take:
            yield timed(FETCH, take)

    # private attributes: there is no public hook between the parts
    to_tensors = timed(TENSORS, feed._to_tensors)  # type: ignore[attr-defined]
    to_tensors.targets = data.to_tensors.targets  # type: ignore[attr-defined]
    feed._to_tensors = to_tensors  # type: ignore[attr-defined]
    rows.open = open_timed  # type: ignore[method-assign]
    return dataclasses.replace(
        data,
        erasing=timed(ERASE, data.erasing),  # type: ignore[arg-type]
        mixing=timed(MIX, data.mixing),  # type: ignore[arg-type]
    )


def measure_first_batches(directory: Path, num_files: int, rounds: int) -> dict[str, list[float]]:
    """Return seconds from a start at a position to the first batch: streaming many files, and with a few cached."""
    few, many = directory / "few", directory / "many"
    sources = write_photos(few, NUM_CACHED, size=SETS[SMALL][0])
    for number in range(num_files):
        path = many / f"class_{number % 10}" / f"{number // 10000:04d}" / f"{number:08d}.jpg"
        if number % 10000 < 10:
            path.parent.mkdir(parents=True, exist_ok=True)
        os.link(sources[number % len(sources)], path)
    starts = {
        (feed, sampling): (ftexp_feed(root, SETS[SMALL][1], feed, *CROP, f"data.sampling={sampling}"), epoch)
        for feed, root, epoch in (("streaming", many, num_files), ("cached", few, NUM_CACHED))
        for sampling in SAMPLINGS
    }
    seconds: dict[str, list[float]] = {}
    for start, _ in starts.values():
        rate(start(0), 10 * BATCH)
    for _ in range(2 * rounds):
        for (feed, sampling), (start, epoch) in starts.items():
            for name, epochs in POSITIONS.items():
                started = time.perf_counter()
                with closing(start(int(epochs * epoch))) as batches:  # type: ignore[type-var]
                    next(batches)
                    taken_s = time.perf_counter() - started
                seconds.setdefault(f"{feed}, {sampling}: {name}", []).append(taken_s)
    return seconds


def measure_memory(directory: Path) -> dict[str, float]:
    """Return the peak MiB of all processes during an epoch, of the data and of ten times the data.

    With data.sampling=balanced and a random crop; excludes the pixels that the cached feed keeps.
    """
    peaks = {}
    for feed in ("streaming", "cached"):
        for times in (1, 10):
            root, num_files = directory / f"times_{times}", times * 2000
            if not root.exists():
                write_photos(root, num_files, size=SETS[SMALL][0])
            from_position = ftexp_feed(root, SETS[SMALL][1], feed, *CROP, "data.sampling=balanced")
            rate(from_position(0), 4 * WARM_IMAGES)  # afterwards all processes run, and have done every kind of work
            with closing(from_position(0)) as batches:  # type: ignore[type-var]
                held = []
                for number in range(num_files // BATCH):
                    next(batches)
                    if number % 4 == 0:
                        held.append(memory_mib())
            kept_mib = num_files * math.prod(SETS[SMALL][0]) * 3 / 2**20 if feed == "cached" else 0.0
            peaks[f"{feed}, {num_files:,} images"] = max(held) - kept_mib
    return peaks


def report(console: Console, results: Results) -> list[str]:
    """Print the tables, except for those of rates; return a line for each target that is missed."""
    checks = checks_of_rates(results.rates)
    if results.process_ms:
        checks += report_process(console, results.process_ms)
    if results.first_batch_s:
        table = Table("first batch from", "seconds", "least", "most", box=None)
        for name, values in results.first_batch_s.items():
            table.add_row(name, *(f"{value:.2f}" for value in figures(values)))
        console.print(table)
        for begin in range(0, len(table.rows), len(POSITIONS)):  # the positions of one feed and sampling
            names = list(results.first_batch_s)[begin : begin + len(POSITIONS)]
            values = [results.first_batch_s[name] for name in names]
            medians = [statistics.median(each) for each in values]
            spread = max(max(each) - min(each) for each in values)
            apart = (max(medians) - min(medians)) / spread
            title = f"first batch, {names[0].partition(':')[0]}: slowest position less fastest, in spreads"
            checks.append((title, apart, 1.0, False))
    if results.memory_mib:
        text = ", ".join(f"{value:,.0f} MiB ({name})" for name, value in results.memory_mib.items())
        console.print(f"most memory, without the pictures that a cached run keeps: {text}")
        one, ten, cached_one, cached_ten = results.memory_mib.values()
        checks.append(("memory, streaming: 10 times the data : 1 time", ten / one, 1.1, False))
        checks.append(("memory, cached: 10 times the data : 1 time", cached_ten / cached_one, 1.1, False))
    return print_targets(console, checks)


def print_rates(console: Console, name: str, sides: dict[str, Turns]) -> None:
    """Print the speed of each side for these images, and the ratio of the streaming feed's to it."""
    table = Table(name, "images/s", "least", "most", "streaming :", "least", "most", "CPU ms", box=None)
    for side, turns in sides.items():
        streaming = sides[STREAMING + (WITH_RAND_AUGMENT if side.endswith("RandAugment") else "")]
        speeds = figures(turns.images_per_s)
        ratios = figures(quotients(streaming.images_per_s, turns.images_per_s))
        cells = [f"{speed:,.0f}" for speed in speeds] + [f"{ratio:.2f}" for ratio in ratios]
        table.add_row(side, *cells, f"{statistics.median(turns.cpu_ms):.2f}")
    console.print(table)


def checks_of_rates(rates: dict[str, dict[str, Turns]]) -> list[Check]:
    """Return the checks of all images: medians of the ratios within a turn."""
    checks: list[Check] = []
    for name, sides in rates.items():
        for ours, theirs, target in TARGETS:
            ratio = statistics.median(quotients(sides[ours].images_per_s, sides[theirs].images_per_s))
            checks.append((f"{name}: {ours} : {theirs}", ratio, target, True))
    return checks


def report_process(console: Console, process_ms: dict[str, list[float]]) -> list[Check]:
    """Print the training process's CPU time by part; return the checks."""
    table = Table("training process, augment=deit", "CPU ms an image", "least", "most", box=None)
    for part, values in process_ms.items():
        table.add_row(part, *(f"{value:.3f}" for value in figures(values)))
    console.print(table)
    return [("training process: CPU ms an image", statistics.median(process_ms[ALL]), 0.15, False)]


if __name__ == "__main__":
    main()
