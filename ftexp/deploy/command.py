"""`python -m ftexp.deploy slurm|kuberay|kueue|skypilot [any train overrides] [deploy.key=value ...]`: write job files.

slurm     train.sbatch: one node or several; saves a final checkpoint before the time limit, and is requeued
kuberay   rayjob.yaml and a Dockerfile
kueue     the same, for a Kueue queue: deploy.queue=<LocalQueue>
skypilot  sky.yaml: a managed job on spot machines

deploy.nodes, deploy.gpus_per_node, deploy.cpus_per_node, deploy.memory_gb   resources of the job (1, 0, 8, 32)
deploy.hours, deploy.warn_s   slurm: time limit, and seconds from the signal to it (24, 120)
deploy.queue          slurm: the partition; kueue: the LocalQueue
deploy.image          kuberay, kueue: the image (ftexp:latest)
deploy.volume_claim   kuberay, kueue: a PersistentVolumeClaim to keep runs in
deploy.accelerator    skypilot: the GPU, for example H100
deploy.out            directory of the files (deploy)

run.name is needed: a restarted job resumes the run of that name. The overrides are checked as in train.
Exit codes: 0 written, 1 the files can't be written, 2 the command was wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from ftexp.cli.compose import run_hydra, to_config
from ftexp.cli.entry import command_words, exiting_on_error
from ftexp.cli.parse import parse_words
from ftexp.config.checks.validate import validate
from ftexp.config.fields import field_problems
from ftexp.config.schema import Config
from ftexp.deploy.plan import (
    KINDS,
    KUBERAY,
    KUEUE,
    MOUNT,
    SKYPILOT,
    SLURM,
    DeployConfig,
    Plan,
    checked_words,
    require_deployable,
)
from ftexp.errors import ConfigError, StorageError
from ftexp.registry import did_you_mean

_NEXT = {
    SLURM: "sbatch {0}/train.sbatch",
    KUBERAY: "docker build --tag {1} --file {0}/Dockerfile . && docker push {1} && kubectl apply -f {0}/rayjob.yaml",
    KUEUE: "docker build --tag {1} --file {0}/Dockerfile . && docker push {1} && kubectl apply -f {0}/rayjob.yaml",
    SKYPILOT: "sky jobs launch {0}/sky.yaml{2}",
}
_SECRET = " --secret RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"


@dataclass
class _Root:
    deploy: DeployConfig = field(default_factory=DeployConfig)


def main() -> None:
    """Run the command; exit with 0, 1 or 2."""
    words = command_words(__doc__)
    with exiting_on_error():
        kind, own, overrides = parse(words)

    def task(composed: DictConfig) -> None:
        deploy(kind, own, overrides, to_config(composed, overrides))

    sys.exit(run_hydra(task, checked_words(overrides, own)))


def parse(words: list[str]) -> tuple[str, DeployConfig, list[str]]:
    """Return the kind, the settings under `deploy.` and the training's overrides; ConfigError names what is wrong."""
    kind, *rest = words or [""]
    if kind not in KINDS:
        wrong = (
            f"{kind} is not a deployment target.{did_you_mean(kind, KINDS)}" if kind else "no deployment target given."
        )
        raise ConfigError(f"{wrong} Name one: {', '.join(KINDS)}")
    if any(word in ("-m", "--multirun") for word in rest):
        raise ConfigError("-m: deploy writes files for one run; remove it")
    own: DeployConfig = parse_words(_Root, [word for word in rest if word.startswith("deploy.")]).deploy
    if problems := dict(field_problems(own, "deploy.")):
        raise ConfigError("\n".join(problems.values()))
    overrides = [word for word in rest if not word.startswith("deploy.")]
    if own.volume_claim is not None:
        overrides.append(f"run.storage={MOUNT}")
    return kind, own, overrides


def deploy(kind: str, own: DeployConfig, overrides: list[str], config: Config) -> list[Path]:
    """Write the files for a training of `config`, composed from `overrides`; return their paths.

    Raises:
        ConfigError: the config is wrong, or can't be deployed this way; nothing was written.
        StorageError: the files can't be written.
    """
    typed = [word for word in overrides if own.volume_claim is None or word != f"run.storage={MOUNT}"]
    require_deployable(kind, own, typed, config)
    validate(config)
    plan = Plan(kind, own, tuple(overrides), config.run.name or "", config.run.storage)
    directory, written = Path(own.out), []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in _files(plan).items():
            (directory / name).write_text(content, encoding="utf-8")
            written.append(directory / name)
    except OSError as error:
        raise StorageError(f"deploy.out={own.out} can't be written: {error}") from error
    for path in written:
        print(f"written  {path}")
    print(f"next     {_NEXT[kind].format(directory, own.image, _SECRET if own.nodes > 1 else '')}")
    return written


def _files(plan: Plan) -> dict[str, str]:
    """Return {file name: content}."""
    from ftexp.deploy import dockerfile, kuberay, skypilot, slurm

    if plan.kind == SLURM:
        return {"train.sbatch": slurm.script(plan)}
    if plan.kind == SKYPILOT:
        return {"sky.yaml": skypilot.manifest(plan)}
    return {"rayjob.yaml": kuberay.manifest(plan), "Dockerfile": dockerfile.dockerfile()}
