"""Settings under `deploy.`, and the training's command line for them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from ftexp.config.fields import ranged
from ftexp.config.schema import Config
from ftexp.errors import ConfigError
from ftexp.storage.uri import is_remote

SLURM, KUBERAY, KUEUE, SKYPILOT = KINDS = ("slurm", "kuberay", "kueue", "skypilot")
PORT = 6379  # port of Ray's GCS
MOUNT = "/runs"  # mount point of deploy.volume_claim
USER_ID = 10001  # user id in the image; it has no entry in /etc/passwd
_SET_HERE = ("scaling.address", "scaling.num_workers", "scaling.use_gpu")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?")  # a RayJob's name; 63 characters with KubeRay's suffix


@dataclass(kw_only=True)
class DeployConfig:
    """Settings under `deploy.`"""

    nodes: int = ranged(1, low=1)
    gpus_per_node: int = ranged(0, low=0)  # one worker per GPU; 0: training on CPUs
    cpus_per_node: int = ranged(8, low=1)
    memory_gb: int = ranged(32, low=1)  # memory of a node
    hours: float = ranged(24.0, above=0)  # slurm: time limit of the job, which is requeued then
    warn_s: int = ranged(120, low=30)  # slurm: time from the signal to the time limit
    # slurm: the partition; kueue: the LocalQueue
    queue: str | None = None
    image: str = "ftexp:latest"  # kuberay, kueue: built from the Dockerfile
    volume_claim: str | None = None  # kuberay, kueue: mounted as run.storage
    accelerator: str | None = None  # skypilot: the GPU, for example H100
    out: str = "deploy"  # directory of the files


@dataclass(frozen=True)
class Plan:
    """One deployment. `words`: the training's overrides, without those of `scaling` that deploy sets."""

    kind: str
    own: DeployConfig
    words: tuple[str, ...]
    name: str  # name of the run
    storage: str  # run.storage

    @property
    def job_name(self) -> str:
        """The job's name in the scheduler."""
        return f"ftexp-{self.name}"

    def command(self, address: str | None, python: str = "python") -> str:
        """Return the training's command line for a shell. `address`: Ray's address as shell code; None: its own Ray."""
        scaling = [f"scaling.{key}={value}" for key, value in self._scaling(address is not None)]
        typed = shlex.join([python, "-m", "ftexp.train", *self.words, *scaling])
        return typed if address is None else f"{typed} scaling.address={address}"

    def _scaling(self, joins: bool) -> list[tuple[str, str]]:
        own = self.own
        workers = own.nodes * max(1, own.gpus_per_node)
        if own.gpus_per_node:
            return [("num_workers", str(workers)), ("use_gpu", "true")]
        if not joins:
            return [("use_gpu", "false")]  # num_workers=auto depends on the node's cores
        share = max(1, own.cpus_per_node - 1)
        return [("num_workers", str(workers)), ("use_gpu", "false"), ("resources_per_worker", f"{{CPU: {share}}}")]


def checked_words(plan_words: list[str], own: DeployConfig) -> list[str]:
    """Return overrides for checking the training as on a cluster, whatever this machine has."""
    workers = own.nodes * max(1, own.gpus_per_node)
    use_gpu = str(own.gpus_per_node > 0).lower()
    return [*plan_words, "scaling.address=auto", f"scaling.num_workers={workers}", f"scaling.use_gpu={use_gpu}"]


def require_deployable(kind: str, own: DeployConfig, words: list[str], config: Config) -> None:
    """Raise ConfigError, with a line for each setting that would prevent the job from being accepted or resumed."""
    problems = [f"{word}: deploy sets {key} itself; remove it" for word in words if (key := _key(word)) in _SET_HERE]
    if config.run.name is None:
        problems.append("run.name is not set: the job resumes the run of that name after a restart; add run.name=...")
    elif not _NAME.fullmatch(config.run.name) and kind != SLURM:
        problems.append(
            f"run.name={config.run.name} is not a valid name for {kind}: use at most 47 lower-case letters, digits "
            "and -"
        )
    if kind in (KUBERAY, KUEUE) and own.volume_claim is None and not is_remote(config.run.storage):
        problems.append(
            f"run.storage={config.run.storage} is on a pod's own disk, which ends with the pod: set "
            "deploy.volume_claim to a PersistentVolumeClaim that all pods can mount, or run.storage to a URI"
        )
    if kind == SKYPILOT and not is_remote(config.run.storage):
        problems.append(
            f"run.storage={config.run.storage} ends with the machine: set it to a URI, for example s3://bucket/runs"
        )
    if kind == SKYPILOT and own.gpus_per_node and own.accelerator is None:
        problems.append("deploy.accelerator is not set: name the GPU, for example deploy.accelerator=H100")
    if kind == KUEUE and own.queue is None:
        problems.append("deploy.queue is not set: name the LocalQueue, deploy.queue=...")
    if own.volume_claim is not None and any(_key(word) == "run.storage" for word in words):
        problems.append(f"run.storage: deploy.volume_claim mounts the claim as {MOUNT} and sets it; remove one of them")
    if problems:
        raise ConfigError("\n".join(problems))


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]
