"""`python -m ftexp.evaluate run=<dir> [key=value ...]`: evaluate a checkpoint.

Keys: run (a run directory or URI), checkpoint (best, latest, or a directory's name), split (train, val, test),
weights (raw, ema), metrics (besides loss and accuracy; if not given, the run's train.metrics), tta (none, or hflip: the
mean of the logits of each image and its mirror image), batch_size,
threshold (for runs with data.task=multi_label: one probability for all classes, or one for each; default 0.5),
device (auto, cpu, cuda), data.root (new path of the run's data, if it was moved), out (a JSON file; if not given,
evaluation_<split>.json in the run, evaluation_<split>_ema.json for weights=ema, evaluation_<split>_hflip.json and
evaluation_<split>_ema_hflip.json with tta=hflip).

With data=<source> data.*=... it evaluates on other data. Then split may be all, which is the default for files.
Classes are matched by name, and images are prepared like the run's. Samples of new classes are excluded and counted;
missing classes have no row. The file is evaluation_<last part of data.root>_<split>.json.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, DictConfig

from ftexp.cli.entry import command_words, exiting_on_error, with_run
from ftexp.cli.parse import read_command
from ftexp.config.fields import choice, ranged
from ftexp.config.schema import AUTO, MULTI_LABEL, TTA, Config, ScalingConfig
from ftexp.config.source_names import AS_TRAINED
from ftexp.errors import ConfigError
from ftexp.evaluate.printing import evaluating, print_result

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftexp.storage.directory import Storage


_OWN = ("run", "checkpoint", "split", "weights", "tta", "metrics", "threshold", "batch_size", "device", "out")
_FOLLOWS = (*AS_TRAINED, "decode_size")
_OF_TRAINING = ("feed", "shuffle_window", "prefetch_batches")


@dataclass(kw_only=True)
class MovedData:
    """Path of the run's data, if it was moved."""

    root: str | None = None  # None: the path with which the run was trained


@dataclass(kw_only=True)
class EvaluateConfig:
    """Arguments of the command."""

    run: str = MISSING
    checkpoint: str = "best"  # best, latest, or the name of a directory under checkpoints/
    # all: only for other data; None: all for other data from files, else test
    split: str | None = choice(None, ("train", "val", "test", "all"))
    weights: str = choice("raw", ("raw", "ema"))  # the trained weights, or their EMA
    metrics: list[str] | None = None  # in addition to loss and accuracy; None: the run's train.metrics
    tta: str = choice("none", TTA)
    threshold: Any = None  # for data.task=multi_label: one for all classes, or one for each; None: 0.5
    batch_size: int = ranged(256, low=1)
    device: str = choice("auto", ("auto", "cpu", "cuda"))
    out: str | None = None
    data: MovedData = field(default_factory=MovedData)


def main() -> None:
    """Run the command; exit with 0, 1 or 2."""
    words = with_run(command_words(__doc__))
    if not any(_key(word) == "data" for word in words):
        with exiting_on_error():
            config = parse(words)
            with evaluating():
                result = evaluate(config)
        print_result(result)
        return
    with exiting_on_error():
        config, rest = _apart(words)
    from ftexp.cli.compose import run_hydra, to_config

    def task(composed: DictConfig) -> None:
        other = to_config(composed)
        with evaluating():
            result = evaluate(config, other)
        print_result(result)

    sys.exit(run_hydra(task, ["augment=none", *rest]))


def evaluate_words(words: list[str], compose: Callable[[list[str]], Config]) -> dict[str, Any]:
    """Evaluate as these words of the command say; `compose` composes the words about other data."""
    if not any(_key(word) == "data" for word in words):
        return evaluate(parse(words))
    config, rest = _apart(words)
    return evaluate(config, compose(["augment=none", *rest]))


def _apart(words: list[str]) -> tuple[EvaluateConfig, list[str]]:
    """Return the command's own words, parsed, and the words about other data; ConfigError names what is wrong."""
    rest = [word for word in words if _key(word) not in _OWN]
    config = parse([word for word in words if word not in rest])
    refuse(rest)
    return config, rest


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def refuse(words: list[str]) -> None:
    """Raise ConfigError if a word about other data sets a value that isn't read, or that the run determines."""
    for word in words:
        group, _, name = _key(word).partition(".")
        if word.startswith("-") or group not in ("data", "plugins"):
            raise ConfigError(f"{word} is not used: choose from {', '.join(_OWN)}, data, plugins")
        if group == "data" and name in _FOLLOWS:
            raise ConfigError(f"{word}: set by the trained run; remove it")
        if group == "data" and name in _OF_TRAINING:
            raise ConfigError(f"{word} is for training; remove it")


def parse(argv: list[str]) -> EvaluateConfig:
    """Parse key=value words; ConfigError names what is wrong."""
    config: EvaluateConfig = read_command(EvaluateConfig, argv, run="<run directory>")
    return config


def evaluate(config: EvaluateConfig, other: Config | None = None) -> dict[str, Any]:
    """Evaluate the checkpoint; return the content of the JSON file.

    Args:
        config: the arguments of the command.
        other: has the data to evaluate on; None: the run's own data.

    Raises:
        ConfigError: there is no run at `config.run`, no GPU for device=cuda, the run's own data have changed, or other
            data have no class of the run.
        CheckpointError: the run has no such checkpoint, or it is corrupt.
        DataError: the data can't be read.
        StorageError: `out` can't be written.
    """
    from ftexp.cli.trained_run import load_run_config, require_data
    from ftexp.data.root import require_root
    from ftexp.storage.directory import Storage, absolute

    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("device=cuda, but torch finds no GPU here: set device=auto or cpu")
    storage = Storage.at(config.run)
    run_config = load_run_config(storage)
    if other is not None:
        run_config = _on_other_data(run_config, other, storage)
    elif config.split == "all":
        raise ConfigError("split=all is for other data (data=...), since a run was trained on a part of its own")
    if config.threshold is not None and run_config.data.task != MULTI_LABEL:
        raise ConfigError(
            f"threshold={config.threshold} needs data.task=multi_label, but the run has data.task= "
            f"{run_config.data.task}: remove it"
        )
    if config.data.root is not None:
        data = dataclasses.replace(run_config.data, root=absolute(config.data.root))
        run_config = dataclasses.replace(run_config, data=data)
    (require_data if other is None else require_root)(run_config.data)
    if config.out is not None:
        Storage.at(config.out).parent.require_writable("out")
    from ftexp.cluster.ray_cluster import private_ray

    with private_ray(run_config) as run_config:
        from ftexp.evaluate.measure import measure  # imports torch and Ray Data

        return measure(config, run_config, storage, is_other=other is not None)


def _on_other_data(run_config: Config, other: Config, storage: Storage) -> Config:
    """Return the run's config with other data, prepared like its own; ConfigError if something doesn't fit."""
    from ftexp.cli.trained_run import SavedRun
    from ftexp.config.checks.validate import validate
    from ftexp.storage.directory import absolute

    data = SavedRun.at(storage.uri).data_as_seen(other.data)
    root = None if data.root is None else absolute(data.root)
    data = dataclasses.replace(data, root=root, num_classes=None, feed=AUTO, shuffle_window=None)
    plugins = [*run_config.plugins, *(name for name in other.plugins if name not in run_config.plugins)]
    model = dataclasses.replace(run_config.model, pretrained=False, pretrained_partial=False)
    # evaluation has no workers, and this may not be the machine that trained the run
    made = dataclasses.replace(run_config, data=data, model=model, plugins=plugins, scaling=ScalingConfig())
    validate(made, trains=False)
    return made
