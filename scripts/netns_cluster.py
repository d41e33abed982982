"""Three machines, each a network namespace, run one Ray, and one of them fails: what does a run report, lose, compute?

    sudo uv run python scripts/netns_cluster.py [--cases CASE ...] [--storage directory s3] [--json FILE] [--check]

Needs root and Linux's `ip`, `tc` and `unshare`; a skewed clock also a C compiler, `cc`. Each machine has a network, a
host name and an /etc/hosts of its own, behind one bridge; on the bridge listens moto's S3. For each case a new Ray is
started: the command runs on the first machine, and two workers on two of the three (elastic: three workers, or two).
Once it trains, the case strikes a machine that has a worker, but for the first. Afterwards the last checkpoint is
compared with that of the undisturbed run, bitwise; where the number of workers changed, the batches are. Everything
that was made is removed at the end, on Ctrl-C too. Takes 20 minutes on 2 cores.
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
STRIKE_AT = "epoch 4/"  # a line of the command's output
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
    """Run a command; returns what it printed."""
    return subprocess.run(words, check=check, capture_output=True, text=True).stdout


class Machine:
    """A network namespace with a host name, and the processes in it."""

    def __init__(self, number: int) -> None:
        self.name, self.address, self.port = f"ftexp-{number}", f"10.77.0.{number}", f"ftexp-v{number}"

    def make(self) -> None:
        """Connect it to the bridge."""
        hosts = "".join(f"{other.address} {other.name}\n" for other in MACHINES)
        etc = Path("/etc/netns", self.name)  # bound over /etc by `ip netns exec`
        etc.mkdir(parents=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        call("ip", "netns", "add", self.name)
        call("ip", "link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        call("ip", "link", "set", self.port, "master", BRIDGE, "up")
        call("ip", "-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            call("ip", "-n", self.name, "link", "set", device, "up")

    def remove(self) -> None:
        """End what runs in it, and all that `make` made."""
        self.kill()
        call("ip", "netns", "delete", self.name, check=False)
        call("ip", "link", "delete", self.port, check=False)
        shutil.rmtree(Path("/etc/netns", self.name), ignore_errors=True)

    def start(self, directory: Path, *words: str, **arguments: Any) -> subprocess.Popen[str]:
        """Start a command on it; `directory`/ray, where Ray keeps its files, is another directory on each machine."""
        own, shown = directory / self.name, directory / "ray"
        for each in (own, shown):
            each.mkdir(exist_ok=True)
        inside = ["sh", "-c", f'hostname {self.name} && mount --bind {own} {shown} && exec "$@"', "sh", *words]
        command = ["ip", "netns", "exec", self.name, "unshare", "--uts", *inside]
        arguments = {"cwd": REPOSITORY, "start_new_session": True, "text": True, **arguments}
        return subprocess.Popen(command, **arguments)

    def pids(self) -> list[int]:
        """Return the processes in it."""
        return [int(pid) for pid in call("ip", "netns", "pids", self.name, check=False).split()]

    def kill(self) -> None:
        """End its processes at once."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def connect(self, is_up: bool) -> None:
        """Plug its cable in, or pull it out: nothing arrives, and no end of a connection either."""
        call("ip", "link", "set", self.port, "up" if is_up else "down")

    def limit(self, mbit: int | None) -> None:
        """Let so much through in each direction; None: all."""
        call("tc", "qdisc", "delete", "dev", self.port, "root", check=False)
        call("ip", "netns", "exec", self.name, "tc", "qdisc", "delete", "dev", "eth0", "root", check=False)
        if mbit is not None:
            shape = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "128kb", "latency", "200ms")
            call("tc", "qdisc", "add", "dev", self.port, *shape)
            call("ip", "netns", "exec", self.name, "tc", "qdisc", "add", "dev", "eth0", *shape)


MACHINES = [Machine(number) for number in (1, 2, 3)]


@contextlib.contextmanager
def network() -> Iterator[None]:
    """The bridge and the machines."""
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
    """moto's S3 on the bridge; yields a URI."""
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
    """Ray on all machines, a CPU on each. is_skewed: clocks are wrong on all but the first."""
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
    """TimeoutError if it doesn't hold in time."""
    end = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s:.0f} s")
        time.sleep(0.2)


@dataclass
class Run:
    """A command that has ended, and its run."""

    uri: str
    status: int
    output: str

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """Return run.json."""
        state: dict[str, Any] = json.loads(Storage.at(self.uri).read_bytes(RUN_FILE))
        return state

    @property
    def seconds(self) -> float:
        """Return the time from the first batch to the end; a start takes longer or less as it likes."""
        lines = read_lines(Storage.at(self.uri), EVENTS_FILE)
        first = next(line["time"] for line in lines if line["event"] == "ready")
        return float(lines[-1]["time"] - first)

    @property
    def reported(self) -> str:
        """Return the failures with their causes, and how the command ended."""
        causes = [f"{each['cause']} of {_whom(each)}" for each in self.state.get("failures", [])]
        return f"{', '.join(causes) or 'nothing'}; {self.state.get('status')}, exit status {self.status}"

    @property
    def replayed(self) -> int:
        """Return the steps that were done again."""
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
    """Run the command on the first machine; `strike` is called with the workers' pids once it trains."""
    head, lines, pids, began = MACHINES[0], list[str](), list[int](), time.monotonic()
    is_struck = False
    words = [sys.executable, "-m", "ftexp.train", *TRAINING, f"run.storage={storage}", *overrides]
    with head.start(directory, *words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(f"{time.monotonic() - began:7.1f} {line}")
            if found := re.search(r"pids ([\d, ]+)", line):
                pids = [int(pid) for pid in found[1].split(",")]
            if line.startswith(STRIKE_AT) and not is_struck:  # the line may come again
                is_struck = True
                strike(pids)
    return Run(under(storage, "run"), process.returncode, "".join(lines))


def under(uri: str, name: str) -> str:
    """Return the place of a name in a directory, or at a URI with its query."""
    place, mark, query = uri.partition("?")
    return f"{place}/{name}{mark}{query}"


def worker_machine(pids: list[int]) -> Machine:
    """Return a machine that has a worker, other than the first."""
    return next(machine for machine in MACHINES[1:] if set(pids) & set(machine.pids()))


def do_nothing(_: list[int]) -> None:
    """Leave the run alone."""


def kill_node(pids: list[int]) -> None:
    """Cut a machine's power: nobody is sent the end of its connections."""
    machine = worker_machine(pids)
    machine.connect(is_up=False)
    machine.kill()


def cut_network(pids: list[int]) -> None:
    """Pull a machine's cable out for a while."""
    machine = worker_machine(pids)
    machine.connect(is_up=False)
    time.sleep(CUT_S)
    machine.connect(is_up=True)


def slow_link(pids: list[int]) -> None:
    """Make a machine's link slow for a while."""
    machine = worker_machine(pids)
    machine.limit(SLOW_MBIT)
    time.sleep(SLOW_S)
    machine.limit(None)


def kill_worker(pids: list[int]) -> None:
    """End a worker on a machine other than the first."""
    os.kill(next(pid for pid in pids if pid in worker_machine(pids).pids()), signal.SIGKILL)


@dataclass(frozen=True)
class Case:
    """Something that goes wrong."""

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
    """Say whether the run's last checkpoint is bitwise identical; or its batches, if the number of workers changed."""
    if run.state.get("status") != "finished":
        return "not finished"
    if len(set(run.state["world_sizes"])) > 1:
        return "same batches" if batches(run) == batches(clean) else "OTHER BATCHES"
    words = [sys.executable, "-m", "ftexp.checkpoints", clean.uri, "--diff", clean.state["checkpoint"], run.uri]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    return "yes" if done.returncode == 0 else f"NO: {done.stdout.strip() or done.stderr.strip()}"


def batches(run: Run) -> dict[int, tuple[int, ...]]:
    """Return the samples that drove each step, of the attempt that did it last, over all ranks."""
    return {update.step: update.samples for update in read_updates(Storage.at(run.uri))}


def measure(case: Case, storage: str, directory: Path, environment: dict[str, str]) -> Run:
    """Run a case in a new Ray."""
    for machine in MACHINES:
        machine.connect(is_up=True)
    with ray_cluster(directory, environment, case.is_skewed):
        return train(directory, storage, environment, [*case.overrides], case.strike)


def print_table(console: Console, rows: list[tuple[str, ...]]) -> None:
    """Print what came of each case."""
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
    """Run the cases, print a line for each, and a table last."""
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
        stack.callback(print_table, console, rows)  # what there is of it, on Ctrl-C too
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
