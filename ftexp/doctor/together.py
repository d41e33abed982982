"""Checks between ranks: workers are started as in training, and measure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ftexp.config.masking import masked
from ftexp.config.schema import Config
from ftexp.counting import counted
from ftexp.doctor.finding import Finding, fails, not_here, ok, warning
from ftexp.doctor.model_size import ModelSize

if TYPE_CHECKING:
    from ftexp.cluster.resources import Workers
    from ftexp.doctor.ranks import RankFacts
    from ftexp.storage.directory import Storage

_SLOW_EXCHANGE_S = 0.5  # time of one exchange of all gradients, from which the network is slow
_CLOCKS_APART_S = 1.0


def measured(config: Config, workers: Workers, storage: Storage) -> list[RankFacts]:
    """Start or join Ray, start a worker group, and return each rank's facts. Raises what Ray raises."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from ftexp.cluster import ray_private
    from ftexp.cluster.ray_cluster import leave_ray, start_ray
    from ftexp.doctor.ranks import RankFacts, measure

    running = start_ray(config, decodes=False)
    try:
        filesystem, path = storage.open()
        base, _, name = path.rpartition("/")
        scaling = config.scaling
        trainer = TorchTrainer(
            measure,
            torch_config=TorchConfig(backend=scaling.backend, timeout_s=scaling.timeout_s),
            scaling_config=ScalingConfig(
                num_workers=workers.max_workers,
                **workers.ray_scaling(scaling),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=base,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                worker_runtime_env=workers.runtime_env,
                logging_config=LoggingConfig("INFO" if config.verbose else "CRITICAL"),
            ),
            train_loop_config={},
        )
        return [RankFacts(**facts) for facts in ray_private.fitted(trainer).return_value]
    finally:
        leave_ray(running)


def together(config: Config, workers: Workers, storage: Storage, size: ModelSize | None) -> list[Finding]:
    """Return the findings of all checks of the ranks; if no workers start, one finding about that."""
    try:
        facts = measured(config, workers, storage)
    except Exception as error:  # any error of Ray, torch or a missing library becomes the finding
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        fix = "fix the reason; verbose=true shows Ray's own output"
        return [fails("workers", f"{workers}: {masked(reason)}", fix)]
    nodes = Counter(each.node for each in facts)
    started = ok("workers", f"{workers} started on {counted(len(nodes), 'node')}")
    return [started, same_versions(facts), same_product(facts), all_reduce(facts, size), clocks(facts)]


def same_versions(facts: Sequence[RankFacts]) -> Finding:
    """Compare the package versions of the nodes."""
    check, first = "versions on all nodes", facts[0].versions
    for each in facts:
        for name, found in each.versions.items():
            if found != first[name]:
                text = f"{name} is {first[name]} on {facts[0].node}, and {found} on {each.node}"
                return fails(check, text, "install the same everywhere: one image, or one lock file")
    return ok(check, f"the same on {counted(len(facts), 'rank')}")


def same_product(facts: Sequence[RankFacts]) -> Finding:
    """Compare the matrix product between ranks, and between repetitions on each rank."""
    check = "matrix product"
    for each in facts:
        if len(set(each.products)) > 1:
            text = f"rank {each.rank} ({each.device} of {each.node}) has several results for the same product"
            return fails(check, text, f"remove {each.node}: its processor or memory is faulty")
    by_device: dict[str, set[str]] = {}
    for each in facts:
        by_device.setdefault(each.device, set()).update(each.products)
    for device, found in by_device.items():
        if len(found) > 1:
            odd = _odd_one(facts, device)
            text = f"ranks on {device} differ; rank {odd.rank} of {odd.node} is in the minority"
            return fails(check, text, "give all nodes the same software; if they have it, the hardware is faulty")
    if len(set.union(*by_device.values())) > 1:
        text = f"differs between {' and '.join(sorted(by_device))}"
        return warning(check, text, "ranks of one kind of device: a restart that moves ranks changes bits")
    ranks, times = counted(len(facts), "rank"), counted(len(facts[0].products), "time")
    return ok(check, f"bitwise identical on {ranks}, {times} each")


def _odd_one(facts: Sequence[RankFacts], device: str) -> RankFacts:
    """Return the first rank of a device that has the rarest product."""
    own = [each for each in facts if each.device == device]
    counts = Counter(each.products[0] for each in own)
    return min(reversed(own), key=lambda each: counts[each.products[0]])


def all_reduce(facts: Sequence[RankFacts], size: ModelSize | None) -> Finding:
    """Check the network by the time that a step's gradients would take."""
    from ftexp.doctor.ranks import all_reduce_rate

    check = "all-reduce"
    if len(facts) == 1:
        return not_here(check, "a single rank exchanges nothing")
    slowest = max(facts, key=lambda each: each.all_reduce_s)
    rate = all_reduce_rate(slowest.all_reduce_s, len(facts))
    found = f"{rate / 1e9:.2f} GB/s (bus bandwidth, {len(facts)} ranks)"
    if size is None:
        return ok(check, found)
    seconds = 4 * size.num_parameters * 2 * (len(facts) - 1) / len(facts) / rate
    found += f"; the gradients of {size.num_parameters / 1e6:,.1f} M weights take {1000 * seconds:,.0f} ms"
    if seconds > _SLOW_EXCHANGE_S:
        return warning(check, found, "a faster network, NCCL_SOCKET_IFNAME, or a larger train.accumulate_steps")
    return ok(check, found)


def clocks(facts: Sequence[RankFacts]) -> Finding:
    """Compare the nodes' clocks."""
    check = "clocks"
    if len({each.node for each in facts}) == 1:
        return not_here(check, "one node has one clock")
    worst = max(facts, key=lambda each: abs(each.clock_ahead_s))
    found = f"at most {abs(worst.clock_ahead_s):.3f} s apart (±{worst.clock_error_s:.3f} s)"
    if abs(worst.clock_ahead_s) - worst.clock_error_s > _CLOCKS_APART_S:
        text = f"{found}: {worst.node} against {facts[0].node}"
        return warning(check, text, "run chrony or another NTP client: times of failures and events would be wrong")
    return ok(check, found)
