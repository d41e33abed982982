"""Evaluation of a checkpoint on a split, and writing the result."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftexp.checkpoint.manifest import Manifest
from ftexp.checkpoint.reading import read_weights
from ftexp.checkpoint.store import CheckpointStore
from ftexp.cli.trained_run import SavedRun, choose, file_name_of
from ftexp.cluster.resources import decoding_cpus, no_workers
from ftexp.config.schema import AUTO, SINGLE_LABEL, Config, DataConfig
from ftexp.config.source_names import reads_files
from ftexp.data.build import build_data
from ftexp.data.feeds.decoding import refuse_bad
from ftexp.data.feeds.feed import ToTensors, evaluation_batches
from ftexp.data.feeds.streamed import bundle_rows
from ftexp.data.info import SPLITS, DataBundle, DataInfo
from ftexp.driver.resume import labels_as_begun, require_trained_on
from ftexp.errors import ConfigError, DataError, StorageError
from ftexp.evaluation.counting import measured, metric_set_of
from ftexp.evaluation.findings import findings_of
from ftexp.evaluation.matched_classes import MatchedClasses
from ftexp.evaluation.metric_registry import check_names, check_num_classes
from ftexp.job.build import autocast_of
from ftexp.model.build import as_logits, trained_model
from ftexp.registry import load_plugins
from ftexp.rundir.names import CHECKPOINTS, evaluation_file
from ftexp.rundir.state import read_state
from ftexp.storage.append_log import finite

if TYPE_CHECKING:
    from ftexp.evaluate.command import EvaluateConfig
    from ftexp.storage.directory import Storage


def measure(wanted: EvaluateConfig, run_config: Config, storage: Storage, is_other: bool = False) -> dict[str, Any]:
    """Evaluate, write the result as JSON, and return it.

    Args:
        wanted: the command's arguments.
        run_config: config of the run, with the data to evaluate on.
        storage: the run directory.
        is_other: whether these are other data than the run was trained on.
    """
    load_plugins(run_config.plugins)
    names = run_config.train.metrics if wanted.metrics is None else wanted.metrics
    check_names(names, run_config.data.task)
    store = CheckpointStore(storage.child(CHECKPOINTS))
    manifest = choose(store, wanted.checkpoint, run_config)
    weights = read_weights(store, manifest, wanted.weights)
    bundle = _data(run_config, storage, is_other)
    info = SavedRun.at(storage.uri).info if is_other else bundle.info
    classes = _matched(info, bundle.info, run_config.data) if is_other else None
    split = wanted.split or ("all" if is_other and reads_files(run_config.data.name) else "test")
    _require_samples(bundle, split)
    check_num_classes(names, info.num_classes)
    model = trained_model(run_config.model, info, weights).to(_device(wanted.device))
    found = _counted(wanted, run_config, model, info, names, bundle, split, classes)
    result = {**_head(storage, manifest, wanted, split), **found}
    if classes is not None:
        result |= _about_other(run_config.data, info, classes, result["classes"])
    about = [file_name_of(run_config.data)] if is_other else []
    return result | _written(result, wanted, storage, about)


def _data(run_config: Config, storage: Storage, is_other: bool) -> DataBundle:
    """Build the data; ConfigError if they should be the run's own data, and aren't."""
    state = read_state(storage) if not is_other else None
    if state is None:  # run.json may be lost
        return build_data(run_config.data, only_evaluates=True)
    data = labels_as_begun(run_config.data, state.data)
    bundle = build_data(data, only_evaluates=True)
    require_trained_on(f"data.root={data.root}", state.data, bundle.info.digest)
    return bundle


def _matched(info: DataInfo, found: DataInfo, data: DataConfig) -> MatchedClasses | None:
    """Match classes by name for single_label; None for other tasks, whose outputs must be the same."""
    if info.task == SINGLE_LABEL:
        return MatchedClasses(info.class_names, found.class_names)
    if info.class_names != found.class_names:
        raise ConfigError(
            f"the outputs of data.task={info.task} are {', '.join(info.class_names)}, and data.name={data.name} has "
            f"{', '.join(found.class_names)}: give data with the same targets in the same order"
        )
    return None


def _require_samples(bundle: DataBundle, split: str) -> None:
    counts = bundle.info.num_samples
    if not (sum(counts.values()) if split == "all" else counts.get(split)):
        others = [f"split={name}" for name in SPLITS if counts.get(name)]
        raise DataError(
            f"split={split} has no samples: " + (f"give {' or '.join(others)}" if others else "nor has any")
        )


def _device(name: str) -> torch.device:
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _counted(
    wanted: EvaluateConfig,
    run_config: Config,
    model: nn.Module,
    info: DataInfo,
    names: Sequence[str],
    bundle: DataBundle,
    split: str,
    classes: MatchedClasses | None,
) -> dict[str, Any]:
    device = next(model.parameters()).device
    to_tensors = ToTensors(info, device, False)
    findings = findings_of(info, to_tensors.pixels, wanted.threshold)
    batches = _batches(split, wanted.batch_size, run_config, bundle, to_tensors)
    batches = batches if classes is None else classes.batches(batches)
    checked = functools.partial(as_logits, config=run_config.model, num_classes=info.num_classes)
    autocast, metric_set = autocast_of(device, run_config.train.precision), metric_set_of(names, info, device)
    mirrored = wanted.tta == "hflip"
    values = measured(split, {"": model}, checked, batches, autocast, findings, metric_set, info.task, mirrored)
    return {
        "task": info.task,
        "accuracy": values.get(f"{split}_accuracy"),
        "loss": values[f"{split}_loss"],
        "metrics": finite({name: values[f"{split}_{name}"] for name in names}),
        **findings.report(info),
    }


def _batches(
    split: str, batch_size: int, run_config: Config, bundle: DataBundle, to_tensors: ToTensors
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images and labels of a split, or of all splits one after another."""

    def of_split(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        cpus = decoding_cpus(run_config, no_workers())
        rows = bundle_rows(bundle, name, cpus, lambda bad: refuse_bad(run_config.data, bad))
        return evaluation_batches(rows, to_tensors, batch_size, rank=0, world_size=1)

    splits = [name for name in SPLITS if bundle.info.num_samples.get(name)] if split == "all" else [split]
    return itertools.chain.from_iterable(map(of_split, splits))


def _head(storage: Storage, manifest: Manifest, wanted: EvaluateConfig, split: str) -> dict[str, Any]:
    return {
        "run": storage.uri,
        "checkpoint": manifest.name,
        "step": manifest.step,
        "epoch": manifest.epoch,
        "split": split,
        "weights": wanted.weights,
        "tta": wanted.tta,
    }


def _about_other(
    data: DataConfig, info: DataInfo, classes: MatchedClasses, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the result's entries about other data. `confusion` is over `class_names`, the model's classes."""
    return {
        "data": {"name": data.name, "root": data.root},
        "classes": [row for row in rows if row["class"] not in classes.missing],
        "class_names": info.class_names,
        "missing_classes": classes.missing,
        "new_classes": {name: classes.excluded[name] for name in classes.new},
    }


def _written(result: dict[str, Any], wanted: EvaluateConfig, storage: Storage, about: list[str]) -> dict[str, Any]:
    """Write the result and return its path; if that fails, return why, or raise StorageError if `out` was given."""
    chosen = [name for name in (wanted.weights, wanted.tta) if name not in ("raw", "none")]
    name = evaluation_file("_".join([*about, result["split"], *chosen]))
    target = type(storage).at(wanted.out) if wanted.out is not None else storage.child(name)
    try:
        target.parent.write_bytes(target.name, json.dumps(result, indent=1).encode())
    except OSError as error:  # such as a run on a read-only disk
        if wanted.out is not None:
            raise StorageError(f"out={wanted.out} can't be written: {error}") from error
        return {"not_written": f"{target.uri}: {error}; add out=<file> for another place"}
    return {"written": target.uri}
