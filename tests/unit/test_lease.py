"""The lease: one running owner, however the previous one ended."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ftexp.driver.run import train
from ftexp.errors import DataError, RunInUseError
from ftexp.storage.directory import Storage
from ftexp.storage.lease import LEASE_FILE, LOCK_FILE, Lease, unused_name
from tests.support.configs import composed

FAST = {"beat_s": 0.02, "watch_s": 0.1}  # in production: beat_s=5, watch_s=15
DEADLINE_S = 30


@pytest.fixture
def run_dir(tmp_path):
    return Storage.at(str(tmp_path / "run"))


@pytest.fixture
def take(request):
    """Function that takes leases, which are released at the end of the test."""

    def take(storage, say=lambda text: None, **how):
        lease = Lease.take(storage, say, **{**FAST, **how})
        request.addfinalizer(lease.release)
        return lease

    return take


@pytest.fixture(params=["no locks", "object store"])
def without_locks(request, run_dir, memory, monkeypatch):
    """Run directory without locks, where only the lease file identifies the owner."""
    if request.param == "object store":
        return Storage(memory)

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    return run_dir


def wait_for(condition):
    """Wait until `condition()` holds, polling often; fail after about DEADLINE_S."""
    never = threading.Event()
    for _ in range(int(DEADLINE_S / 0.005)):
        if condition():
            return
        never.wait(0.005)
    raise AssertionError("it never came true")


def test_a_second_command_is_refused_and_told_who_has_the_run(run_dir, take):
    take(run_dir)
    with pytest.raises(
        RunInUseError, match=rf"{run_dir.uri} is in use by process {os.getpid()} on .*run\.name"
    ) as told:
        take(run_dir)
    assert "Nothing was changed" in str(told.value)
    with pytest.raises(RunInUseError, match=f"process {os.getpid()} on "):  # the rejected attempt has changed nothing
        take(run_dir)


def test_another_run_is_nobodys_business(run_dir, take):
    take(run_dir)
    take(run_dir.parent.child("other"))


def test_what_was_given_back_is_free_and_can_be_given_back_twice(run_dir, take):
    lease = take(run_dir)
    lease.release()
    lease.release()
    second = take(run_dir)
    lease.release()  # the first owner's lease, which has ended
    with pytest.raises(RunInUseError):
        take(run_dir)
    second.release()
    take(run_dir)


def test_a_local_claim_is_the_kernels_and_no_file_of_beats(run_dir, take):
    lease = take(run_dir)
    assert lease._thread is None
    assert not run_dir.exists(LEASE_FILE)
    assert run_dir.exists(LOCK_FILE)


def test_the_owners_name_is_the_present_one_however_long_the_last_was(run_dir, take):
    run_dir.write_bytes(LOCK_FILE, b"process 12345678901234567890 on a host with a very, very long name indeed")
    take(run_dir)
    assert run_dir.read_bytes(LOCK_FILE).decode().startswith(f"process {os.getpid()} on ")
    assert b"indeed" not in run_dir.read_bytes(LOCK_FILE)


@pytest.mark.parametrize("keeps_child", [False, True], ids=["alone", "with a child that lives on"])
def test_a_killed_process_leaves_the_run_free(run_dir, take, keeps_child):
    code = textwrap.dedent(f"""
        import subprocess, sys, time
        from ftexp.storage.lease import Lease
        from ftexp.storage.directory import Storage
        lease = Lease.take(Storage({run_dir.uri!r}))
        child = subprocess.Popen(["sleep", "60"]) if {keeps_child} else None
        print(child.pid if child else 0, flush=True)
        sys.stdin.read()
    """)
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(RunInUseError, match=f"process {owner.pid} on "):
            take(run_dir)
        owner.kill()
        owner.wait(timeout=DEADLINE_S)
        take(run_dir)
    finally:
        owner.kill()
        if child:
            os.kill(child, signal.SIGKILL)
        owner.stdin.close()
        owner.stdout.close()


def test_an_error_that_does_not_mean_a_lack_of_locks_is_raised(run_dir, take, monkeypatch):
    def broken(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        take(run_dir)


def test_without_locks_a_free_run_is_taken_at_once_and_nothing_is_said(without_locks, take):
    said = []
    take(without_locks, said.append, watch_s=3600)
    assert said == []
    assert json.loads(without_locks.read_bytes(LEASE_FILE))["owner"].startswith(f"process {os.getpid()} on ")


def test_without_locks_a_living_owner_is_noticed_by_its_beat(without_locks, take):
    take(without_locks)
    said = []
    with pytest.raises(RunInUseError, match=f"is in use by process {os.getpid()} on "):
        take(without_locks, said.append, watch_s=3)
    (line,) = said
    assert "still alive?" in line
    assert f"process {os.getpid()}" in line


def test_without_locks_what_was_given_back_is_free_at_once(without_locks, take):
    take(without_locks).release()
    assert not without_locks.exists(LEASE_FILE)
    take(without_locks, watch_s=3600)


def test_without_locks_a_dead_owners_run_is_taken_over(without_locks, take):
    dead = {"owner": "process 1 on a host that is gone", "token": "dead", "beats": 7}
    without_locks.write_bytes(LEASE_FILE, json.dumps(dead).encode())
    said = []
    lease = take(without_locks, said.append)
    assert "process 1 on a host that is gone" in said[0]
    assert lease.lost is None
    with pytest.raises(RunInUseError, match=f"process {os.getpid()}"):
        take(without_locks, watch_s=3)


def test_without_locks_an_owner_that_ends_while_it_is_watched_makes_way(without_locks, take, monkeypatch):
    dead = {"owner": "process 1 on a host", "token": "ending", "beats": 7}
    without_locks.write_bytes(LEASE_FILE, json.dumps(dead).encode())
    monkeypatch.setattr("ftexp.storage.lease.time.sleep", lambda seconds: without_locks.delete_file(LEASE_FILE))
    take(without_locks, watch_s=3600)


def test_an_owner_that_seemed_dead_notices_that_it_was_taken_over(without_locks, take):
    slept = take(without_locks, beat_s=3600)  # like a suspended process
    second = take(without_locks)
    slept._beat_s = 0.01
    slept._ended.set()  # it wakes up
    slept._thread.join(timeout=DEADLINE_S)
    slept._ended.clear()
    threading.Thread(target=slept._beat, daemon=True).start()
    wait_for(lambda: slept.lost is not None)
    assert slept.lost == f"process {os.getpid()} on {os.uname().nodename}"
    slept.release()  # it doesn't remove the other's claim
    assert second.lost is None
    with pytest.raises(RunInUseError):
        take(without_locks, watch_s=3)


def test_of_two_that_take_over_at_once_the_one_whose_write_was_covered_is_refused(without_locks, take, monkeypatch):
    write = Lease._write

    def covered(self):
        write(self)
        other = {"owner": "process 2 on another host", "token": "other", "beats": 1}
        without_locks.write_bytes(LEASE_FILE, json.dumps(other).encode())

    monkeypatch.setattr(Lease, "_write", covered)
    with pytest.raises(RunInUseError, match="in use by process 2 on another host"):
        take(without_locks)


def test_an_outage_of_the_store_does_not_end_the_beat(without_locks, take, monkeypatch):
    lease = take(without_locks)
    outages = []
    real = Storage.write_bytes

    def fail(self, name, content):
        outages.append(name)
        raise OSError("no route to host")

    monkeypatch.setattr(Storage, "write_bytes", fail)
    wait_for(lambda: len(outages) >= 3)
    monkeypatch.setattr(Storage, "write_bytes", real)
    before = json.loads(without_locks.read_bytes(LEASE_FILE))["beats"]
    wait_for(lambda: json.loads(without_locks.read_bytes(LEASE_FILE))["beats"] > before)
    assert lease.lost is None


def test_names_that_nobody_gave_differ_within_a_second_and_tell_when():
    names = {unused_name() for _ in range(50)}
    assert len(names) == 50
    assert all(time.strptime(name[:19], "%Y-%m-%d_%H-%M-%S") and len(name) == 26 for name in names)


@pytest.mark.parametrize(("name", "is_begun", "left"), [(None, False, 0), (None, True, 1), ("demo", False, 1)])
def test_a_run_without_a_name_that_is_refused_before_it_begins_leaves_no_directory(
    tmp_path, monkeypatch, name, is_begun, left
):
    def refuse(context):
        if is_begun:
            context.run_dir.write_bytes("run.json", b"{}")
        raise DataError("data.root=nowhere does not exist")

    monkeypatch.setattr("ftexp.driver.run._started", refuse)
    config = composed("data=synthetic", f"run.storage={tmp_path}", *([f"run.name={name}"] if name else []))
    with pytest.raises(DataError, match="does not exist"):
        train(config)
    assert len(list(tmp_path.iterdir())) == left
