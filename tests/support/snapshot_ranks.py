"""Program of tests/ray/test_sharded_checkpoints.py: ranks resume a sharded model from in-memory snapshots.

Two ranks keep snapshots, each on its own node with a copy on the other's, and resume. Then one node is lost: two ranks
resume, one of them on a node without a snapshot. So do one rank with the whole model, and three ranks.
"""

import dataclasses
import os
import signal
import tempfile
import time
from multiprocessing.managers import BaseManager
from pathlib import Path

import torch

from ftexp.checkpoint.build import build_manager
from ftexp.checkpoint.memory.keeper import Keeper, KeeperLostError
from ftexp.checkpoint.restore import restore
from ftexp.checkpoint.store import CheckpointStore
from ftexp.job.job import RunIdentity
from ftexp.storage.directory import Storage
from tests.support.processes import wait_until
from tests.support.saving_ranks import job_on, same, together, train, whole

NODES = "abc"


class Server(BaseManager):
    """A server process with a keeper."""


class Links:
    """Reaches the keepers of other processes through sockets in a directory."""

    def __init__(self, directory, node):
        self._directory, self.node = directory, node

    def nodes(self):
        return list(NODES)

    def call(self, node, method, *arguments, timeout_s):
        server = Server(str(Path(self._directory) / node), authkey=b"test")
        try:
            server.connect()
            return getattr(server.keeper(), method)(*arguments)
        except (OSError, EOFError) as error:
            raise KeeperLostError(node) from error


def serve(directory, node):
    keeper = Keeper(Links(directory, node), 1 << 28)
    Server.register("keeper", lambda: keeper)
    Server(str(Path(directory) / node), authkey=b"test").get_server().serve_forever()


def start(directory, node):
    if (pid := os.fork()) == 0:
        serve(directory, node)
    wait_until((Path(directory) / node).exists)
    return pid


def manager_on(node, directory, job, attempt, lineage):
    Server.register("keeper")
    job.channel.stop_requested = job.channel.save_requested = False
    job.channel.flush = lambda: None
    job.config.checkpoint.extra_state = ["progress", "shadow"]
    job.config.failure.memory_every_steps = 1
    job = dataclasses.replace(job, run=RunIdentity("x", attempt, {}, lineage))
    store = CheckpointStore(Storage.at(str(Path(directory) / "checkpoints")))
    return job, store, build_manager(job, store, Links(directory, node))


def keep(rank, directory, sizes, nodes, into):
    """Train and take snapshots; write the state of each of three complete ones to a file."""
    job, _, checkpoints = manager_on(nodes[rank], directory, job_on(rank, sizes, seed=1), 1, {})
    checkpoints.begin_snapshots()
    taken = []
    while len(taken) < 3:
        train(job, rank)
        if checkpoints.snapshot_due():
            checkpoints.take_snapshot(time.perf_counter())
            thread = checkpoints._snapshots._thread
            thread.join()
            if checkpoints._snapshots._lowest == 3:
                taken.append(job.progress.step)
                if rank == 0:
                    torch.save(whole(job, checkpoints), f"{into}{len(taken)}")
                else:
                    whole(job, checkpoints)


def go_on(rank, directory, sizes, nodes, into, lineage):
    """Resume from memory and compare with the file `into`."""
    job, store, checkpoints = manager_on(nodes[rank], directory, job_on(rank, sizes, seed=2), 2, lineage)
    assert restore(job, store, checkpoints) == "memory"
    same(whole(job, checkpoints), torch.load(into, weights_only=True))


def main():
    with tempfile.TemporaryDirectory() as directory:
        pids = {node: start(directory, node) for node in NODES}
        try:
            kept = str(Path(directory) / "kept")
            together(2, (keep, directory, (2,), "ab", kept))
            together(2, (go_on, directory, (2,), "ab", f"{kept}3", {1: None}))
            os.kill(pids["a"], signal.SIGKILL)
            together(2, (go_on, directory, (2,), "bc", f"{kept}3", {1: None}))
            together(1, (go_on, directory, (1,), "b", f"{kept}3", {1: None}))
            together(3, (go_on, directory, (3,), "bbc", f"{kept}3", {1: None}))
        finally:
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    print("as it was kept")


if __name__ == "__main__":
    main()
