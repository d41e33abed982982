"""The functions that a notebook or a script calls: compose, train, look at a run, load its model, evaluate, predict.

    from ftexp import api

    run = api.train(api.compose(["model=vit", "train.epochs=5", "run.name=first"]))
    run.metrics.query("split == 'val'").plot("step", "val_accuracy")
    model, transform, class_names = api.load_model(run)

Errors are subclasses of `ftexp.errors.FtexpError`, with the message that the command prints. `train` and `evaluate`
start Ray and stop it, or connect to `scaling.address`; a process runs one of them at a time. Hydra's state, signal
handlers and environment variables are restored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ftexp.config.schema import Config
from ftexp.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image
    from torch import Tensor, nn

    from ftexp.checkpoint.manifest import Manifest
    from ftexp.cli.trained_run import SavedRun
    from ftexp.rundir.state import Failure, RunState

_TYPED = "_typed"  # attribute of a composed config: its overrides
_WEIGHTS = {"model": "raw", "ema": "ema"}
_AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")  # Pillow's modes that PNG stores without conversion
_alone = threading.Lock()  # a process can have only one Ray


def compose(overrides: Sequence[str] = ()) -> Config:
    """Return the config that the command composes from these overrides; ConfigError names an unknown key.

    `train` checks the values. Hydra's state in this process is restored.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from ftexp.cli.compose import hydras_words, reworded, to_config
    from ftexp.config.schema import config_dir

    before = GlobalHydra.instance().hydra
    try:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
            composed = hydra.compose("config", hydras_words(overrides))
    except Exception as error:  # composing raises ValueError, AssertionError and AttributeError too
        raise reworded(error, overrides) from error
    finally:
        GlobalHydra.instance().hydra = before
    config = to_config(composed, list(overrides))
    setattr(config, _TYPED, list(overrides))
    return config


@dataclass(frozen=True)
class Run:
    """A run directory; each property reads its current state."""

    uri: str

    @property
    def status(self) -> str:
        """running, finished, failed or interrupted."""
        return self._state.status

    @property
    def metrics(self) -> pd.DataFrame:
        """Every logged point as a row: time, split, step, epoch, and a column for each metric."""
        import pandas as pd

        from ftexp.rundir.names import METRICS_FILE
        from ftexp.storage.append_log import read_lines
        from ftexp.storage.directory import Storage

        try:
            return pd.DataFrame(read_lines(Storage.at(self.uri), METRICS_FILE))
        except FileNotFoundError:
            return pd.DataFrame()

    @property
    def last(self) -> dict[str, float]:
        """The latest value of each metric."""
        return dict(self._state.metrics["last"])

    @property
    def checkpoints(self) -> list[Manifest]:
        """The checkpoints that have a readable manifest, highest step first."""
        return self._saved.store.manifests(lambda *_: None)

    @property
    def failures(self) -> list[Failure]:
        """The run's failures, each with its cost."""
        return list(self._state.failures)

    @property
    def config(self) -> Config:
        """The config of the last start."""
        return self._saved.config

    @property
    def _saved(self) -> SavedRun:
        from ftexp.cli.trained_run import SavedRun

        return SavedRun.at(self.uri)

    @property
    def _state(self) -> RunState:
        from ftexp.rundir.state import read_state
        from ftexp.storage.directory import Storage

        state = read_state(Storage.at(self.uri))
        if state is None:
            raise ConfigError(f"{self.uri} holds no run: give the directory of one")
        return state


def train(config: Config) -> Run:
    """Train a run to its end, or resume the run named by `run.name`. Unlike the command, don't restart a dead Ray.

    config: from `compose`, possibly changed afterwards, or built by hand; it is used as it is.

    Raises:
        ConfigError: the config is wrong, or this process is already connected to Ray; nothing was started.
        RunFailedError: no restart is left, or Ray died. `Run(<directory>)` has the details.
        KeyboardInterrupt: after a final checkpoint.
    """
    from ftexp.driver.run import train as run_to_end
    from ftexp.storage.directory import Storage
    from ftexp.storage.lease import unused_name

    name = config.run.name or unused_name()
    uri = Storage.at(config.run.storage, name).uri
    named = _with_name(config, name)
    with _undisturbed():
        run_to_end(named, getattr(config, _TYPED, None))
    return Run(uri)


def _with_name(config: Config, name: str) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))


class LoadedModel(NamedTuple):
    """A trained model and the transform of its input."""

    model: nn.Module  # in evaluation mode, on the CPU; float32 [batch, channels, size, size] -> logits
    transform: Callable[[Any], Tensor]  # a Pillow image, a path, or an encoded image -> [channels, size, size]
    class_names: list[str]  # names of the classes in the order of the logits


def load_model(run_or_checkpoint: Run | str | Path, weights: str = "model") -> LoadedModel:
    """Load a run's best checkpoint, or the checkpoint at this directory or URI; needs no Ray.

    weights: "model", or "ema" for the EMA weights.

    Raises:
        ConfigError: there is no run.
        CheckpointError: the run has no checkpoint, it is corrupt, or it has no EMA.
    """
    run, model = _loaded(run_or_checkpoint, weights)
    return LoadedModel(model, _transform(run), run.info.class_names)


def _loaded(run_or_checkpoint: Run | str | Path, weights: str) -> tuple[SavedRun, nn.Module]:
    from ftexp.checkpoint.manifest import MANIFEST
    from ftexp.checkpoint.reading import read_weights
    from ftexp.cli.trained_run import SavedRun, choose
    from ftexp.storage.directory import Storage

    if weights not in _WEIGHTS:
        raise ConfigError(f"weights={weights} must be one of {', '.join(_WEIGHTS)}")
    uri = run_or_checkpoint.uri if isinstance(run_or_checkpoint, Run) else str(run_or_checkpoint)
    place = Storage.at(uri)
    is_checkpoint = place.exists(MANIFEST)
    run = SavedRun.at(place.parent.parent.uri if is_checkpoint else uri)
    manifest = choose(run.store, place.name if is_checkpoint else "best", run.config)
    return run, run.model(read_weights(run.store, manifest, _WEIGHTS[weights]))


def _transform(run: SavedRun) -> Callable[[Any], Tensor]:
    import torch

    from ftexp.data.feeds.decoding import as_image
    from ftexp.data.feeds.feed import ToTensors

    to_tensors, fit = ToTensors(run.info, torch.device("cpu"), channels_last=False), run.info.fit

    def transform(picture: Any) -> Tensor:
        pixels = as_image(_encoded(picture), fit)
        return to_tensors(pixels[None])[0].clone()  # to_tensors reuses its output buffer

    return transform


def _encoded(picture: Any) -> bytes:
    """Return bytes that the decoder reads: files unchanged, Pillow images encoded without loss."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, (str, Path)):
        return Path(picture).expanduser().read_bytes()
    image: Image.Image = picture
    content = io.BytesIO()
    image.save(content, "PNG" if image.mode in _AS_PNG else "TIFF", exif=image.getexif())
    return content.getvalue()


def evaluate(run: Run | str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a checkpoint; return the results that `python -m ftexp.evaluate run=... <overrides>` writes."""
    from ftexp.evaluate.command import evaluate_words

    with _undisturbed():
        return evaluate_words([f"run={run.uri if isinstance(run, Run) else run}", *overrides], compose)


def predict(
    run_or_checkpoint: Run | str | Path, pictures: Sequence[Any], weights: str = "model", batch_size: int = 64
) -> pd.DataFrame:
    """Return a row per picture: the probability of each class, or the value of each target.

    pictures: Pillow images, paths, or encoded images.

    Runs in this process, without Ray. Use `python -m ftexp.predict` for large numbers of files.
    """
    import pandas as pd
    import torch

    from ftexp.predict.answers import probabilities

    run, model = _loaded(run_or_checkpoint, weights)
    transform, parts = _transform(run), [torch.empty(0, run.info.num_classes)]
    with torch.inference_mode():
        for start in range(0, len(pictures), batch_size):
            images = torch.stack([transform(picture) for picture in pictures[start : start + batch_size]])
            parts.append(probabilities(model(images), run.info))
    return pd.DataFrame(torch.cat(parts).numpy(), columns=run.info.class_names)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let one call at a time use Ray; then restore signal handlers and environment variables.

    ConfigError if the process is already connected to Ray: the call would shut down that connection.
    """
    with _alone:
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            raise ConfigError(
                "this process is connected to a Ray (ray.init): call ray.shutdown() first. To use a cluster that runs, "
                "set scaling.address=<its address>"
            )
        handlers, environment = _handlers(), dict(os.environ)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)


def _handlers() -> dict[int, Any]:
    """Return the handlers of the signals that Ray and a run handle; empty outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
