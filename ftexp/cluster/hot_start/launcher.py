"""A worker's interpreter, as Ray sees it: requests a fork from the preloaded process, and is the fork's proxy.

Run by path, as `python -S -E launcher.py <where> <script> <arguments>`, so it imports only the standard library, and
as little of it as possible. <where> is the socket of a preloaded process, or `node:<prefix>`: then each raylet has a
preloaded process, which the first launcher starts.

It forwards signals and ends as the child ends. When it is killed, the child notices the closed connection and ends too.
If anything fails before there is a child, it becomes the plain interpreter.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import stat
import sys

TYPE_CHECKING = False  # typing takes longer to import than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NODE = "node:"
LOCK = "lock"  # next to the socket
_ANSWER_TIMEOUT_S = 45.0  # the preloaded process may still be importing; raylet gives a worker 60 s to report
_PASSED_ON = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def main() -> None:
    """Become a proxy of a forked worker, or the plain interpreter."""
    where, arguments = sys.argv[1], sys.argv[2:]
    try:
        path = on_this_node(where[len(NODE) :]) if where.startswith(NODE) else where
        connection, child = ask_for_a_fork(path, arguments)
    except (OSError, ValueError, KeyError):
        os.execv(sys.executable, [sys.executable, *arguments])
    end_like(wait_for(connection, child))


def ask_for_a_fork(path: str, arguments: list[str]) -> tuple[socket.socket, int]:
    """Return (connection, pid of the child); OSError or ValueError if no child can be forked."""
    if arguments[0].startswith("-"):
        raise ValueError("an option of the interpreter, which has started already")
    _require_own(path, stat.S_ISSOCK)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_ANSWER_TIMEOUT_S)
    connection.connect(path)
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "umask": _umask(),
        "oom_score_adj": _oom_score_adj(),
    }
    send(connection, json.dumps(request).encode(), [0, 1, 2])
    answer = connection.recv(8)
    if len(answer) != 8:
        raise ValueError("refused")
    connection.settimeout(None)
    return connection, int.from_bytes(answer, "big")


def send(channel: socket.socket, message: bytes, descriptors: list[int]) -> None:
    """Send a message and open files; the message's length is sent first."""
    socket.send_fds(channel, [len(message).to_bytes(8, "big")], descriptors)
    channel.sendall(message)


def on_this_node(prefix: str) -> str:
    """Return the socket of the preloaded process of this worker's raylet; start the process if there is none.

    KeyError, OSError or ValueError if that fails.
    """
    raylet = os.environ["RAY_RAYLET_PID"]
    directory = f"{prefix}-{raylet}"
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        _require_own(directory, stat.S_ISDIR)
    path = f"{directory}/socket"
    lock = os.open(f"{directory}/{LOCK}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # workers start several at a time
    try:
        if not _answers(path):
            _start(path, raylet)
    finally:
        os.close(lock)
    return path


def listen(path: str) -> socket.socket:
    """Return a listening socket at `path`, for this user only; replaces an old one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # 0600 from the start
    listener.bind(path)
    os.umask(before)
    listener.listen(128)
    return listener


def _answers(path: str) -> bool:
    """Return whether a process listens; it takes this empty connection for a launcher that hung up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(path)
        except OSError:
            return False
    return True


def _start(path: str, raylet: str) -> None:
    """Start the preloaded process of a raylet, detached: it must not end with this worker."""
    listener = listen(path)
    if (pid := os.fork()) == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                silent = os.open(os.devnull, os.O_RDWR)
                for descriptor in (0, 1, 2):
                    os.dup2(silent, descriptor)
                os.set_inheritable(listener.fileno(), True)
                command = [
                    sys.executable,
                    "-m",
                    "ftexp.cluster.hot_start.preloader",
                    path,
                    str(listener.fileno()),
                    raylet,
                ]
                os.execv(sys.executable, command)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    listener.close()


def readable(descriptors: Iterable[int], timeout_s: float | None = None) -> list[int]:
    """Wait until some of these can be read or have closed, and return them; none once `timeout_s` has passed.

    Uses poll: select.select refuses descriptors above 1,023, which a process with many open files has.
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(None if timeout_s is None else 1000 * timeout_s)]


def wait_for(connection: socket.socket, child: int) -> int:
    """Return the child's wait status; exit code 1 if the preloaded process died."""
    for number in _PASSED_ON:
        signal.signal(number, lambda received, _: _pass_on(child, received))
    try:
        alive = os.pidfd_open(child)
    except OSError:  # it has already ended, or the kernel has no pidfd: the connection shows the end
        alive = -1
    answer = b""
    while len(answer) < 8:
        ready = readable([connection.fileno()] + ([alive] if alive >= 0 else []))
        if connection.fileno() in ready:
            received = connection.recv(8 - len(answer))
            answer += received
            if not received:  # the preloaded process is gone; the child continues without it
                if alive >= 0:
                    readable([alive])
                return 1 << 8
        elif alive in ready:  # dead, and its status is on the way
            alive = -1
    return int.from_bytes(answer, "big")


def end_like(status: int) -> None:
    """End this process in the way the child ended: by the same signal or exit code."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def _require_own(path: str, is_kind: Callable[[int], bool]) -> None:
    """Raise ValueError unless `path` is of this kind, and only this user has access to it."""
    found = os.lstat(path)
    if found.st_uid != os.getuid() or not is_kind(found.st_mode) or stat.S_IMODE(found.st_mode) & 0o077:
        raise ValueError(f"{path} isn't this user's alone")


def _pass_on(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass


def _oom_score_adj() -> str:
    """Return the value that raylet has set, so that the kernel's OOM killer takes workers first; empty if unknown."""
    try:
        with open("/proc/self/oom_score_adj", encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


if __name__ == "__main__":
    main()
