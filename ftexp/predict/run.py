"""One invocation of `python -m ftexp.predict` after validation: start Ray, find the images, predict, stop Ray."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray  # before a thread imports a module that imports it

from ftexp.checkpoint.manifest import Manifest, content_hash
from ftexp.checkpoint.reading import read_weights
from ftexp.cli.trained_run import SavedRun
from ftexp.cli.wrapping import say
from ftexp.cluster.hot_start.driver import HotStart, on_joined_nodes
from ftexp.cluster.importing import import_meanwhile
from ftexp.cluster.interruptible import fit_interruptibly
from ftexp.cluster.ray_cluster import leave_ray, quiet_data, start_ray
from ftexp.cluster.resources import Workers, lacking_resources
from ftexp.config.masking import masked
from ftexp.config.schema import Config
from ftexp.config.source_names import AS_TRAINED
from ftexp.counting import counted
from ftexp.driver.resume import require_trained_on
from ftexp.errors import ConfigError, DataError, RayLostError
from ftexp.predict.parts import BAD_FILE, PARTS, PredictionPlan, begin, collect_bad
from ftexp.predict.stopping import Stopped, ask_to_stop
from ftexp.storage.directory import Storage
from ftexp.storage.lease import Lease

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ftexp.predict.inputs import Inputs

_MAX_BAD_SHOWN = 10
_COLUMNS = ("image_column", "label_column", "label_separator", "target_columns")
_SPLITTING = ("val_fraction", "test_fraction", "split_seed")  # data fields that assign images to splits
_FILE_OF = {"raw": "model.pt", "ema": "extra_state.pt"}  # file that holds the weights


@dataclass(frozen=True)
class Request:
    """A prediction: its data, its model and its output."""

    config: Config  # data as the model sees it, model, scaling
    run: SavedRun
    manifest: Manifest  # manifest of the checkpoint
    weights: str  # raw, or ema
    tta: str  # none, or hflip
    split: str
    out: Storage
    top_k: int
    batch_size: int
    part_rows: int
    format: str
    is_runs_own: bool  # whether it is the run's own data, in the same splits
    thresholds: list[float] | None = None  # threshold of each class, for multi_label

    def plan(self, inputs: Inputs) -> PredictionPlan:
        """Return the plan to write, from which the command resumes."""
        data = self.config.data
        fields = [*AS_TRAINED, *_COLUMNS, *([] if self.split == "all" else _SPLITTING)]
        root = Storage.at(data.root).uri if data.root is not None else None
        described = {"name": data.name, "root": root, "split": self.split, **{n: getattr(data, n) for n in fields}}
        return PredictionPlan(
            run=masked(self.run.storage.uri),
            checkpoint=self.manifest.name,
            weights=self.weights,
            weights_sha256=content_hash(self.manifest, _FILE_OF[self.weights]),
            data=masked(described),
            num_images=len(inputs.split),
            listing_sha256=inputs.digest,
            top_k=self.top_k,
            format=self.format,
            part_rows=self.part_rows,
            tta=self.tta,
            thresholds=self.thresholds,
        )


def run_session(request: Request, workers: Workers) -> None:
    """Predict the images that have no predictions yet, and print a summary.

    Raises:
        ConfigError: the directory holds predictions of another plan, or the cluster lacks resources.
        DataError: the images can't be listed, or none of them can be read.
        KeyboardInterrupt: Ctrl-C or SIGTERM was received. Finished parts stay.
    """
    config = request.config
    lease = Lease.take(request.out, key="out")
    hot_start = HotStart(config.scaling, workers.num_threads)
    importing = import_meanwhile("ftexp.predict.pipeline")
    asked: list[KeyboardInterrupt] = []
    running = None

    def stop(why: KeyboardInterrupt) -> bool:
        asked.append(why)
        return ask_to_stop()

    try:
        with hot_start.raylet_settings():
            running = start_ray(config, hot_start.runtime_env(), decodes=True)
        importing.join()
        fit_interruptibly(lambda: _predict(request, workers), lease, stop, lost=running.lost)
    except Stopped:
        raise asked[0] from None
    except RayLostError as error:
        raise RayLostError(f"{error}; run the same command with out={request.out.uri} to resume") from error
    finally:
        leave_ray(running)
        hot_start.stop()
        lease.release()


def _predict(request: Request, workers: Workers) -> None:
    from rich.console import Console

    from ftexp.data.shared import Shared
    from ftexp.predict.inputs import find_inputs
    from ftexp.predict.pipeline import PredictionJob
    from ftexp.predict.progress import ImageProgress
    from ftexp.registry import load_plugins

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    config, run = request.config, request.run
    quiet_data(config)
    load_plugins(config.plugins)
    workers, num_decoding = _placed(config, workers)
    inputs = find_inputs(config.data, request.split, run.info.class_names)
    if request.is_runs_own:
        require_trained_on(f"data.root={config.data.root}", vars(run.info), inputs.listing)
    plan = request.plan(inputs)
    missing = begin(request.out, plan)
    _print_header(console, request, plan, missing, f"{workers} · {num_decoding} CPUs decode")
    for excluded in inputs.excluded:
        say(console, f"excluded {excluded}")
    weights = Shared(_as_array(read_weights(run.store, request.manifest, request.weights)))
    job = PredictionJob(run, weights, inputs, plan, request.out, workers, num_decoding, request.batch_size)
    with ImageProgress(console, sum(len(plan.samples(part)) for part in missing)) as progress:
        for part, _ in job.write(missing):
            progress.advance(len(plan.samples(part)))
    _print_summary(console, request, plan, collect_bad(plan, request.out, inputs.bad), progress if missing else None)


def _as_array(weights: dict[str, Tensor]) -> Any:
    """Return a state dict as bytes that Ray's object store can return without a copy."""
    import io

    import numpy as np

    from ftexp.checkpoint.staging import writer

    content = io.BytesIO()
    writer(weights)(content)
    return np.frombuffer(content.getbuffer(), np.uint8)


def _placed(config: Config, workers: Workers) -> tuple[Workers, int]:
    """Return the workers to start on this cluster, and the number of CPUs that decode.

    ConfigError if the cluster lacks resources for either.
    """
    if lacking := lacking_resources(workers):
        raise ConfigError(f"{lacking}: use fewer workers, or set scaling.resources_per_worker")
    taken = workers.min_workers * workers.resources_per_worker.get("CPU", 1)
    there = ray.cluster_resources().get("CPU", 0)
    if there - taken < 1:
        raise ConfigError(
            f"scaling.num_workers={workers.min_workers} take {taken:g} of the cluster's {there:g} CPUs, which leaves "
            "none for decoding: use fewer workers, or scaling.resources_per_worker={CPU: 0.5}"
        )
    if config.scaling.address is not None:
        runtime_env, _ = on_joined_nodes(config.scaling, workers.num_threads)
        workers = dataclasses.replace(workers, runtime_env=runtime_env)
    return workers, config.data.decode_cpus or int(there - taken)


def _print_header(console: Console, request: Request, plan: PredictionPlan, missing: list[int], workers: str) -> None:
    done = plan.num_parts - len(missing)
    root = plan.data["root"] or plan.data["name"]
    mirrored = ", each with its mirror image (tta=hflip)" if plan.tta == "hflip" else ""
    already = f" · {done:,} of {plan.num_parts:,} parts are written already" if done else ""
    for title, text in (
        ("run", request.run.storage.uri),
        ("model", f"{request.run.config.model.name}, {plan.checkpoint} (epoch {request.manifest.epoch})"),
        ("images", f"{plan.num_images:,} of {root} (split {plan.data['split']}){mirrored}{already}"),
        ("workers", workers),
    ):
        say(console, f"{title:<9}{text}")


def _print_summary(console: Console, request: Request, plan: PredictionPlan, bad: list[Any], progress: Any) -> None:
    if len(bad) >= plan.num_images:
        first = bad[0]
        raise DataError(f"none of {plan.num_images:,} images can be read; the first: {first.where}: {first.reason}")
    if progress is not None:
        console.print(f"{'speed':<9}{progress.rate:,.0f} images/s over {progress.seconds:.1f} s", markup=False)
    files = counted(plan.num_parts, f"{plan.format} file")
    line = f"{counted(plan.num_images, 'image')} in {files}: {request.out.child(PARTS).uri}"
    say(console, f"{'written':<9}{line}")
    if bad:
        listed = request.out.uri.rstrip("/") + f"/{BAD_FILE}"
        say(console, f"{'bad':<9}{counted(len(bad), 'image')} can't be read: {listed}", "yellow")
    for sample in bad[:_MAX_BAD_SHOWN]:
        say(console, f"         {sample.where}: {sample.reason}")
