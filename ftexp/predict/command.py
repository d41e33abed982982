"""`python -m ftexp.predict run=<dir> [data=image_folder data.root=<dir>] [key=value ...]`: predict many images.

Writes files with path, label, probability, the next best classes, and an error if an image can't be read. The number of
images is unlimited. The same command resumes. Exit codes: 0 done, 1 failed, 2 the command was wrong, 75 ended by
SIGTERM, 130 interrupted.

run         a run directory or URI
checkpoint  best, latest, or a directory's name under checkpoints/ (default: best)
weights     raw, or ema: their EMA, if the run has one (default: raw)
tta         none, or hflip: the mean of the logits of each image and its mirror image (default: none)
data, data.*  images to predict, as for training (image_folder, image_list, parquet, webdataset); need no labels.
            Without data=..., the run's own data. Size and normalisation are always the run's
split       all, train, val or test (default: all if data=... reads files, else test)
out         a directory or URI (default: <run>/predictions/<name of the data>, with split, weights and tta if given)
scaling, scaling.*  num_workers: processes with the model (auto: up to two, or one per GPU); address joins a cluster
predict.top_k       classes for each image (5, or as many as there are)
predict.threshold   with data.task=multi_label: images get all classes with a higher probability; one number for all
            classes, or a list with one for each (0.5)
predict.format      parquet or csv
predict.part_rows   images in a file (1000); unfinished files are lost when the command is killed
predict.batch_size  images in a batch of the model (64)
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, DictConfig

from ftexp.cli.compose import offer_option, run_hydra, to_config
from ftexp.cli.entry import command_words, exiting_on_error, with_run
from ftexp.cli.parse import read_command
from ftexp.config.checks.validate import validate
from ftexp.config.fields import choice, ranged
from ftexp.config.schema import AUTO, MULTI_LABEL, SINGLE_LABEL, TTA, Config, DataConfig
from ftexp.config.source_names import AS_TRAINED, reads_files
from ftexp.errors import ConfigError
from ftexp.rundir.names import PREDICTIONS

if TYPE_CHECKING:
    from ftexp.cli.trained_run import SavedRun
    from ftexp.storage.directory import Storage

_OWN = ("run", "checkpoint", "weights", "tta", "split", "out")
_SCALING = ("num_workers", "use_gpu", "resources_per_worker", "address", "hot_start")  # the fields that are read
_FOLLOWS = (*AS_TRAINED, "decode_size")
_OF_TRAINING = ("feed", "shuffle_window", "prefetch_batches", "on_bad_sample")
_SPLITTING = ("val_fraction", "test_fraction", "split_seed")
_RUNS_DATA = "of_the_run"  # option of group `data` for the run's own data
_TOP_K = 5


@dataclass(kw_only=True)
class Settings:
    """Settings under `predict.`"""

    top_k: int | None = ranged(None, low=1)
    threshold: Any = None  # for data.task=multi_label: one for all classes, or one for each; None: 0.5
    batch_size: int = ranged(64, low=1)
    part_rows: int = ranged(1000, low=1)
    format: str = choice("parquet", ("parquet", "csv"))


@dataclass(kw_only=True)
class PredictConfig:
    """Arguments of the command, except data and scaling."""

    run: str = MISSING
    checkpoint: str = "best"
    weights: str = choice("raw", ("raw", "ema"))
    tta: str = choice("none", TTA)
    split: str | None = choice(None, ("all", "train", "val", "test"))
    out: str | None = None
    predict: Settings = field(default_factory=Settings)


def main() -> None:
    """Run the command; exit with 0, 1, 2, 75 or 130."""
    words = with_run(command_words(__doc__))
    own = [word for word in words if _key(word) in _OWN or _key(word).partition(".")[0] == "predict"]
    rest = [word for word in words if word not in own]
    chosen = any(_key(word) == "data" for word in rest)
    with exiting_on_error():
        config = parse(own)
        refuse(rest)
        from ftexp.cli.trained_run import SavedRun

        run = SavedRun.at(config.run)
        top_k(config, run)
    if not chosen:
        offer_option("data", _RUNS_DATA, run.config.data)
        rest.append(f"data={_RUNS_DATA}")

    def task(composed: DictConfig) -> None:
        predict(to_config(composed), config, run, chosen, rest)

    sys.exit(run_hydra(task, ["augment=none", *rest]))


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def parse(words: list[str]) -> PredictConfig:
    """Parse the command's own key=value words; ConfigError names what is wrong."""
    config: PredictConfig = read_command(PredictConfig, words, run="<run directory>")
    return config


def refuse(words: list[str]) -> None:
    """Raise ConfigError if one of the words sets a value that predicting doesn't read, or that the run determines."""
    for word in words:
        group, _, name = _key(word).partition(".")
        if word.startswith("-"):
            if word in ("-m", "--multirun"):
                raise ConfigError(f"{word}: predict runs one job; remove it")
        elif group not in ("data", "scaling", "plugins", "verbose"):
            raise ConfigError(
                f"{word} is not used: choose from {', '.join(_OWN)}, predict.*, data, scaling, plugins, verbose"
            )
        elif group == "data" and name in _FOLLOWS:
            raise ConfigError(f"{word}: set by the trained run; remove it")
        elif group == "data" and name in _OF_TRAINING:
            raise ConfigError(f"{word} is used only in training; remove it")
        elif group == "scaling" and name and name.partition(".")[0] not in _SCALING:
            raise ConfigError(f"{word} is not used: of scaling, choose from {', '.join(_SCALING)}; remove it")


def top_k(config: PredictConfig, run: SavedRun) -> int:
    """Return the number of classes to write for each image, or of outputs to read; ConfigError if there are fewer."""
    wanted, there, task = config.predict.top_k, run.info.num_classes, run.info.task
    if task != MULTI_LABEL and config.predict.threshold is not None:
        raise ConfigError(f"predict.threshold={config.predict.threshold}: the run's data.task is {task}; remove it")
    if task != SINGLE_LABEL:
        if wanted is not None:
            advice = "set predict.threshold, and remove it" if task == MULTI_LABEL else "remove it"
            raise ConfigError(f"predict.top_k={wanted}: the run's data.task is {task}; {advice}")
        return there
    if wanted is not None and wanted > there:
        raise ConfigError(f"predict.top_k={wanted}, but the model has {there} classes: set at most {there}")
    return min(_TOP_K, there) if wanted is None else wanted


def predict(composed: Config, own: PredictConfig, run: SavedRun, chosen: bool, words: list[str]) -> None:
    """Predict the images that have no predictions yet; `composed` has the data and the scaling.

    chosen: whether the data are not the run's own. words: the typed overrides of data and scaling.

    Raises:
        ConfigError: a setting doesn't fit; nothing was predicted.
        CheckpointError: the run has no such checkpoint, or it is corrupt.
        DataError: the images can't be listed, or none of them can be read.
        StorageError: `out` can't be written, or another process is writing it.
    """
    data = run.data_as_seen(dataclasses.replace(composed.data, feed=AUTO, shuffle_window=None, on_bad_sample="fail"))
    config = dataclasses.replace(
        composed,
        data=data,
        model=dataclasses.replace(run.config.model, pretrained=False, pretrained_partial=False),
        plugins=[*run.config.plugins, *(name for name in composed.plugins if name not in run.config.plugins)],
    )
    from ftexp.cli.trained_run import choose, require_data
    from ftexp.data.root import require_root

    validate(config, trains=False)
    split = _split(own, data, chosen, words)
    (require_root if chosen else require_data)(data)
    config = dataclasses.replace(config, data=dataclasses.replace(data, on_bad_sample="skip"))
    from ftexp.cluster.ray_cluster import prepare_environment
    from ftexp.cluster.resources import decide_workers
    from ftexp.storage.directory import Storage

    workers = decide_workers(config.scaling)
    manifest = choose(run.store, own.checkpoint, run.config)
    out = Storage.at(own.out) if own.out is not None else _default_out(run, data, split, own)
    out.require_writable("out")
    prepare_environment(config)
    from ftexp.predict.run import Request, run_session

    settings = own.predict
    shape = (settings.batch_size, settings.part_rows, settings.format)
    thresholds = _thresholds(own, run)
    weights = (manifest, own.weights, own.tta)
    run_session(Request(config, run, *weights, split, out, top_k(own, run), *shape, not chosen, thresholds), workers)


def _thresholds(own: PredictConfig, run: SavedRun) -> list[float] | None:
    from ftexp.evaluation.label_sets import thresholds_of

    if run.info.task != MULTI_LABEL:
        return None
    return thresholds_of("predict.threshold", own.predict.threshold, run.info.num_classes)


def _split(own: PredictConfig, data: DataConfig, chosen: bool, words: list[str]) -> str:
    split = own.split or ("all" if chosen and reads_files(data.name) else "test")
    if split != "all":
        return split
    if not reads_files(data.name):
        raise ConfigError(f"split=all, but data.name={data.name} is read by split: give train, val or test")
    for word in words:
        if _key(word) in {f"data.{name}" for name in _SPLITTING}:
            raise ConfigError(f"{word} defines splits, but split=all takes every image: remove it, or set split=test")
    return split


def _default_out(run: SavedRun, data: DataConfig, split: str, own: PredictConfig) -> Storage:
    from ftexp.cli.trained_run import file_name_of

    chosen = [each for each in (split, own.weights, own.tta) if each not in ("all", "raw", "none")]
    return run.storage.child(PREDICTIONS, "_".join([file_name_of(data), *chosen]))
