"""Fail one of three machines (network namespaces) of a Ray cluster: what does a run report, lose and compute?

    sudo uv run python scripts/netns_cluster.py [--cases CASE ...] [--storage directory s3] [--json FILE] [--check]

Needs root and Linux's `ip`, `tc` and `unshare`; a skewed clock also needs a C compiler, `cc`. Each machine has its own
network, host name and /etc/hosts, behind one bridge; moto's S3 listens on the bridge. Every case starts a new Ray: the
command runs on the first machine, two workers on two of the three (elastic: two or three workers). Once the run trains,
the case strikes a machine other than the first that has a worker. Afterwards the last checkpoint is compared bitwise
with the undisturbed run's; if the number of workers changed, the batches are compared instead. Everything created is
removed at the end, also on Ctrl-C. Takes 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from benching import describe_machine, finish
from pyarrow.fs import S3FileSystem
from rich.console import Console
from rich.table import Table

from ftexp.rundir.names import EVENTS_FILE, RUN_FILE
from ftexp.rundir.sample_ledger import read_updates
from ftexp.storage.append_log import read_lines
from ftexp.storage.directory import Storage

REPOSITORY = Path(__file__).resolve().parents[1]
RAY = Path(sys.executable).with_name("ray")
BRIDGE, GATEWAY, S3_PORT, RAY_PORT = "ftexp-br", "10.77.0.254", 5555, 6379
ADDRESS = f"10.77.0.1:{RAY_PORT}"
STRIKE_AT = "epoch 4/"  # beginning of a line of the command's output
CUT_S = SLOW_S = 20
SLOW_MBIT = 20  # a step sends 3 MB each way
SKEWS_S = {"ftexp-1": 0, "ftexp-2": 3600, "ftexp-3": -3600}
TRAINING = [
    *("train.epochs=8", "checkpoint.every_steps=20", "train.ledger=true", f"scaling.address={ADDRESS}"),
    *("run.name=run", "scaling.use_gpu=false"),
]
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
static long skew(void) { return atol(getenv("SKEW_S")); }
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += skew();
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec, now->tv_usec = exact.tv_nsec / 1000;
    return failed;
}
time_t time(time_t *where) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (where) *where = exact.tv_sec;
    return exact.tv_sec;
}
/* Who waits until a time of that clock is woken by the kernel's; times since the machine's start are small. */
static const struct timespec *kernels(const struct timespec *when, struct timespec *moved) {
    if (!when || when->tv_sec < 1000000000) return when;
    *moved = *when, moved->tv_sec -= skew();
    return moved;
}
int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec moved;
    if (!real) real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    return real(cond, mutex, kernels(until, &moved));
}
int pthread_cond_clockwait(pthread_cond_t *cond, pthread_mutex_t *mutex, clockid_t id, const struct timespec *until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    struct timespec moved;
    if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_clockwait");
    return real(cond, mutex, id, kernels(until, &moved));
}
long syscall(long number, ...) {
    static long (*real)(long, ...);
    struct timespec moved;
    long given[6];
    va_list list;
    va_start(list, number);
    for (int place = 0; place < 6; place++) given[place] = va_arg(list, long);
    va_end(list);
    if (!real) real = dlsym(RTLD_NEXT, "syscall");
    if (number == SYS_futex && given[1] & FUTEX_CLOCK_REALTIME)
        given[3] = (long)kernels((const struct timespec *)given[3], &moved);
    return real(number, given[0], given[1], given[2], given[3], given[4], given[5]);
}
"""


def call(*words: str, check: bool = True) -> str:
    """Run a command; return its standard output."""
    return subprocess.run(words, check=check, capture_output=True, text=True).stdout


class Machine:
    """A network namespace with a host name, and the processes in it."""

    def __init__(self, number: int) -> None:
        self.name, self.address, self.port = f"ftexp-{number}", f"10.77.0.{number}", f"ftexp-v{number}"

    def make(self) -> None:
        """Create the namespace and connect it to the bridge."""
        hosts = "".join(f"{other.address} {other.name}\n" for other in MACHINES)
        etc = Path("/etc/netns", self.name)  # `ip netns exec` bind-mounts its files over /etc
        etc.mkdir(parents=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        call("ip", "netns", "add", self.name)
        call("ip", "link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        call("ip", "link", "set", self.port, "master", BRIDGE, "up")
        call("ip", "-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            call("ip", "-n", self.name, "link", "set", device, "up")

    def remove(self) -> None:
        """Kill its processes and remove everything that `make` created."""
        self.kill()
        call("ip", "netns", "delete", self.name, check=False)
        call("ip", "link", "delete", self.port, check=False)
        shutil.rmtree(Path("/etc/netns", self.name), ignore_errors=True)

    def start(self, directory: Path, *words: str, **arguments: Any) -> subprocess.Popen[str]:
        """Start a command on the machine; `directory`/ray, for Ray's files, differs between machines."""
        own, shown = directory / self.name, directory / "ray"
        for each in (own, shown):
            each.mkdir(exist_ok=True)
        inside = ["sh", "-c", f'hostname {self.name} && mount --bind {own} {shown} && exec "$@"', "sh", *words]
        command = ["ip", "netns", "exec", self.name, "unshare", "--uts", *inside]
        arguments = {"cwd": REPOSITORY, "start_new_session": True, "text": True, **arguments}
        return subprocess.Popen(command, **arguments)

    def pids(self) -> list[int]:
        """Return the pids of its processes."""
        return [int(pid) for pid in call("ip", "netns", "pids", self.name, check=False).split()]

    def kill(self) -> None:
        """Kill its processes, until none is left."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def connect(self, is_up: bool) -> None:
        """Set its link up or down; while it is down nothing arrives, not even the end of a connection."""
        call("ip", "link", "set", self.port, "up" if is_up else "down")

    def limit(self, mbit: int | None) -> None:
        """Limit the bandwidth in each direction; None: no limit."""
        call("tc", "qdisc", "delete", "dev", self.port, "root", check=False)
        call("ip", "netns", "exec", self.name, "tc", "qdisc", "delete", "dev", "eth0", "root", check=False)
        if mbit is not None:
            shape = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "128kb", "latency", "200ms")
            call("tc", "qdisc", "add", "dev", self.port, *shape)
            call("ip", "netns", "exec", self.name, "tc", "qdisc", "add", "dev", "eth0", *shape)


MACHINES = [Machine(number) for number in (1, 2, 3)]


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Create the bridge and the machines; remove them on exit."""
    with contextlib.ExitStack() as stack:
        stack.callback(call, "ip", "link", "delete", BRIDGE, check=False)
        call("ip", "link", "add", BRIDGE, "type", "bridge")
        call("ip", "address", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        call("ip", "link", "set", BRIDGE, "up")
        for machine in MACHINES:
            stack.callback(machine.remove)
            machine.make()
        yield


@contextlib.contextmanager
def object_store(directory: Path) -> Iterator[str]:
    """Run moto's S3 on the bridge; yield a URI."""
    command = [sys.executable, "-m", "moto.server", "-H", GATEWAY, "-p", str(S3_PORT)]
    with (directory / "moto.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            wait_until(lambda: call("ss", "-Hltn", f"sport = :{S3_PORT}"), 60)
            endpoint = {"endpoint_override": f"{GATEWAY}:{S3_PORT}", "scheme": "http", "region": "us-east-1"}
            S3FileSystem(**endpoint, allow_bucket_creation=True).create_dir("netns")
            yield f"s3://netns?{urlencode(endpoint, safe=':')}"
        finally:
            server.kill()


@contextlib.contextmanager
def ray_cluster(directory: Path, environment: dict[str, str], is_skewed: bool) -> Iterator[None]:
    """Run Ray on all machines, with one CPU each. is_skewed: the clocks of all but the first are wrong."""
    common = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    head = MACHINES[0]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((directory / "ray.log").open("a"))
        for machine in MACHINES:
            stack.callback(machine.kill)
            wrong = {"LD_PRELOAD": str(shim(directory)), "SKEW_S": str(SKEWS_S[machine.name])} if is_skewed else {}
            where = [f"--node-ip-address={machine.address}", *common]
            first = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false", f"--temp-dir={directory}/ray"]
            role = first if machine is head else [f"--address={ADDRESS}"]
            machine.start(directory, str(RAY), "start", *role, *where, env=environment | wrong, stdout=log, stderr=log)
            if machine is head:
                wait_until(lambda: call("ip", "netns", "exec", head.name, "ss", "-Hltn", f"sport = :{RAY_PORT}"), 60)
        count = f"import ray, sys; ray.init('{ADDRESS}', log_to_driver=False); sys.exit(len(ray.nodes()) != 3)"
        asked = [sys.executable, "-c", count]
        wait_until(lambda: head.start(directory, *asked, env=environment, stderr=log, stdout=log).wait() == 0, 120)
        yield


def wait_until(holds: Callable[[], Any], timeout_s: float) -> None:
    """Wait until `holds` returns a true value; raise TimeoutError after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s:.0f} s")
        time.sleep(0.2)


@dataclass
class Run:
    """A finished invocation and its run."""

    uri: str
    status: int
    output: str

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """Contents of run.json."""
        state: dict[str, Any] = json.loads(Storage.at(self.uri).read_bytes(RUN_FILE))
        return state

    @property
    def seconds(self) -> float:
        """Time from the first batch to the end; excludes the start, whose duration varies."""
        lines = read_lines(Storage.at(self.uri), EVENTS_FILE)
        first = next(line["time"] for line in lines if line["event"] == "ready")
        return float(lines[-1]["time"] - first)

    @property
    def reported(self) -> str:
        """Failures with their causes, final status and exit status."""
        causes = [f"{each['cause']} of {_whom(each)}" for each in self.state.get("failures", [])]
        return f"{', '.join(causes) or 'nothing'}; {self.state.get('status')}, exit status {self.status}"

    @property
    def replayed(self) -> int:
        """Number of replayed steps."""
        return sum(each["steps_replayed"] or 0 for each in self.state.get("failures", []))


def _whom(failure: dict[str, Any]) -> str:
    return f"rank {failure['rank']} on {failure['node']}" if failure["rank"] is not None else "a worker"


def train(
    directory: Path,
    storage: str,
    environment: dict[str, str],
    overrides: list[str],
    strike: Callable[[list[int]], None],
) -> Run:
    """Run the command on the first machine; call `strike` with the workers' pids at the line `STRIKE_AT`."""
    head, lines, pids, began = MACHINES[0], list[str](), list[int](), time.monotonic()
    is_struck = False
    words = [sys.executable, "-m", "ftexp.train", *TRAINING, f"run.storage={storage}", *overrides]
    with head.start(directory, *words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(f"{time.monotonic() - began:7.1f} {line}")
            if found := re.search(r"pids ([\d, ]+)", line):
                pids = [int(pid) for pid in found[1].split(",")]
            if line.startswith(STRIKE_AT) and not is_struck:  # a recovery may print the line again
                is_struck = True
                strike(pids)
    return Run(under(storage, "run"), process.returncode, "".join(lines))


def under(uri: str, name: str) -> str:
    """Append `name` to a directory, or to the path of a URI that has a query."""
    place, mark, query = uri.partition("?")
    return f"{place}/{name}{mark}{query}"


def worker_machine(pids: list[int]) -> Machine:
    """Return a machine other than the first that has a worker."""
    return next(machine for machine in MACHINES[1:] if set(pids) & set(machine.pids()))


def do_nothing(_: list[int]) -> None:
    """Leave the run alone."""


def kill_node(pids: list[int]) -> None:
    """Cut a machine's power: its peers never receive the end of a connection."""
    machine = worker_machine(pids)
    machine.connect(is_up=False)
    machine.kill()


def cut_network(pids: list[int]) -> None:
    """Set a machine's link down for `CUT_S`."""
    machine = worker_machine(pids)
    machine.connect(is_up=False)
    time.sleep(CUT_S)
    machine.connect(is_up=True)


def slow_link(pids: list[int]) -> None:
    """Limit a machine's link to `SLOW_MBIT` for `SLOW_S`."""
    machine = worker_machine(pids)
    machine.limit(SLOW_MBIT)
    time.sleep(SLOW_S)
    machine.limit(None)


def kill_worker(pids: list[int]) -> None:
    """Kill a worker on a machine other than the first."""
    os.kill(next(pid for pid in pids if pid in worker_machine(pids).pids()), signal.SIGKILL)


@dataclass(frozen=True)
class Case:
    """A fault and the overrides of its run."""

    title: str
    strike: Callable[[list[int]], None] = do_nothing
    overrides: tuple[str, ...] = ("scaling.num_workers=2",)
    is_skewed: bool = False  # see `ray_cluster`


UNDISTURBED = "undisturbed"
CASES = {
    UNDISTURBED: Case("undisturbed"),
    "kill": Case("a node loses its power", kill_node),
    "elastic": Case("the same, with 2 to 3 workers", kill_node, ("scaling.num_workers=[2,3]",)),
    "cut": Case(f"a node's network is cut for {CUT_S} s", cut_network),
    "slow": Case(f"a node's link has {SLOW_MBIT} Mbit/s for {SLOW_S} s", slow_link),
    "skew": Case("two nodes' clocks are 1 h ahead, and behind; a worker there dies", kill_worker, is_skewed=True),
}
STORAGES = ("directory", "s3")


def compare(run: Run, clean: Run, environment: dict[str, str]) -> str:
    """Compare the last checkpoint bitwise, or the batches if the number of workers changed; return the verdict."""
    if run.state.get("status") != "finished":
        return "not finished"
    if len(set(run.state["world_sizes"])) > 1:
        return "same batches" if batches(run) == batches(clean) else "OTHER BATCHES"
    words = [sys.executable, "-m", "ftexp.checkpoints", clean.uri, "--diff", clean.state["checkpoint"], run.uri]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    return "yes" if done.returncode == 0 else f"NO: {done.stdout.strip() or done.stderr.strip()}"


def batches(run: Run) -> dict[int, tuple[int, ...]]:
    """Return {step: its samples over all ranks, in the last attempt that took the step}."""
    return {update.step: update.samples for update in read_updates(Storage.at(run.uri))}


def measure(case: Case, storage: str, directory: Path, environment: dict[str, str]) -> Run:
    """Run a case in a new Ray."""
    for machine in MACHINES:
        machine.connect(is_up=True)
    with ray_cluster(directory, environment, case.is_skewed):
        return train(directory, storage, environment, [*case.overrides], case.strike)


def print_table(console: Console, rows: list[tuple[str, ...]]) -> None:
    """Print the outcome of each case."""
    table = Table("case", "storage", "reported", "time lost", "steps replayed", "bitwise identical", box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def shim(directory: Path) -> Path:
    """Compile the library that skews a process's clock."""
    source, library = directory / "skew.c", directory / "skew.so"
    source.write_text(SHIM)
    call("cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")
    return library


def main() -> None:
    """Run the cases, print the output of each, and finally a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="besides the undisturbed one")
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--check", action="store_true", help="exit with 1 if a run is not as the undisturbed one")
    parser.add_argument("--json", type=Path, help="keep the numbers in this file")
    parser.add_argument("--keep", type=Path, help="keep the runs and logs in this directory")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it makes network namespaces: run it as root")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(highlight=False, width=160)
    describe_machine(console)
    rows, misses = list[tuple[str, ...]](), list[str]()
    with contextlib.ExitStack() as stack:
        stack.callback(print_table, console, rows)  # with the rows so far, also on Ctrl-C
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netns-")))
        stack.enter_context(network())
        os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "RAY_USAGE_STATS_ENABLED": "0"}
        store = stack.enter_context(object_store(directory))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        for kind in options.storage:
            clean = None
            for name in dict.fromkeys([UNDISTURBED, *options.cases]):
                storage = under(store, name) if kind == "s3" else str(directory / name)
                run = measure(CASES[name], storage, directory, environment)
                clean = clean or run
                console.print(f"{name}, {kind}:\n{run.output}", markup=False)
                same = "" if run is clean else compare(run, clean, environment)
                lost = f"{run.seconds - clean.seconds:.1f} s" if run is not clean else f"takes {run.seconds:.1f} s"
                rows.append((CASES[name].title, kind, run.reported, lost, str(run.replayed), same))
                if same not in ("", "yes", "same batches"):
                    misses.append(f"{CASES[name].title}, {kind}: {same}")
    finish(console, rows, options.json, misses, options.check)


if __name__ == "__main__":
    main()
