"""Failures while torch's process group starts or is used, in Ray Train's own controller and workers."""

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ftexp.cluster import ray_private
from ftexp.failure.causes import Ending
from ftexp.failure.group_start import ReportingBackend, ReportingTorchConfig
from ftexp.failure.reporter import FailureReporter
from ftexp.wire.hub import Hub
from ftexp.wire.messages import GroupFailed, Retry
from tests.support.processes import wait_until

pytestmark = pytest.mark.usefixtures("data_ray")


@dataclass(kw_only=True)
class FaultyTorchConfig(ReportingTorchConfig):
    """A config whose first group of workers gets `port`, which is taken; a worker of the second and the third dies."""

    port: int
    starts: Path  # a file with a line per start

    @property
    def backend_cls(self):
        return FaultyBackend


class FaultyBackend(ReportingBackend):
    def on_start(self, worker_group, backend_config):
        def taken():
            return ray.util.get_node_ip_address(), backend_config.port

        with backend_config.starts.open("a") as file:
            print(file=file)
        number = len(backend_config.starts.read_text())
        if number == 2:
            worker_group.execute_single_async(1, os._exit, 1)
        if number == 3:
            with contextlib.suppress(RayActorError):
                worker_group.execute_single(0, os._exit, 1)
        pick = taken if number == 1 else ray.train.torch.config.get_address_and_port
        with mock.patch("ray.train.torch.config.get_address_and_port", pick):
            super().on_start(worker_group, backend_config)


def count_workers(_):
    import torch

    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return total.item()


def test_workers_start_again_where_another_process_took_the_port_and_where_one_dies(tmp_path):
    """There are CPUs for two workers only, so the workers of a failed group must be gone."""
    told = []
    hub = Hub("127.0.0.1", lambda message: told.append(message) or Retry(0.0))
    reporter = FailureReporter(hub.address)
    with socket.create_server(("", 0)) as other:
        trainer = TorchTrainer(
            count_workers,
            train_loop_config={},
            torch_config=FaultyTorchConfig(
                reporter=reporter, port=other.getsockname()[1], starts=tmp_path / "starts", timeout_s=60
            ),
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name="run", storage_path=str(tmp_path / "storage"), callbacks=[reporter]),
        )
        assert ray_private.fitted(trainer).return_value == 2
    hub.close()
    taken, *died = [message for message in told if isinstance(message, GroupFailed)]
    assert (taken.cause, taken.rank, taken.ending) == ("crash", None, Ending.RAISED)
    assert taken.error.startswith("DistNetworkError: ")
    assert "EADDRINUSE" in taken.error
    assert [(each.cause, each.rank, each.ending) for each in died] == [("crash", None, Ending.DIED)] * 2


def survive(config):
    """Rank 1 dies in the first attempt; rank 0 then notes whether it has a process group until it is killed."""
    import torch

    notes = Path(config["notes"])
    is_second = notes.exists()
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    if is_second:
        return total.item()
    if ray.train.get_context().get_world_rank() == 1:
        wait_until(notes.exists, every_s=0.001)
        os._exit(1)
    with notes.open("a", buffering=1) as file:
        for _ in range(60_000):  # a minute at least
            print("group" if torch.distributed.is_initialized() else "none", file=file)
            time.sleep(0.001)
    raise AssertionError("it was not killed")


def test_a_rank_that_outlives_another_keeps_the_process_group_to_its_end(tmp_path):
    notes = tmp_path / "notes"
    trainer = TorchTrainer(
        survive,
        train_loop_config={"notes": str(notes)},
        torch_config=ReportingTorchConfig(reporter=None, timeout_s=60),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="run", storage_path=str(tmp_path / "storage"), failure_config=FailureConfig(max_failures=1)
        ),
    )
    assert ray_private.fitted(trainer).return_value == 2
    assert set(notes.read_text().split()) == {"group"}
