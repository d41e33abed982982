"""Number and resources of the workers, and the cluster's resources for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftexp.config.machine import num_local_gpus, usable_cpus
from ftexp.config.schema import AUTO, BESIDE, Config, ScalingConfig
from ftexp.config.source_names import can_stream
from ftexp.errors import ConfigError

_MAX_AUTO_CPU_WORKERS = 2  # small models gain nothing from more processes on one machine

_MAX_AUTO_THREADS = 8


@dataclass(frozen=True)
class Workers:
    """`ScalingConfig` with every `auto` resolved."""

    num_workers: int | tuple[int, int]
    use_gpu: bool
    resources_per_worker: dict[str, float]
    runtime_env: dict[str, Any] = field(default_factory=dict)  # Ray's runtime_env, for the train workers only

    def ray_scaling(self, scaling: ScalingConfig) -> dict[str, Any]:
        """Return the arguments of Ray's ScalingConfig for a worker's resources and placement."""
        return {
            "use_gpu": self.use_gpu,
            "resources_per_worker": self.resources_per_worker,
            "placement_strategy": scaling.placement_strategy,
            "accelerator_type": scaling.accelerator_type,
            "label_selector": scaling.label_selector,
        }

    @property
    def num_threads(self) -> int:
        """Threads of one worker: its whole CPUs, at least one."""
        return max(1, int(self.resources_per_worker.get("CPU", 1)))

    @property
    def max_workers(self) -> int:
        """The largest number of workers that may run at once."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def min_workers(self) -> int:
        """The smallest number of workers that may run at once."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def evaluation_resources(self) -> dict[str, float]:
        """Resources of a task that evaluates while training continues: a CPU, and a GPU if the workers use GPUs."""
        return {"CPU": 1, **({"GPU": 1} if self.use_gpu else {})}

    def __str__(self) -> str:
        count = self.num_workers if isinstance(self.num_workers, int) else "{} to {}".format(*self.num_workers)
        parts = ", ".join(f"{value:g} {name}" for name, value in self.resources_per_worker.items())
        return f"{count} × ({parts})"


def spare_of(config: Config) -> int:
    """Return the number of CPUs, and of GPUs if it uses any, that a run needs in addition to its workers'."""
    return int(config.train.eval == BESIDE)


def decide_workers(config: ScalingConfig, num_cpus: int | None = None, share: int = 1, spare: int = 0) -> Workers:
    """Resolve `auto`: a worker for each GPU, or up to two on CPU; the machine's cores are divided into threads.

    share: number of runs that share the machine; numbers given in the config are kept all the same.
    spare: see `spare_of`.
    """
    joins = config.address is not None
    assert not (joins and config.num_workers == AUTO), "refused by ftexp.config.checks.validate"
    cpus = 0 if joins else num_cpus or usable_cpus()
    use_gpu = config.use_gpu if isinstance(config.use_gpu, bool) else not joins and num_local_gpus() > 0
    num_workers: int | tuple[int, int]
    if config.num_workers == AUTO:
        slots = (num_local_gpus() if use_gpu else cpus) // share - spare
        num_workers = max(1, slots if use_gpu else min(slots, _MAX_AUTO_CPU_WORKERS))
    elif isinstance(config.num_workers, int):
        num_workers = config.num_workers
    else:
        num_workers = (config.num_workers[0], config.num_workers[1])
    max_workers = num_workers if isinstance(num_workers, int) else num_workers[1]
    threads = 1 if joins else max(1, min((cpus // share - spare) // max_workers, _MAX_AUTO_THREADS))
    resources = dict(config.resources_per_worker or {})
    resources.setdefault("CPU", threads)
    if use_gpu:
        resources.setdefault("GPU", 1)
    if not joins and resources["CPU"] * max_workers > cpus:
        raise ConfigError(
            f"scaling.num_workers={max_workers} with {resources['CPU']:g} CPU each want more than the {cpus} cores of "
            "this machine: take fewer, or give scaling.resources_per_worker={CPU: 0.5}"
        )
    return Workers(num_workers, use_gpu, resources)


def num_shares(configs: Sequence[Config], max_shares: int | None) -> int:
    """Return how many of these runs share this machine at once: at most `max_shares`, and one per core or GPU."""
    use_gpu = any(config.scaling.use_gpu is True for config in configs) or (
        any(config.scaling.use_gpu == AUTO for config in configs) and num_local_gpus() > 0
    )
    slots = num_local_gpus() if use_gpu else usable_cpus()
    slots //= 1 + max(map(spare_of, configs))
    return max(1, min(len(configs), slots, max_shares or slots))


def may_decode(config: Config) -> bool:
    """Return whether tasks may decode or change pictures while the workers train."""
    return config.augment.changes_pictures or (config.data.feed != "cached" and can_stream(config.data.name))


def no_workers() -> Workers:
    """Return the `Workers` of a command that needs none."""
    return Workers(0, use_gpu=False, resources_per_worker={})


def decoding_cpus(config: Config, workers: Workers) -> int:
    """Return the CPUs that may decode while the workers train; ConfigError if the workers leave none."""
    import ray

    min_workers = workers.min_workers
    taken = min_workers * workers.resources_per_worker.get("CPU", 1)
    there = ray.cluster_resources().get("CPU", 0)
    if there - taken < 1:
        user, instead = "data.feed=streaming decodes on", "data.feed=cached"
        if config.augment.changes_pictures:
            user, instead = "augment.crop and what else is done to single images needs", "augment=none"
        raise ConfigError(
            f"{user} CPUs that the workers leave, and {min_workers} workers take {taken:g} of the cluster's {there:g}: "
            f"take fewer workers, scaling.resources_per_worker={{CPU: 0.5}}, or {instead}"
        )
    return config.data.decode_cpus or int(there - taken)


def num_possible(workers: Workers, nodes: list[dict[str, Any]]) -> int:
    """Return the number of workers that these nodes have room for if empty; at most `workers.max_workers`."""
    wanted = {name: amount for name, amount in workers.resources_per_worker.items() if amount}
    there = [node["Resources"] for node in nodes]
    room = sum(min((int(node.get(name, 0) / amount) for name, amount in wanted.items()), default=0) for node in there)
    return min(room, workers.max_workers)


def living_nodes() -> list[dict[str, Any]]:
    """Return the cluster's nodes that are alive, as `ray.nodes` describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def lacking_resources(workers: Workers) -> str | None:
    """Return which resource the cluster currently lacks for the smallest number of workers; None if it has enough."""
    import ray

    min_workers = workers.min_workers
    for name, amount in workers.resources_per_worker.items():
        there = ray.cluster_resources().get(name, 0)
        if there < min_workers * amount:
            return (
                f"scaling.num_workers={min_workers} with {amount:g} {name} each need {min_workers * amount:g} {name}, "
                f"and the cluster has {there:g}"
            )
    return None
