"""`python -m ftexp.evaluate run=<dir> [key=value ...]`: how good is a saved checkpoint?

Keys: run (a run directory or URI), checkpoint (best, latest, or a folder's name), split (train, val, test),
weights (raw, ema), metrics (besides loss and accuracy; if not given, the run's train.metrics), tta (none, or hflip: the
mean of the logits of each image and its mirror image), threshold (with data.task=multi_label: one probability for all
classes, or a list of each class's; default 0.5), batch_size, device (auto, cpu, cuda),
data.root (where the run's data lies now, if it has moved), out (a JSON file; if not given, evaluation_<split>.json in
the run, evaluation_<split>_ema.json for weights=ema, evaluation_<split>_hflip.json and
evaluation_<split>_ema_hflip.json with tta=hflip).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from ftexp.cli.entry import command_words, exiting_on_error, with_run
from ftexp.cli.parse import read_command
from ftexp.config.fields import choice, ranged
from ftexp.config.schema import MULTI_LABEL, REGRESSION, TTA, Config
from ftexp.errors import ConfigError, StorageError

if TYPE_CHECKING:
    import torch

    from ftexp.data.feeds.feed import Rows
    from ftexp.data.info import DataBundle, DataInfo
    from ftexp.evaluation.metric_set import MetricSet
    from ftexp.storage.directory import Storage


@dataclass(kw_only=True)
class MovedData:
    """Where the run's data lies now."""

    root: str | None = None  # None: where it lay when the run was trained


@dataclass(kw_only=True)
class EvaluateConfig:
    """What the command may be given."""

    run: str = MISSING
    checkpoint: str = "best"  # best, latest, or the name of a folder under checkpoints/
    split: str = choice("test", ("train", "val", "test"))
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
    with exiting_on_error():
        result = evaluate(parse(words))
    _print(result)


def parse(argv: list[str]) -> EvaluateConfig:
    """Read key=value words; ConfigError names what is wrong."""
    config: EvaluateConfig = read_command(EvaluateConfig, argv, run="<run directory>")
    return config


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Load the checkpoint and count; returns what is also written as JSON.

    Raises:
        ConfigError: there is no run at `config.run`, or no GPU for device=cuda.
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
        return _evaluate(config, run_config, storage)


def _evaluate(config: EvaluateConfig, run_config: Config, storage: Storage) -> dict[str, Any]:
    import torch

    from ftexp.checkpoint.staging import load_part
    from ftexp.checkpoint.store import CheckpointStore
    from ftexp.cli.trained_run import choose, read_weights
    from ftexp.data.build import build_data
    from ftexp.data.feeds.feed import ToTensors, evaluation_batches
    from ftexp.driver.resume import labels_as_begun, require_trained_on
    from ftexp.evaluation.counting import count_into
    from ftexp.evaluation.findings import findings_of
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
    state = read_state(storage)
    if state is not None:  # run.json may be lost
        run_config = dataclasses.replace(run_config, data=labels_as_begun(run_config.data, state.data))
    bundle = build_data(run_config.data)
    if state is not None:
        require_trained_on(f"data.root={run_config.data.root}", state.data, bundle.info.digest)
    device = torch.device(
        "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu")
    )
    model, _ = build_model(dataclasses.replace(run_config.model, pretrained=False), bundle.info)
    model.load_state_dict(load_part("model.pt", weights))
    model.to(device)
    rows, to_tensors = _rows(config, run_config, bundle), ToTensors(bundle.info, device, False)
    meter, findings = Meter(device), findings_of(bundle.info, to_tensors.pixels, config.threshold)
    batches = evaluation_batches(rows, to_tensors, config.batch_size, rank=0, world_size=1)
    checked = functools.partial(as_logits, config=run_config.model, num_classes=bundle.info.num_classes)
    metrics = [_metric_set(names, bundle.info, device)] if names else []
    autocast, task = torch.autocast(device.type, enabled=False), bundle.info.task
    count_into([(model, meter)], checked, batches, autocast, findings, config.tta == "hflip", metrics, task)
    measures = named_means("", meter.totals(), task)
    result = {
        "run": storage.uri,
        "checkpoint": manifest.name,
        "step": manifest.step,
        "epoch": manifest.epoch,
        "split": config.split,
        "weights": config.weights,
        "tta": config.tta,
        "task": task,
        "accuracy": measures.get("_accuracy"),
        "loss": measures["_loss"],
        "metrics": finite({name: value for others in metrics for name, value in others.compute().items()}),
        **findings.report(bundle.info),
    }
    text = json.dumps(result, indent=1).encode()
    chosen = [name for name in (config.weights, config.tta) if name not in ("raw", "none")]
    name = evaluation_file("_".join([config.split, *chosen]))
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


def _rows(config: EvaluateConfig, run_config: Config, bundle: DataBundle) -> Rows:
    from ftexp.cluster.resources import decoding_cpus, no_workers
    from ftexp.data.feeds.decoding import refuse_bad
    from ftexp.data.feeds.streamed import bundle_rows

    cpus = decoding_cpus(run_config, no_workers())
    return bundle_rows(bundle, config.split, cpus, lambda bad: refuse_bad(run_config.data, bad))


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
    keys = {MULTI_LABEL: ("accuracy", "loss", "average_precision"), REGRESSION: ("loss", "mae", "mse", "r2")}
    overall = keys.get(result["task"], ("accuracy", "loss"))
    console.print("   ".join(f"{key} {_number(result[key])}" for key in overall))
    for name, value in result["metrics"].items():
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


if __name__ == "__main__":
    main()
