"""The pipeline from images to parts: tasks on any node's CPUs decode, actors with the model predict, tasks write."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from ftexp.cli.trained_run import SavedRun
from ftexp.cluster.resources import Workers
from ftexp.config.schema import REGRESSION
from ftexp.data.cropping import Fit
from ftexp.data.feeds.decoding import decode_samples, decoding
from ftexp.data.info import IndexedSplit
from ftexp.data.order import Int64s
from ftexp.data.shared import Shared
from ftexp.predict.answers import answered
from ftexp.predict.inputs import Inputs
from ftexp.predict.parts import PredictionPlan, WritePart
from ftexp.predict.stopping import StopWhenAsked
from ftexp.storage.directory import Storage

_UNIT_ROWS, _UNIT_BYTES = 256, 32 * 2**20  # limits of one task's unit; a smaller task is mostly overhead
_DATASET_UNITS = 4096  # units of one Ray Dataset, whose whole plan is created in advance
_WRITERS = 2
_IN_FLIGHT = 2  # units per actor: the current one and the next
_ROW_EXTRA_BYTES = 256  # path, sample number, label and error


@dataclass(frozen=True)
class DecodeNamed:
    """A map stage of Ray Data: {"sample": [n]} -> image, label, location, and error."""

    split: IndexedSplit
    fit: Fit

    def __call__(self, batch: dict[str, Int64s]) -> dict[str, Any]:
        """Decode a unit, as training and evaluation do."""
        samples = batch["sample"]
        images, outcome = decode_samples(self.split, samples, self.fit)
        _, labels = self.split.table.get()
        columns = {"where": np.array(outcome.places, object), "error": np.array(outcome.reasons, object)}
        return {"sample": samples, "image": images, "label": labels[samples], **columns}


class Predict:
    """An actor of a map stage: holds the model, and replaces images by predictions."""

    def __init__(
        self,
        run: SavedRun,
        weights: Shared[Any],
        top_k: int,
        batch_size: int,
        use_gpu: bool,
        num_threads: int,
        tta: str = "none",
    ) -> None:
        import torch

        from ftexp.checkpoint.staging import load_part
        from ftexp.data.feeds.feed import ToTensors
        from ftexp.evaluation.counting import logits_of
        from ftexp.model.build import as_logits

        torch.set_num_threads(num_threads)
        device = torch.device("cuda" if use_gpu else "cpu")
        self._model = run.model(load_part("model.pt", weights.get().tobytes())).to(device)
        checked = functools.partial(as_logits, config=run.config.model, num_classes=run.info.num_classes)
        self._logits_of = functools.partial(logits_of, self._model, as_logits=checked, mirrored=tta == "hflip")
        self._to_tensors = ToTensors(run.info, device, False)
        self._info, self._top_k, self._batch_size = run.info, top_k, batch_size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Predict a unit; images that can't be read keep their rows, with zeros."""
        import torch

        images = batch.pop("image")
        readable = np.flatnonzero(batch["error"] == "")
        classes = np.zeros((len(images), self._top_k), np.int64)
        kind = np.float64 if self._info.task == REGRESSION else np.float32
        probabilities = np.zeros((len(images), self._top_k), kind)
        with torch.inference_mode():
            for start in range(0, len(readable), self._batch_size):
                rows = readable[start : start + self._batch_size]
                logits = self._logits_of(self._to_tensors(images[rows]))
                classes[rows], probabilities[rows] = answered(logits, self._info, self._top_k)
        return {**batch, "classes": classes, "probabilities": probabilities}


@dataclass(frozen=True)
class PredictionJob:
    """Everything needed to make predictions."""

    run: SavedRun
    weights: Shared[Any]  # a state dict as an array of bytes
    inputs: Inputs
    plan: PredictionPlan
    out: Storage
    workers: Workers
    num_decoding: int  # tasks at a time, each on one CPU
    batch_size: int

    def write(self, parts: list[int]) -> Iterator[tuple[int, int]]:
        """Write these parts; yield the number of each after it was written, and its number of bad images."""
        answer_bytes = 12 * self.plan.top_k
        row_bytes = self.run.info.image_size**2 * self.run.info.channels + answer_bytes + _ROW_EXTRA_BYTES
        max_rows = max(self.batch_size, min(_UNIT_ROWS, _UNIT_BYTES // row_bytes))
        waiting: list[Int64s] = []
        for part in parts:
            samples = self.plan.samples(part)
            waiting += np.array_split(samples, -(-len(samples) // max_rows))
            if len(waiting) >= _DATASET_UNITS or part == parts[-1]:
                yield from self._write_units(waiting, row_bytes)
                waiting = []

    def _write_units(self, units: list[Int64s], row_bytes: int) -> Iterator[tuple[int, int]]:
        info, workers = self.run.info, self.workers
        num_decoding = self.num_decoding + 1  # one extra task waits, so that no CPU is idle
        write = WritePart(self.plan, self.out, info.class_names, self.inputs.label_names, info.task)
        columns = [{"sample": unit} for unit in units]
        dataset = decoding(self.inputs.split, info, columns, num_decoding, DecodeNamed, workers.runtime_env)
        dataset.context.enable_progress_bars = False
        dataset.context.custom_execution_callback_classes = [StopWhenAsked]
        options = dataset.context.execution_options
        options.preserve_order = True  # so that the rows of a part stay together
        unit_bytes = max(len(unit) for unit in units) * row_bytes
        # the output of running tasks, as much again that waits for an actor, and the actors' units
        store = (2 * num_decoding + (_IN_FLIGHT + 1) * workers.max_workers + 2) * unit_bytes
        options.resource_limits = options.resource_limits.copy(object_store_memory=store)
        written = dataset.map_batches(
            Predict,
            fn_constructor_args=(
                *(self.run, self.weights, self.plan.top_k, self.batch_size),
                *(workers.use_gpu, workers.num_threads, self.plan.tta),
            ),
            batch_size=None,
            compute=ActorPoolStrategy(
                min_size=workers.min_workers, max_size=workers.max_workers, max_tasks_in_flight_per_actor=_IN_FLIGHT
            ),
            **self._actor_options(),
        ).map_batches(
            write,
            batch_size=self.plan.part_rows,
            num_cpus=0,
            compute=TaskPoolStrategy(size=min(_WRITERS, len(units))),
        )
        for batch in written.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            yield from zip(batch["part"].tolist(), batch["num_bad"].tolist(), strict=True)

    def _actor_options(self) -> dict[str, Any]:
        resources = dict(self.workers.resources_per_worker)
        options: dict[str, Any] = {"num_cpus": resources.pop("CPU", 1), "num_gpus": resources.pop("GPU", 0)}
        if resources:
            options["resources"] = resources
        if self.workers.runtime_env:
            options["runtime_env"] = self.workers.runtime_env
        return options
