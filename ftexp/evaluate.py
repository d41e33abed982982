"""`python -m ftexp.evaluate run=<dir> [key=value ...]`: how good is a saved checkpoint?

Keys: run (a run directory or URI), checkpoint (best, latest, or a folder's name), split (train, val, test),
weights (raw, ema), metrics (besides loss and accuracy; if not given, the run's train.metrics), tta (none, or hflip: the
mean of the logits of each image and its mirror image), batch_size,
threshold (of runs with data.task=multi_label: one probability for all classes, or a list of each class's; default 0.5),
device (auto, cpu, cuda), data.root (where the run's data lies now, if it has moved), out (a JSON file; if not given,
evaluation_<split>.json in the run, evaluation_<split>_ema.json for weights=ema, evaluation_<split>_hflip.json and
evaluation_<split>_ema_hflip.json with tta=hflip).

With data=<source> data.*=... it evaluates on other data; split may then be all, and is by default where files are read.
Classes are matched by name, images prepared as the run's were. Samples of new classes are excluded and counted,
missing classes have no row. The file is evaluation_<last part of data.root>_<split>.json.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, DictConfig

from ftexp.cli.entry import command_words, exiting_on_error, with_run
from ftexp.cli.parse import read_command
from ftexp.config.fields import choice, ranged
from ftexp.config.schema import AUTO, MULTI_LABEL, REGRESSION, SINGLE_LABEL, TTA, Config, DataConfig
from ftexp.config.source_names import AS_TRAINED, SOURCE_FIELDS, can_stream
from ftexp.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import Tensor

    from ftexp.data.feeds.feed import ToTensors
    from ftexp.data.info import DataBundle, DataInfo
    from ftexp.evaluation.matched_classes import MatchedClasses
    from ftexp.evaluation.metric_set import MetricSet
    from ftexp.storage.directory import Storage


_OWN = ("run", "checkpoint", "split", "weights", "tta", "metrics", "threshold", "batch_size", "device", "out")
_FOLLOWS = (*AS_TRAINED, "decode_size")
_OF_TRAINING = ("feed", "shuffle_window", "prefetch_batches")


@dataclass(kw_only=True)
class MovedData:
    """Where the run's data lies now."""

    root: str | None = None  # None: where it lay when the run was trained


@dataclass(kw_only=True)
class EvaluateConfig:
    """What the command may be given."""

    run: str = MISSING
    checkpoint: str = "best"  # best, latest, or the name of a folder under checkpoints/
    # all: of other data; None: all of other data that are read from files, else test
    split: str | None = choice(None, ("train", "val", "test", "all"))
    weights: str = choice("raw", ("raw", "ema"))  # those that were trained, or their moving average
    metrics: list[str] | None = None  # besides loss and accuracy; None: the run's train.metrics
    tta: str = choice("none", TTA)
    threshold: Any = None  # of data.task=multi_label: one for all classes, or one for each; None: 0.5
    batch_size: int = ranged(256, low=1)
    device: str = choice("auto", ("auto", "cpu", "cuda"))
    out: str | None = None
    data: MovedData = field(default_factory=MovedData)


def main() -> None:
    """Entry point of the command; exits with 0, 1 or 2."""
    words = with_run(command_words(__doc__))
    if not any(_key(word) == "data" for word in words):
        with exiting_on_error():
            result = evaluate(parse(words))
        _print(result)
        return
    with exiting_on_error():
        config, rest = _apart(words)
    from ftexp.cli.compose import run_hydra, to_config

    def task(composed: DictConfig) -> None:
        _print(evaluate(config, to_config(composed)))

    sys.exit(run_hydra(task, ["augment=none", *rest]))


def evaluate_words(words: list[str], compose: Callable[[list[str]], Config]) -> dict[str, Any]:
    """Evaluate what these words of the command say; `compose` composes those about other data."""
    if not any(_key(word) == "data" for word in words):
        return evaluate(parse(words))
    config, rest = _apart(words)
    return evaluate(config, compose(["augment=none", *rest]))


def _apart(words: list[str]) -> tuple[EvaluateConfig, list[str]]:
    """The command's own words, parsed, and those about other data; ConfigError names what is wrong."""
    rest = [word for word in words if _key(word) not in _OWN]
    config = parse([word for word in words if word not in rest])
    refuse(rest)
    return config, rest


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def refuse(words: list[str]) -> None:
    """ConfigError if one of the words about other data sets what isn't read, or what the run has settled."""
    for word in words:
        group, _, name = _key(word).partition(".")
        if word.startswith("-") or group not in ("data", "plugins"):
            raise ConfigError(f"{word} is not read: give {', '.join(_OWN)}, data, plugins")
        if group == "data" and name in _FOLLOWS:
            raise ConfigError(f"{word}: the model was trained on such images as the run says; take it out")
        if group == "data" and name in _OF_TRAINING:
            raise ConfigError(f"{word} is for training; take it out")


def parse(argv: list[str]) -> EvaluateConfig:
    """Read key=value words; ConfigError names what is wrong."""
    config: EvaluateConfig = read_command(EvaluateConfig, argv, run="<run directory>")
    return config


def evaluate(config: EvaluateConfig, other: Config | None = None) -> dict[str, Any]:
    """Load the checkpoint and count; returns what is also written as JSON.

    Args:
        config: what to evaluate.
        other: holds the data to evaluate on; None: the run's own.

    Raises:
        ConfigError: there is no run at `config.run`, no GPU for device=cuda, or the data have no class of the run's.
        CheckpointError: the run has no such checkpoint, or it is damaged.
        DataError: the data that the run was made with can't be read.
        StorageError: `out` can't be written.
    """
    from ftexp.cli.trained_run import load_run_config, require_data
    from ftexp.storage.directory import Storage, absolute

    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("device=cuda, and torch finds no GPU here: take device=auto, or cpu")
    storage = Storage.at(config.run)
    run_config = load_run_config(storage)
    if other is not None:
        run_config = _on_other_data(run_config, other, storage)
    elif config.split == "all":
        raise ConfigError("split=all is for other data (data=...), since a run was trained on a part of its own")
    if config.threshold is not None and run_config.data.task != MULTI_LABEL:
        raise ConfigError(
            f"threshold={config.threshold} decides about each class of data.task=multi_label, and the run's is "
            f"{run_config.data.task}: remove it"
        )
    if config.data.root is not None:
        data = dataclasses.replace(run_config.data, root=absolute(config.data.root))
        run_config = dataclasses.replace(run_config, data=data)
    require_data(run_config.data)
    if config.out is not None:
        Storage.at(config.out).parent.require_writable("out")
    from ftexp.cluster.ray_cluster import private_ray

    with private_ray(run_config) as run_config:
        return _evaluate(config, run_config, storage, is_other=other is not None)


def _on_other_data(run_config: Config, other: Config, storage: Storage) -> Config:
    """The run's config with other data, prepared as its own; ConfigError if something doesn't fit."""
    from ftexp.cli.trained_run import SavedRun
    from ftexp.config.checks.validate import validate
    from ftexp.storage.directory import absolute

    data = SavedRun.at(storage.uri).data_as_seen(other.data)
    root = None if data.root is None else absolute(data.root)
    data = dataclasses.replace(data, root=root, num_classes=None, feed=AUTO, shuffle_window=None)
    plugins = [*run_config.plugins, *(name for name in other.plugins if name not in run_config.plugins)]
    model = dataclasses.replace(run_config.model, pretrained=False)
    made = dataclasses.replace(run_config, data=data, model=model, plugins=plugins)
    validate(made, trains=False)
    return made


def _evaluate(config: EvaluateConfig, run_config: Config, storage: Storage, is_other: bool = False) -> dict[str, Any]:
    import torch

    from ftexp.checkpoint.staging import load_part
    from ftexp.checkpoint.store import CheckpointStore
    from ftexp.cli.trained_run import SavedRun, choose, file_name_of, read_weights
    from ftexp.data.build import build_data
    from ftexp.data.feeds.feed import ToTensors
    from ftexp.driver.resume import labels_as_begun, require_trained_on
    from ftexp.evaluation.counting import count_into
    from ftexp.evaluation.findings import findings_of
    from ftexp.evaluation.matched_classes import MatchedClasses
    from ftexp.evaluation.meter import Meter
    from ftexp.evaluation.metric_registry import check_names
    from ftexp.evaluation.tasks import named_means
    from ftexp.model.build import as_logits, build_model
    from ftexp.registry import load_plugins
    from ftexp.rundir.names import CHECKPOINTS, evaluation_file
    from ftexp.rundir.state import read_state
    from ftexp.storage.append_log import finite

    load_plugins(run_config.plugins)
    names = run_config.train.metrics if config.metrics is None else config.metrics
    check_names(names, run_config.data.task)
    store = CheckpointStore(storage.child(CHECKPOINTS))
    manifest = choose(store, config.checkpoint, run_config)
    weights = read_weights(store, manifest, config.weights)
    state = read_state(storage) if not is_other else None
    if state is not None:  # run.json may be lost
        run_config = dataclasses.replace(run_config, data=labels_as_begun(run_config.data, state.data))
    bundle = build_data(run_config.data)
    if state is not None:
        require_trained_on(f"data.root={run_config.data.root}", state.data, bundle.info.digest)
    device = torch.device(
        "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu")
    )
    info = SavedRun.at(storage.uri).info if is_other else bundle.info
    if is_other and info.task != SINGLE_LABEL and info.class_names != bundle.info.class_names:
        raise ConfigError(
            f"the run's data.task={info.task} has the outputs {', '.join(info.class_names)}, and data.name="
            f"{run_config.data.name} has {', '.join(bundle.info.class_names)}: only data of the same fit"
        )
    classes = None
    if is_other and info.task == SINGLE_LABEL:
        classes = MatchedClasses(info.class_names, bundle.info.class_names)
    split = config.split or ("all" if is_other and _reads_files(run_config.data) else "test")
    model, _ = build_model(dataclasses.replace(run_config.model, pretrained=False), info)
    model.load_state_dict(load_part("model.pt", weights))
    model.to(device)
    to_tensors = ToTensors(info, device, False)
    meter, findings = Meter(device), findings_of(info, to_tensors.pixels, config.threshold)
    batches = _batches(split, config.batch_size, run_config, bundle, to_tensors)
    batches = batches if classes is None else classes.batches(batches)
    checked = functools.partial(as_logits, config=run_config.model, num_classes=info.num_classes)
    metrics = [_metric_set(names, info, device)] if names else []
    autocast = torch.autocast(device.type, enabled=False)
    mirrored = config.tta == "hflip"
    count_into([(model, meter)], checked, batches, autocast, findings, mirrored, metrics, info.task)
    measures = named_means("", meter.totals(), info.task)
    result = {
        "run": storage.uri,
        "checkpoint": manifest.name,
        "step": manifest.step,
        "epoch": manifest.epoch,
        "split": split,
        "weights": config.weights,
        "tta": config.tta,
        "task": info.task,
        "accuracy": measures.get("_accuracy"),
        "loss": measures["_loss"],
        "metrics": finite({name: value for others in metrics for name, value in others.compute().items()}),
        **findings.report(info),
    }
    if classes is not None:
        result |= _about_other(run_config.data, info, classes, result["classes"])
    text = json.dumps(result, indent=1).encode()
    chosen = [name for name in (config.weights, config.tta) if name not in ("raw", "none")]
    about = [file_name_of(run_config.data)] if is_other else []
    name = evaluation_file("_".join([*about, split, *chosen]))
    target = type(storage).at(config.out) if config.out is not None else storage.child(name)
    try:
        target.parent.write_bytes(target.name, text)
        result["written"] = target.uri
    except OSError as error:  # such as of a run on a disk that is mounted to be read only
        if config.out is not None:
            raise StorageError(f"out={config.out} can't be written: {error}") from error
        result["not_written"] = f"{target.uri}: {error}; add out=<file> for another place"
    return result


def _metric_set(names: list[str], info: DataInfo, device: torch.device) -> MetricSet:
    from ftexp.evaluation.metric_registry import check_num_classes
    from ftexp.evaluation.metric_set import MetricSet

    check_num_classes(names, info.num_classes)
    return MetricSet(names, info.task, info.class_names, device, info.target_std)


def _reads_files(data: DataConfig) -> bool:
    return data.name in SOURCE_FIELDS and can_stream(data.name)


def _batches(
    split: str, batch_size: int, run_config: Config, bundle: DataBundle, to_tensors: ToTensors
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of a split, or of all of them in turn."""
    from ftexp.cluster.resources import decoding_cpus, no_workers
    from ftexp.data.feeds.decoding import refuse_bad
    from ftexp.data.feeds.feed import evaluation_batches
    from ftexp.data.feeds.streamed import bundle_rows
    from ftexp.data.info import SPLITS

    def of_split(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        cpus = decoding_cpus(run_config, no_workers())
        rows = bundle_rows(bundle, name, cpus, lambda bad: refuse_bad(run_config.data, bad))
        return evaluation_batches(rows, to_tensors, batch_size, rank=0, world_size=1)

    splits = [name for name in SPLITS if bundle.info.num_samples.get(name)] if split == "all" else [split]
    return itertools.chain.from_iterable(map(of_split, splits))


def _about_other(
    data: DataConfig, info: DataInfo, classes: MatchedClasses, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the result says of other data. confusion is of `class_names`, which are the model's."""
    return {
        "data": {"name": data.name, "root": data.root},
        "classes": [row for row in rows if row["class"] not in classes.missing],
        "class_names": info.class_names,
        "missing_classes": classes.missing,
        "new_classes": {name: classes.excluded[name] for name in classes.new},
    }


_TITLES = {"num_samples": "samples", "average_precision": "average precision"}


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{result['checkpoint']} (epoch {result['epoch']}) on {result['num_samples']} {result['split']} samples"
        + (", each with its mirror image (tta=hflip)" if result["tta"] == "hflip" else ""),
        markup=False,
        soft_wrap=True,
    )
    for line in _of_classes(result):
        console.print(line, markup=False, soft_wrap=True)
    keys = {MULTI_LABEL: ("accuracy", "loss", "average_precision"), REGRESSION: ("loss", "mae", "mse", "r2")}
    overall = keys.get(result["task"], ("accuracy", "loss"))
    console.print("   ".join(f"{key} {_number(result[key])}" for key in overall))
    for name, value in result["metrics"].items():
        if name not in overall:
            console.print(f"{name} {_number(value)}", markup=False)
    if result["task"] == REGRESSION:
        rows, columns = result["targets"], ("target", "mae", "mse", "r2")
    else:
        more = ("average_precision",) if result["task"] == MULTI_LABEL else ()
        rows, columns = result["classes"], ("class", "num_samples", "recall", "precision", *more)
    table = Table(*(_TITLES.get(column, column) for column in columns), box=None)
    for row in rows:
        table.add_row(*(_number(row[column]) for column in columns))
    console.print(table)
    told = f"written to {result['written']}" if "written" in result else f"! not written to {result['not_written']}"
    console.print(told, markup=False, soft_wrap=True)


def _of_classes(result: dict[str, Any]) -> Iterator[str]:
    """Lines about classes that only the model, or only the other data, have."""
    if missing := result.get("missing_classes"):
        yield f"missing classes: {', '.join(missing)}"
    if new := result.get("new_classes"):
        each = ", ".join(f"{name} ({count:,})" for name, count in new.items())
        yield f"new classes, {sum(new.values()):,} samples excluded: {each}"


if __name__ == "__main__":
    main()
