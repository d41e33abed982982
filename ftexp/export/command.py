"""`python -m ftexp.export run=<dir> format=safetensors|torch_export|onnx [key=value ...]`: export a trained model.

safetensors   model.safetensors and config.json: timm.create_model("local-dir:<out>", pretrained=True)
torch_export  model.pt2: torch.export.load("model.pt2").module(); any batch size
onnx          model.onnx, for ONNX Runtime and others; any batch size. Needs the extra onnx: uv run --extra onnx ...

The exported models do not need ftexp. The input of the last two is pixels, uint8 [batch, size, size, channels], which
they normalise; the output is always logits. export.json, next to the model, has labels, input size, mean and std, and
the difference from the original on images of the run's data. A model that differs by more than the tolerance is
removed. Exit codes: 0 done, 1 failed, 2 the command was wrong.

run         a run directory or URI
checkpoint  best, latest, or a directory's name under checkpoints/ (default: best)
weights     raw, or ema: their EMA, if the run has one (default: raw)
out         a new directory or URI (default: <run>/exports/<format>_<checkpoint>, plus _ema for weights=ema)
samples     number of images for the comparison (64)
tolerance   largest allowed difference of a logit (0.001)
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from omegaconf import MISSING

from ftexp.cli.entry import command_words, exiting_on_error, with_run
from ftexp.cli.parse import read_command
from ftexp.cli.wrapping import print_wrapped
from ftexp.config.fields import choice, ranged
from ftexp.config.schema import REGRESSION, SINGLE_LABEL, TORCHVISION
from ftexp.errors import ConfigError, ExportError
from ftexp.rundir.names import EXPORTS

if TYPE_CHECKING:
    from torch import Tensor

    from ftexp.checkpoint.manifest import Manifest
    from ftexp.cli.trained_run import SavedRun
    from ftexp.data.cropping import Fit
    from ftexp.data.decoder import Decoding
    from ftexp.data.info import DataInfo
    from ftexp.export.checking import Difference, Samples
    from ftexp.storage.directory import Storage

_ABOUT_FILE = "export.json"
_FORMATS = ("safetensors", "torch_export", "onnx")
_NEEDED = ("onnx", "onnxscript", "onnxruntime")  # packages that format=onnx needs


@dataclass(kw_only=True)
class ExportConfig:
    """Arguments of the command."""

    run: str = MISSING
    format: str = choice(MISSING, _FORMATS)
    checkpoint: str = "best"
    weights: str = choice("raw", ("raw", "ema"))
    out: str | None = None
    samples: int = ranged(64, low=2)
    tolerance: float = ranged(1e-3, above=0)


def main() -> None:
    """Run the command; exit with 0, 1, 2 or 130."""
    words = with_run(command_words(__doc__))
    with exiting_on_error():
        export(parse(words))


def parse(words: list[str]) -> ExportConfig:
    """Parse key=value words; ConfigError names what is wrong."""
    config: ExportConfig = read_command(ExportConfig, words, run="<run directory>", format="|".join(_FORMATS))
    missing = [name for name in _NEEDED if config.format == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"format=onnx needs {', '.join(missing)}: write uv run --extra onnx in front of the command, or "
            "pip install 'ftexp[onnx]', or set format=torch_export"
        )
    return config


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the model, checked against the original; return the content of export.json.

    Raises:
        ConfigError: there is no such run, or `out` already exists.
        CheckpointError: the run has no such checkpoint, or it is corrupt.
        ExportError: the exported model differs from the original by more than the tolerance. Nothing is left behind.
        StorageError: `out` can't be written.
    """
    from ftexp.cli.trained_run import SavedRun, choose
    from ftexp.storage.directory import Storage

    run = SavedRun.at(config.run)
    manifest = choose(run.store, config.checkpoint, run.config)
    which = "" if config.weights == "raw" else f"_{config.weights}"
    default = run.storage.child(EXPORTS, f"{config.format}_{manifest.name}{which}")
    out = Storage.at(config.out) if config.out is not None else default
    if out.exists():
        raise ConfigError(f"out={out.uri} already exists: remove it, or give another out=...")
    out.parent.require_writable("out")
    from ftexp.checkpoint.reading import read_weights  # imports torch, which takes two seconds

    weights = read_weights(run.store, manifest, config.weights)
    samples = _samples(run, config.samples)
    with tempfile.TemporaryDirectory() as name:
        return _export(config, run, manifest, weights, samples, Path(name), out)


def _samples(run: SavedRun, num_samples: int) -> Samples:
    """Return images for the comparison, read as in training, which needs a Ray of its own for some seconds."""
    from ftexp.cluster.ray_cluster import private_ray

    with private_ray(run.config):
        from ftexp.export.checking import samples_of
        from ftexp.registry import load_plugins

        load_plugins(run.config.plugins)
        return samples_of(run, num_samples)


def _export(
    config: ExportConfig,
    run: SavedRun,
    manifest: Manifest,
    weights: dict[str, Tensor],
    samples: Samples,
    directory: Path,
    out: Storage,
) -> dict[str, Any]:
    import torch

    from ftexp.export.checking import compare
    from ftexp.export.formats import answers, formats
    from ftexp.model.build import as_logits

    model = run.model(weights)
    with torch.inference_mode():
        images = torch.zeros(1, run.info.channels, run.info.image_size, run.info.image_size)
        as_logits(model(images), run.config.model, run.info.num_classes)
    about = _about(config, run, manifest)
    exported = formats.get(config.format)(model, run.info, about, directory)
    difference = compare(answers(model, run.info), exported, samples.pixels, run.info.task)
    about["checked"] = {
        "images": len(samples.pixels),
        "of": samples.origin,
        "same_class": difference.num_same,
        "largest_difference": difference.largest,
        "largest_logit": difference.largest_logit,
        "tolerance": config.tolerance,
    }
    _print(about, samples, difference)
    if not difference.largest <= config.tolerance:  # also if it is NaN
        raise ExportError(
            f"the exported model differs from the original by {difference.largest:.3g} in a logit, and tolerance="
            f"{config.tolerance:g}: nothing was written. Set a larger tolerance if this is acceptable"
        )
    (directory / _ABOUT_FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")
    files = sorted(path.name for path in directory.iterdir())
    out.publish({name: functools.partial(_copy, directory / name) for name in files}, last=_ABOUT_FILE)
    print_wrapped([f"written  {out.uri}: {', '.join(files)}"], sys.stdout)
    return about


def _about(config: ExportConfig, run: SavedRun, manifest: Manifest) -> dict[str, Any]:
    from ftexp.config.masking import masked
    from ftexp.config.versions import package_versions
    from ftexp.model.build import timm_arguments

    info = run.info
    size = info.image_size
    graph = config.format != "safetensors"
    layout = "uint8 pixels, [batch, height, width, channels]" if graph else "float32, [batch, channels, height, width]"
    prepared = "scaled to 0..1 and normalised inside" if graph else "to be scaled to 0..1, less mean, by std"
    return {
        "format": config.format,
        "run": masked(run.storage.uri),
        "checkpoint": manifest.name,
        "weights": config.weights,
        "epoch": manifest.epoch,
        "metrics": manifest.metrics,
        "arguments": timm_arguments(run.config.model, info),
        "labels": info.class_names,
        "input": f"{layout}; {prepared}",
        "input_size": [size, size, info.channels] if graph else [info.channels, size, size],
        "resize": _resizing(info.fit),
        "mean": info.mean,
        "std": info.std,
        **_outputs(info),
        "versions": package_versions(),
    }


def _outputs(info: DataInfo) -> dict[str, Any]:
    """Describe the model's outputs."""
    if info.task != REGRESSION:
        activation = "softmax" if info.task == SINGLE_LABEL else "sigmoid"
        output = f"logits, float32 [batch, labels]; probabilities by {activation}"
        return {"task": info.task, "activation": activation, "output": output}
    output = "the targets, float32 [batch, labels]"
    if info.target_mean is not None:
        output = "standardised targets, float32 [batch, labels]: times target_std, plus target_mean"
    return {"task": info.task, "target_mean": info.target_mean, "target_std": info.target_std, "output": output}


def _resizing(fit: Fit) -> str:
    """Describe the conversion of an image to the model's input: see `ftexp.data.decoder` and `ftexp.data.cropping`."""
    by_torch = fit.decoding.decoder == TORCHVISION
    if fit.crop_pct is None and fit.crop_mode == "center":
        how = f"shorter side to the size by Pillow's {fit.interpolation}, then the centre: PIL.ImageOps.fit"
        if by_torch:
            how = f"the largest square in the centre, from a whole pixel on, to the size, {fit.interpolation}"
    else:
        share = fit.crop_pct or 1.0
        how = f"timm's transforms_imagenet_eval: crop_pct={share}, crop_mode={fit.crop_mode}, {fit.interpolation}"
    scaling = ["scaled by torch: interpolate(antialias=True) of uint8"] if by_torch else []
    return "; ".join([*_decoding_steps(fit.decoding), how, *scaling])


def _decoding_steps(decoding: Decoding) -> list[str]:
    """Return the steps before scaling that decoders don't do by default."""
    steps = ["turned upright as its EXIF data say"] if decoding.exif_orientation else []
    if decoding.background is not None:
        steps.append(f"transparent images on {decoding.background}")
    return steps + ([f"16-bit images of {decoding.bit_depth} bits"] if decoding.bit_depth != 16 else [])


def _copy(path: Path, stream: BinaryIO) -> None:
    from ftexp.storage.directory import write_all

    with path.open("rb") as file:
        while chunk := file.read(2**20):
            write_all(stream, chunk)


def _print(about: dict[str, Any], samples: Samples, difference: Difference) -> None:
    lines = [f"model    {about['arguments']['model_name']}, {about['checkpoint']} (epoch {about['epoch']})"]
    if samples.why_noise:
        lines.append(
            f"!        no image of the run's data can be read, so the models are compared on noise: {samples.why_noise}"
        )
    number, origin = len(samples.pixels), "of noise" if samples.why_noise else f"of the {samples.origin} split"
    lines.append(
        f"checked  {number} images {origin}: largest difference of a logit {difference.largest:.3g} "
        f"(largest logit {difference.largest_logit:.3g}); same class for {difference.num_same} of {number}"
    )
    print_wrapped(lines, sys.stdout)
