"""Measure the CPU time from an image's bytes to model input, by decoder, and the cost of a task that starts to decode.

    uv run python scripts/bench_decode.py [--rounds 15] [--json FILE]

JPEGs of a scikit-learn photograph in four sizes, to 224: the whole image, and a random part of it (augment.crop=rrc).
Sides take turns in one process with one thread; the figure is CPU time. Then a Ray task decodes one image by
torchvision in a new process: one forked from a process that has imported torch, and a plain one. Its figures: seconds
to its result, CPU seconds, private memory (Private_Clean and _Dirty) and proportional memory (PSS).
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benching import describe_machine, finish, options_parser
from rich.console import Console
from rich.table import Table

from ftexp.config.schema import AugmentConfig
from ftexp.data.augment.picture import PictureAugment
from ftexp.data.cropping import Fit
from ftexp.data.decoder import Decoding, on_one_thread
from ftexp.data.feeds.decoding import as_image, as_sample

SIZE = 224
PHOTOS = [(500, 375), (640, 427), (1600, 1200), (4000, 3000)]  # width, height
DECODE_SIZE = 792  # rrc's smallest part, 0.08 of the area, then has 224 pixels a side
DECODINGS = {
    "pillow": Decoding(),
    "torchvision": Decoding("torchvision"),
    f"decode_size={DECODE_SIZE}": Decoding("torchvision", DECODE_SIZE),
}
WHOLE, PART = "whole image", "random part"
MIN_SECONDS = 0.1  # CPU seconds over which one figure is measured


def main() -> None:
    """Measure and print."""
    options = options_parser(__doc__ or "", 15, "turns of each side").parse_args()
    console = Console(highlight=False, width=160)
    describe_machine(console)
    with on_one_thread("torchvision"):
        costs = {f"{width}x{height}": measure((width, height), options.rounds) for width, height in PHOTOS}
    tasks = {name: measure_task(name == "forked") for name in ("forked", "plain")}
    report(console, costs, tasks)
    finish(console, {"cost_ms": costs, "tasks": tasks}, options.json, [], options.check)


def photo(size: tuple[int, int]) -> bytes:
    """Return one of the photographs, scaled, as a JPEG."""
    import sklearn.datasets
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.open(Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg")
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure(size: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Return CPU milliseconds per image by side, one figure per round."""
    encoded, sides = photo(size), dict[str, Callable[[int], Any]]()
    for name, decoding in DECODINGS.items():
        fit = Fit(SIZE, decoding=decoding)
        if decoding.decode_size is None:
            sides[f"{WHOLE}, {name}"] = whole(encoded, fit)
        sides[f"{PART}, {name}"] = part(encoded, fit)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for make in sides.values():
        make(0)  # the first call imports
    for _ in range(rounds):
        for name, make in sides.items():
            began, count = time.process_time(), 0
            while time.process_time() - began < MIN_SECONDS:
                make(count)
                count += 1
            found[name].append(1000 * (time.process_time() - began) / count)
    return found


def whole(encoded: bytes, fit: Fit) -> Callable[[int], Any]:
    """Return a function that decodes the whole image, as in evaluation."""
    return lambda _: as_image(encoded, fit)


def part(encoded: bytes, fit: Fit) -> Callable[[int], Any]:
    """Return a function that decodes a random part, as in training; each position has its own part."""
    augment = PictureAugment(AugmentConfig(crop="rrc", interpolation="bicubic"), 0, fit)
    return lambda position: augment(as_sample(encoded, fit, is_whole=False).picture, position)


def measure_task(is_forked: bool, repeats: int = 3) -> dict[str, list[float]]:
    """Measure a task that decodes one image, each time in a new process."""
    from ftexp.cluster.hot_start.driver import HotStart
    from ftexp.cluster.ray_cluster import prepare_environment
    from ftexp.config.schema import Config, ScalingConfig

    config, encoded = Config(), photo(PHOTOS[0])
    prepare_environment(config)
    import ray

    hot_start = HotStart(ScalingConfig(hot_start="auto" if is_forked else "off"), num_threads=1)
    found: dict[str, list[float]] = {"seconds": [], "cpu_s": [], "private_mib": [], "pss_mib": []}
    try:
        with hot_start.raylet_settings():
            ray.init(
                address="local",
                num_cpus=1,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env=hot_start.runtime_env(),
            )
        task = ray.remote(max_calls=1)(decode_here)  # its process exits after one call
        ray.get(task.remote(encoded))  # the process that forks imports Ray at the first task
        for _ in range(repeats):
            time.sleep(2)  # until Ray has started and stopped its own processes
            began = time.perf_counter()
            for name, value in ray.get(task.remote(encoded)).items():
                found[name].append(value)
            found["seconds"].append(time.perf_counter() - began)
    finally:
        ray.shutdown()
        hot_start.stop()
    return found


def decode_here(encoded: bytes) -> dict[str, float]:
    """Decode; return the CPU time and memory of this process."""
    as_image(encoded, Fit(SIZE, decoding=Decoding("torchvision")))
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"cpu_s": time.process_time(), "private_mib": private / 1024, "pss_mib": kib["Pss"] / 1024}


def report(
    console: Console, costs: dict[str, dict[str, list[float]]], tasks: dict[str, dict[str, list[float]]]
) -> None:
    """Print the tables."""
    table = Table("ms of CPU for an image", *costs, box=None)
    for side in next(iter(costs.values())):
        table.add_row(side, *(shown(rounds[side]) for rounds in costs.values()))
    console.print(table)
    table = Table("a task's process", *tasks, box=None)
    for measure in next(iter(tasks.values())):
        table.add_row(measure, *(shown(found[measure]) for found in tasks.values()))
    console.print(table)


def shown(values: list[float]) -> str:
    """Format the median with the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
