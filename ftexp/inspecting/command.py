"""`python -m ftexp.data <any train overrides> [out=FILE.png]`: inspect the data of a run before training.

Lists samples by split and class, the feed, samples that can't be read, the pixels' mean and std next to data.mean and
data.std, and the decode rate. Draws the first 64 training samples as the model will see them. Nothing is trained.
Exit codes: 0 done, 1 the data can't be read, 2 the command was wrong.

out  the picture; <data.name>_samples.png in the current directory if not given

Samples that can't be read are listed and excluded, whatever data.on_bad_sample says. With more than 20,000 training
samples, only the pixels of the run's first 20,000 positions are measured.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ftexp.cli.compose import run_hydra, to_config
from ftexp.cli.entry import command_words, exiting_on_error
from ftexp.cli.wrapping import say
from ftexp.config.checks.validate import validate
from ftexp.config.schema import MULTI_LABEL, REGRESSION, AugmentConfig, Config
from ftexp.counting import counted
from ftexp.data.root import require_root
from ftexp.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from rich.console import Console

    from ftexp.cluster.resources import Workers
    from ftexp.data.info import DataBundle, DataInfo
    from ftexp.inspecting.inspect import Found

_MAX_CLASSES = 25  # of more classes, only the largest and the smallest are shown
_NUM_LARGEST, _NUM_SMALLEST = 20, 5
_MAX_BAD = 10
_TOLERANCE = 0.02  # tolerated difference from data.mean and data.std, for pixels scaled to 0..1
_CHANNELS = {1: ("grey",), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}


def main() -> None:
    """Run the command; exit with 0, 1 or 2."""
    words = command_words(__doc__)
    own = [word for word in words if word.startswith("out=")]
    with exiting_on_error():
        out = parse_out(own)
        if any(word in ("-m", "--multirun") for word in words):
            raise ConfigError("-m: data inspects one data set; remove it")

    def task(composed: DictConfig) -> None:
        inspect(to_config(composed, words), out)

    sys.exit(run_hydra(task, [word for word in words if word not in own]))


def parse_out(words: list[str]) -> Path | None:
    """Return the picture's path from out=... words, None without one; ConfigError if it can't be written there."""
    if len(words) > 1:
        raise ConfigError(f"{' '.join(words)}: give out= only once")
    if not words:
        return None
    path = Path(words[0].removeprefix("out=")).expanduser()
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{words[0]}: the picture is a PNG: give a name that ends in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"{words[0]}: the directory {path.parent} does not exist; create it, or give another")
    return path


def inspect(config: Config, out: Path | None = None) -> None:
    """Inspect the data that `config` names: print the facts, and draw samples to `out`.

    Raises:
        ConfigError: the config is wrong; nothing was started.
        DataError: the data can't be read.
        StorageError: the picture can't be written.
    """
    validate(config)
    require_root(config.data)
    out = out or Path(f"{config.data.name.replace('/', '_')}_samples.png")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError(f"{out} can't be written: give another file with out=...")
    from ftexp.cluster.ray_cluster import prepare_environment
    from ftexp.cluster.resources import decide_workers

    workers = decide_workers(config.scaling)
    prepare_environment(config)
    import ray  # noqa: F401 - before a thread imports a module that imports it

    from ftexp.cluster.importing import import_meanwhile
    from ftexp.cluster.ray_cluster import decoding_ray, quiet_data
    from ftexp.cluster.ray_watch import ending_with
    from ftexp.registry import load_plugins

    importing = import_meanwhile("ftexp.data.feeds.streamed")
    with decoding_ray(config) as running:
        importing.join()
        quiet_data(config)
        load_plugins(config.plugins)
        with ending_with(running.lost):
            _inspect(config, workers, out)


def _inspect(config: Config, workers: Workers, out: Path) -> None:
    from rich.console import Console

    from ftexp.data.build import build_data, drawn_by_class
    from ftexp.driver.resume import repeated_samples
    from ftexp.inspecting.inspect import look

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    skipping = dataclasses.replace(config, data=dataclasses.replace(config.data, on_bad_sample="skip"))
    with console.status("reading"):
        bundle = drawn_by_class(config, build_data(skipping.data))
        found = look(skipping, bundle, _decode_cpus(config, bundle, workers))
    _draw(config, found, out)  # before anything is printed: the reader may leave, as in `... | head`
    _print_facts(console, config, bundle, found)
    if (repeated := repeated_samples(config, bundle.info)) is not None:
        say(console, repeated, "yellow")
    _print_bad(console, config, bundle, found)
    _print_classes(console, bundle.info, found)
    _print_pixels(console, config, bundle.info, found)
    line = f"\npicture  {out}: the first {len(found.names)} training samples, augmented"
    say(console, line)


def _draw(config: Config, found: Found, out: Path) -> None:
    from ftexp.config.masking import masked
    from ftexp.inspecting.inspect import contact_sheet

    augment, usual = dataclasses.asdict(config.augment), dataclasses.asdict(AugmentConfig())
    changes = ", ".join(f"{name}={value}" for name, value in augment.items() if value != usual[name]) or "none"
    title = f"{config.data.name} · seed {config.seed} · augment: {changes}"
    where = f" · {masked(config.data.root)}" if config.data.root else ""
    subtitle = f"positions 0 to {len(found.names) - 1} of epoch 0, as the model sees them{where}"
    try:
        contact_sheet(found.images, found.names, title, subtitle).save(out)
    except OSError as error:
        raise StorageError(f"{out} can't be written: {error}; name another file with out=...") from error


def _decode_cpus(config: Config, bundle: DataBundle, workers: Workers) -> int:
    """Return the number of CPUs that decode for this run: next to the workers if it streams, otherwise before them."""
    from ftexp.cluster.resources import decoding_cpus, may_decode, no_workers

    # a Ray that is started here counts cores twice if tasks may decode during training: once for the workers
    while_training = bundle.streamed or (config.scaling.address is None and may_decode(config))
    return decoding_cpus(config, workers if while_training else no_workers())


def _print_facts(console: Console, config: Config, bundle: DataBundle, found: Found) -> None:
    from ftexp.config.masking import masked
    from ftexp.data.sampling import epoch_in_words

    info, rate = bundle.info, found.rate
    sizes = " · ".join(f"{count:,} {split}" for split, count in info.num_samples.items())
    decoding = "nothing to decode: the source is held in memory"
    if rate is not None:
        cpus = counted(rate.num_cpus, "CPU")
        decoding = f"{rate.images_per_s:,.0f} images/s on {cpus} (measured on {rate.num_images:,} images)"
    for title, text in (
        ("source", config.data.name),
        ("root", masked(config.data.root)),
        ("image", f"{info.image_size}×{info.image_size}×{info.channels}"),
        ("samples", f"{sizes} · {info.outputs_in_words}"),
        ("labels", _label_counts(info, found)),
        ("feed", f"{bundle.feed}: {bundle.why}"),
        ("epoch", epoch_in_words(config, info)),
        ("decoding", decoding),
        ("cost", _cost(found)),
        ("images", _traits(config, found)),
    ):
        if text is not None:
            say(console, f"{title:<9}{text}")
    for excluded in info.excluded or []:
        say(console, f"excluded {excluded}")
    for warning in info.warnings:
        say(console, f"! {warning}", "yellow")


def _cost(found: Found) -> str | None:
    """Return the time of each part of making a sample, as text."""
    if found.rate is None or not found.rate.parts_ms:
        return None
    parts = " · ".join(f"{name} {spent:.2f} ms" for name, spent in found.rate.parts_ms.items())
    return f"{parts}, of an image on one CPU"


def _traits(config: Config, found: Found) -> str | None:
    """Return the numbers of images that look different in a file browser, or need a setting, as text."""
    from ftexp.data.decoder import Traits

    data, numbers = config.data, found.traits
    turned = "turned upright" if data.exif_orientation else "left as stored: see data.exif_orientation"
    shown = [
        f"{numbers[trait]:,} {text}"
        for trait, text in (
            (Traits.ROTATED, f"rotated by their EXIF data, {turned}"),
            (Traits.TRANSPARENT, f"transparent, put on {data.background}"),
            (Traits.DARK, f"of 16 bits and dark at data.bit_depth={data.bit_depth}: are they of 12, or 14?"),
        )
        if numbers[trait]
    ]
    return f"{' · '.join(shown)} (of {found.num_decoded:,} that were read)" if shown else None


def _print_bad(console: Console, config: Config, bundle: DataBundle, found: Found) -> None:
    known = "" if found.others_read else f" of the {found.num_read:,} training samples that were read"
    if not found.bad:
        console.print(f"bad      none{known}")
        return
    console.print(f"bad      {counted(len(found.bad), 'sample')}{known} can't be read:", style="yellow")
    for sample in found.bad[:_MAX_BAD]:
        say(console, f"           {sample.where}: {sample.reason}")
    if len(found.bad) > _MAX_BAD:
        console.print(f"           and {len(found.bad) - _MAX_BAD:,} more")
    if config.data.on_bad_sample == "skip":
        line = "training excludes them (data.on_bad_sample=skip)"
    else:
        refusal = "stop at the first of them" if bundle.streamed else "refuse to start"
        line = f"training would {refusal}: fix them, or exclude them with data.on_bad_sample=skip"
    say(console, f"         {line}")


def _label_counts(info: DataInfo, found: Found) -> str | None:
    """Return the number of labels per sample, as text, for multi_label; None for other tasks."""
    from ftexp.data.targets import unpacked

    if info.task != MULTI_LABEL:
        return None
    numbers = unpacked(found.labels["train"], info.num_classes).sum(1, dtype=int)
    none, highest = int((numbers == 0).sum()), int(numbers.max())
    return f"{numbers.mean():.2f} per training sample on average, at most {highest}; {none:,} samples have none"


def _print_targets(console: Console, info: DataInfo, found: Found) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("target", "split", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("mean", "std", "min", "max"):
        table.add_column(title, justify="right")
    for number, name in enumerate(info.class_names):
        for split, labels in found.labels.items():
            if len(labels):
                values = labels[:, number].astype(float)
                measured = (values.mean(), values.std(), values.min(), values.max())
                table.add_row(Text(name), split, *(f"{value:.5g}" for value in measured))
    console.print()
    console.print(table)


def _print_classes(console: Console, info: DataInfo, found: Found) -> None:
    import numpy as np
    from rich.table import Table
    from rich.text import Text

    from ftexp.data.targets import class_counts

    if info.task == REGRESSION:
        _print_targets(console, info, found)
        return
    counts = {
        split: class_counts(labels, info.num_classes) if len(labels) else np.zeros(info.num_classes, np.int64)
        for split, labels in found.labels.items()
    }
    table = Table("class", *found.labels, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    shown, left_out = list(range(info.num_classes)), 0
    if len(shown) > _MAX_CLASSES:
        shown.sort(key=lambda number: -counts["train"][number])
        left_out = len(shown) - _NUM_LARGEST - _NUM_SMALLEST
        shown = shown[:_NUM_LARGEST] + shown[-_NUM_SMALLEST:]
    for place, number in enumerate(shown):
        if left_out and place == _NUM_LARGEST:
            table.add_row(Text(f"({left_out:,} classes in between not shown)", style="dim"))
        table.add_row(Text(info.class_names[number]), *(f"{count[number]:,}" for count in counts.values()))
    console.print()
    console.print(table)
    if lacking := int((counts["train"] == 0).sum()):
        console.print(f"{lacking:,} of {info.num_classes:,} classes have no training sample", style="yellow")


def _print_pixels(console: Console, config: Config, info: DataInfo, found: Found) -> None:
    from rich.table import Table

    mean, std = found.pixels.mean_std()
    names = _CHANNELS.get(info.channels, tuple(map(str, range(info.channels))))
    table = Table("channel", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("mean", "data.mean", "std", "data.std"):
        table.add_column(title, justify="right")
    for name, *values in zip(names, mean, info.mean, std, info.std, strict=True):
        table.add_row(name, *(f"{value:.4f}" for value in values))
    total, measured = len(found.labels["train"]), int(found.pixels.counts[0].sum()) // info.image_size**2
    of = f"all {total:,} training samples" if measured == total else f"{measured:,} of {total:,} training samples"
    console.print(f"\npixels   of {of}, scaled to 0..1\n")
    console.print(table)
    pairs = zip([*mean, *std], [*info.mean, *info.std], strict=True)
    if all(abs(found_value - configured) <= _TOLERANCE for found_value, configured in pairs):
        return
    if config.model.pretrained:
        hint = "data.mean and data.std must be those of the pretrained weights: check them"
    elif min(std) < 0.00005:
        hint = "a channel is constant, so data.std can't be set to its measured value"
    else:
        words = (
            f"data.{key}=[{','.join(f'{v:.4f}' for v in values)}]" for key, values in (("mean", mean), ("std", std))
        )
        hint = f"to normalise by the measured values, add: {' '.join(words)}"
    say(console, f"These differ by more than {_TOLERANCE}; {hint}", "yellow")
