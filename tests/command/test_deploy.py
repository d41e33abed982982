"""A command as the first process of a container: signals, and no processes left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import DEADLINE_S, RunFolder
from tests.support.processes import wait_until, wait_until_none

UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def processes_of(namespace):
    """Yield (state, name) of every process in a PID namespace."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if str((status.with_name("ns") / "pid").readlink()) == namespace:
                fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
                yield fields["State"][0], fields["Name"]
        except OSError:  # it has exited meanwhile
            continue


def test_as_pid_1_a_command_ends_with_75_after_sigterm_and_leaves_no_zombies_of_killed_workers(tmp_path):
    if subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no PID namespace may be made here")
    words = ["run.name=first", f"run.storage={tmp_path}", "train.epochs=500", "scaling.num_workers=2"]
    words += ["chaos=kill_worker", "chaos.step=20", "report.enabled=false", "checkpoint.every_steps=10"]
    words += ["model.kwargs.depth=1"]
    with (tmp_path / "log").open("w") as log:
        command = subprocess.Popen(
            [*UNSHARE, sys.executable, "-m", "ftexp.train", *words], cwd=tmp_path, stdout=log, stderr=log
        )
    run = RunFolder(tmp_path / "first")
    try:
        wait_until(lambda: len(run.events("ready")) >= 2 or command.poll() is not None)
        (first,) = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
        namespace = str(Path(f"/proc/{first}/ns/pid").readlink())
        wait_until_none(lambda: [name for state, name in processes_of(namespace) if state == "Z"])
        assert len(list(processes_of(namespace))) > 4
        os.kill(int(first), signal.SIGTERM)
        assert command.wait(DEADLINE_S) == 75, (tmp_path / "log").read_text()
    finally:
        command.kill()
        command.wait()
    assert run.record["status"] == "interrupted"
    assert list(processes_of(namespace)) == []
