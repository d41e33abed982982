"""Search for a run's teacher before Ray starts: the weights that `distill.teacher` names, and whether they fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ftexp.checkpoint.manifest import Manifest, content_hash
from ftexp.cli.trained_run import SavedRun, choose
from ftexp.config.checks.distill import is_timm_name
from ftexp.config.schema import FEATURES, SINGLE_LABEL, Config, DistillConfig, ModelConfig
from ftexp.driver.resume import recorded
from ftexp.errors import CheckpointError, ConfigError
from ftexp.model.teacher_spec import KEY, TeacherSpec
from ftexp.rundir.state import FINISHED, read_state
from ftexp.storage.directory import Storage

_CONFIG_FILE = "config.json"  # timm's config, next to the weights
_FILES = {"raw": "model.pt", "ema": "extra_state.pt"}  # files of a checkpoint


def teacher_of(config: Config, run_dir: Storage) -> tuple[Config, TeacherSpec | None, ConfigError | None]:
    """Like `with_teacher`, but a finished run may have lost its teacher.

    Then the third value is the error, without which it can't train more, and the config has the recorded hashes.
    """
    try:
        return *with_teacher(config, run_dir), None
    except ConfigError as error:
        state, begun = read_state(run_dir), recorded(run_dir) or {}
        sha256 = begun.get("distill.sha256")
        if state is None or state.status != FINISHED or sha256 is None or config.distill.sha256 not in (None, sha256):
            raise
        known = dataclasses.replace(config.distill, sha256=sha256, spec_sha256=begun.get("distill.spec_sha256"))
        return dataclasses.replace(config, distill=known), None, error


def with_teacher(config: Config, run_dir: Storage) -> tuple[Config, TeacherSpec | None]:
    """Find the teacher and check that it fits. Importing torch and timm takes seconds.

    Args:
        config: a validated config.
        run_dir: run directory of the student.

    Returns:
        The config with the hashes and location of the weights, and the spec for the workers; None without a teacher.

    Raises:
        ConfigError: there is no such teacher, or it can't teach this model.
    """
    distill, begun = config.distill, recorded(run_dir)
    if distill.teacher is None:
        return config, None
    from ftexp.cluster.ray_cluster import prepare_environment

    prepare_environment(config)  # a plug-in may import Ray
    if is_timm_name(distill.teacher, has_plugins=bool(config.plugins)):
        spec, place = _named(config), dict[str, Any]()
    elif (path := Path(distill.teacher).expanduser()).is_file():
        spec, place = _of_file(config, path), {"teacher": str(path.absolute())}
    else:
        spec, place = _of_run(config, distill.teacher, (begun or {}).get("distill.sha256"))
    if distill.sha256 not in (None, spec.sha256):
        raise ConfigError(
            f"distill.sha256={distill.sha256}, and that of {KEY}={spec.source} is {spec.sha256}: use the intended "
            "teacher, or remove distill.sha256"
        )
    from ftexp.model.teacher_fit import check_teacher

    spec = check_teacher(spec, config)
    spec_sha256: str | None = spec.definition_sha256()
    if distill.spec_sha256 not in (None, spec_sha256):
        raise ConfigError(
            f"distill.spec_sha256={distill.spec_sha256}, and that of {KEY}={spec.source} is {spec_sha256}: its "
            "arguments, mean, std, size or class names differ; use the intended teacher, or remove "
            "distill.spec_sha256"
        )
    if begun is not None and "distill.spec_sha256" not in begun:  # the run is older than the field
        spec_sha256 = None
    found = dataclasses.replace(distill, sha256=spec.sha256, spec_sha256=spec_sha256, **place)
    return dataclasses.replace(config, distill=found), spec


def _named(config: Config) -> TeacherSpec:
    """Return the spec of a timm model, with weights of the hub or of the file `distill.pretrained`."""
    distill, data = config.distill, config.data
    assert distill.teacher is not None
    if isinstance(distill.pretrained, str):
        path = Path(distill.pretrained).expanduser().absolute()
        if not path.is_file():
            raise ConfigError(
                f"distill.pretrained={path}: no such file. Give a file of PyTorch or safetensors, or true"
            )
        model = ModelConfig(name=distill.teacher, kwargs=distill.kwargs, pretrained=str(path))
        return _with_file(config, model, path, f"{distill.teacher} of {path}")
    model = ModelConfig(name=distill.teacher, kwargs=distill.kwargs, pretrained=True)
    return TeacherSpec(
        model=model,
        source=f"{distill.teacher}, timm's hub",
        class_names=None,
        num_classes=None,
        image_size=distill.image_size or data.image_size,
        channels=data.channels,
        **_statistics(config, model),
    )


def _of_file(config: Config, path: Path) -> TeacherSpec:
    """Return the spec of a weights file with timm's config.json next to it."""
    try:
        content = json.loads(path.with_name(_CONFIG_FILE).read_text(encoding="utf-8"))
        name, arguments = content["architecture"], {**content.get("model_args", {})}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{KEY}={path}: no {_CONFIG_FILE} of timm's next to it says which architecture that is; set "
            f"{KEY}=<timm name> distill.pretrained={path}"
        ) from error
    for key in ("img_size", "in_chans", "num_classes"):
        arguments.pop(key, None)
    size = (content.get("pretrained_cfg", content).get("input_size") or [config.data.channels, None])[-1]
    spec = _with_file(
        config, ModelConfig(name=name, kwargs=arguments, pretrained=str(path.absolute())), path, str(path)
    )
    return dataclasses.replace(
        spec,
        class_names=content.get("label_names") if isinstance(content.get("label_names"), list) else None,
        image_size=config.distill.image_size or size or config.data.image_size,
    )


def _with_file(config: Config, model: ModelConfig, path: Path, source: str) -> TeacherSpec:
    from ftexp.model.teacher import sha256_of

    return TeacherSpec(
        model=model,
        source=source,
        class_names=None,
        num_classes=None,
        image_size=config.distill.image_size or config.data.image_size,
        channels=config.data.channels,
        sha256=sha256_of(path),
        **_statistics(config, model),
    )


def _statistics(config: Config, model: ModelConfig) -> dict[str, Any]:
    """Return mean and std of a teacher's weights; the data's own where timm doesn't give them."""
    from ftexp.model.preprocessing import preprocessing_of

    found, _ = preprocessing_of(model, config.data.channels)
    return {name: found.get(name, getattr(config.data, name)) for name in ("mean", "std")}


def _of_run(config: Config, uri: str, begun: str | None) -> tuple[TeacherSpec, dict[str, str]]:
    """Return the spec of a run's checkpoint, and its location for the config. begun: see `_checkpoint`."""
    from ftexp.checkpoint.reading import weights_at

    distill = config.distill
    try:
        run = SavedRun.at(uri)
        manifest = _checkpoint(run, distill, begun)
        sha256 = content_hash(manifest, _FILES[distill.weights])
        if distill.weights == "ema" and run.config.ema.decay is None:
            raise ConfigError("distill.weights=ema, but the run had no EMA (ema.decay): set raw")
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"{KEY}={uri}: {error}") from error
    info = run.info
    if info.task != SINGLE_LABEL and distill.kind != FEATURES:
        why = f"its data.task={info.task}, and distill.kind={distill.kind} compares distributions over classes"
        raise ConfigError(f"{KEY}={uri}: {why}; take distill.kind={FEATURES}")
    spec = TeacherSpec(
        model=dataclasses.replace(run.config.model, pretrained=False),
        source=f"{run.storage.uri}, {manifest.name}",
        class_names=info.class_names,
        num_classes=info.num_classes,
        image_size=distill.image_size or info.image_size,
        channels=info.channels,
        mean=info.mean,
        std=info.std,
        plugins=tuple(run.config.plugins),
        uri=run.store.storage.child(manifest.name).uri,
        file=_FILES[distill.weights],
        sha256=sha256,
        read=weights_at,
    )
    return spec, {"teacher": run.storage.uri, "checkpoint": manifest.name}


def _checkpoint(run: SavedRun, distill: DistillConfig, begun: str | None) -> Manifest:
    """Return the checkpoint that `distill.checkpoint` names.

    begun: hash of the weights that a resumed run started with; best and latest select these as long as they exist.
    """
    if begun is not None and distill.checkpoint in ("best", "latest"):
        for manifest in run.store.manifests(lambda *_: None):
            if content_hash(manifest, _FILES[distill.weights]) == begun:
                return manifest
    return choose(run.store, distill.checkpoint, run.config)
