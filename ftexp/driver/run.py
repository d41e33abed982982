"""One run, from a config to its last metrics. Nothing heavy is imported before the config is validated."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from ftexp.config.checks.validate import validate
from ftexp.config.schema import PREPROCESSING, Config
from ftexp.driver.context import RunContext
from ftexp.rundir.state import FINISHED
from ftexp.storage.directory import Storage, absolute, open_uri

if TYPE_CHECKING:
    from ftexp.cluster.ray_cluster import SharedRay
    from ftexp.driver.restart import Restart


def train(
    config: Config,
    overrides: list[str] | None = None,
    shared: SharedRay | None = None,
    restart: Restart | None = None,
    begin_again: Callable[[Restart], NoReturn] | None = None,
) -> dict[str, float]:
    """Validate `config`, run it to the end and return the last metrics.

    Args:
        config: config of the whole run.
        overrides: overrides as typed, for overrides.yaml; preprocessing that they don't set is taken from pretrained
            weights. None: `config` is used unchanged.
        shared: the Ray of the sweep that this run is a trial of; None: a Ray of its own, or `scaling.address`.
        restart: state to resume with, if this process restarted because its Ray had died.
        begin_again: restarts this process if its Ray dies; None: Ray's death ends the run.

    Raises:
        ConfigError: the config is wrong; nothing was started.
        DataError: the data can't be read.
        RunFailedError: no restart is allowed any more, or Ray died. The checkpoints are still there.
    """
    if restart is None:  # else it was validated before its weights' preprocessing was added
        validate(config)
    if config.data.root is not None:  # absolute: config.yaml may be read in another working directory
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=absolute(config.data.root)))
    from ftexp.cluster.ray_cluster import prepare_environment
    from ftexp.cluster.resources import decide_workers, spare_of
    from ftexp.data.root import require_root
    from ftexp.driver.resume import decoding_as_begun, open_run
    from ftexp.driver.teacher import teacher_of
    from ftexp.storage.lease import Lease, remove_unused, unused_name

    open_uri(config.run.storage, "run.storage")
    workers = decide_workers(config.scaling, share=shared.share if shared else 1, spare=spare_of(config))
    run_name = config.run.name or unused_name()
    run_dir = Storage.at(config.run.storage, run_name)
    config, teacher, lost = teacher_of(_checked(config, overrides, run_dir), run_dir)
    lease = Lease.take(run_dir)
    try:
        config = decoding_as_begun(config, run_dir, overrides or [])
        state = open_run(config, run_dir, run_name)
        if lost is not None and state.status != FINISHED:
            raise lost
        begun = (run_dir, state, lease, shared, restart, begin_again)
        context = RunContext(config, overrides or [], workers, *begun, teacher)
        if state.status == FINISHED:
            _show_again(context)
            return state.metrics["last"]
        require_root(config.data)
        prepare_environment(config)
        return _started(context)
    finally:
        lease.release()
        if config.run.name is None:
            remove_unused(run_dir)


def _started(context: RunContext) -> dict[str, float]:
    """Run the session. The process that workers are forked from imports modules in parallel with this one."""
    from ftexp.cluster.hot_start.driver import HotStart, imports_of
    from ftexp.cluster.importing import uncollected

    config = context.config
    hot_start = HotStart(config.scaling, context.workers.num_threads, context.joins_ray, imports_of(config))
    try:
        with uncollected():
            from ftexp.driver.session import run_session

        return run_session(context, hot_start)
    finally:
        hot_start.stop()


def _checked(config: Config, overrides: list[str] | None, run_dir: Storage) -> Config:
    """Check the config against the run directory; return it with `resume_from` absolute and the preprocessing set."""
    from ftexp.driver.resume import has_run, located, require_resumable

    require_resumable(config, run_dir)
    if config.resume_from is not None:
        config = dataclasses.replace(config, resume_from=located(config.resume_from, run_dir))
    if config.resizing.initial_scale is not None and not has_run(run_dir):
        _check_sizes(config)
    if config.model.pretrained is not False:
        config = _with_preprocessing(config, overrides, run_dir)
    run_dir.require_writable()
    return config


def _show_again(context: RunContext) -> None:
    """Print the summary of a finished run, and deliver it to trackers that lack part of it."""
    from ftexp.driver.resume import changes
    from ftexp.driver.terminal import Terminal
    from ftexp.driver.tracker_session import deliver_late

    terminal = Terminal()
    terminal.finished_before(context.state.name, context.run_dir.uri)
    terminal.changed(changes(context.config, context.state, context.run_dir))
    terminal.summary(context.state, context.run_dir)
    deliver_late(context, terminal)


def _with_preprocessing(config: Config, overrides: list[str] | None, run_dir: Storage) -> Config:
    """Return the config with the preprocessing that its run started with, or else that of its pretrained weights.

    ConfigError if the weights don't fit the model.
    """
    from ftexp.driver.resume import preprocessing_as_begun, with_preprocessing

    begun = preprocessing_as_begun(config, overrides or [], run_dir)
    if begun is not None:
        return config if overrides is None else begun
    values, origin = _check_weights(config)
    if overrides is None:
        return config
    made = with_preprocessing(config, overrides, values)
    if replaced := [
        f"data.{name}={getattr(made.data, name)} instead of {getattr(config.data, name)}"
        for name in PREPROCESSING
        if getattr(made.data, name) != getattr(config.data, name)
    ]:
        print(f"ftexp: {', '.join(replaced)}: {origin}", file=sys.stderr)
    return made


def _import_plugins(config: Config) -> None:
    """Import the plug-ins on the driver; one may register the model."""
    from ftexp.cluster.ray_cluster import prepare_environment
    from ftexp.registry import load_plugins

    prepare_environment(config)  # a plug-in may import Ray
    load_plugins(config.plugins)


def _check_sizes(config: Config) -> None:
    """Raise ConfigError if the model can't be trained on the sizes of progressive resizing. Imports torch and timm."""
    _import_plugins(config)
    from ftexp.model.sizes import check_sizes

    check_sizes(config)


def _check_weights(config: Config) -> tuple[dict[str, Any], str]:
    """Check the pretrained weights; return their preprocessing and its origin. Importing torch and timm is slow."""
    _import_plugins(config)
    from ftexp.model.build import check_weights
    from ftexp.model.preprocessing import preprocessing_of

    check_weights(config.model, config.data)
    return preprocessing_of(config.model, config.data.channels)
