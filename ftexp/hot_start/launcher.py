"""Stands where Ray expects a worker's interpreter: asks the preloaded process for a fork, and is its proxy.

Run by path, as `python -S -E launcher.py <socket> <script> <arguments>`, so it may import the standard library
only, and as little of it as will do. It passes signals on, ends as the child ends, and takes the child with it
when it is killed: the child notices that the connection has closed. Whatever goes wrong before there is a child,
it becomes the plain interpreter.
"""

import json
import os
import select
import signal
import socket
import stat
import sys

_ANSWER_TIMEOUT_S = 30.0  # the preloaded process may still be importing; longer than a plain start makes no sense
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
    path, arguments = sys.argv[1], sys.argv[2:]
    try:
        connection, child = ask_for_a_fork(path, arguments)
    except (OSError, ValueError):
        os.execv(sys.executable, [sys.executable, *arguments])
    end_like(wait_for(connection, child))


def ask_for_a_fork(path: str, arguments: list[str]) -> tuple[socket.socket, int]:
    """(connection, pid of the child); OSError or ValueError if there is no child to be had."""
    if arguments[0].startswith("-"):
        raise ValueError("an option of the interpreter, which has started already")
    owner = os.lstat(path)
    if owner.st_uid != os.getuid() or not stat.S_ISSOCK(owner.st_mode) or stat.S_IMODE(owner.st_mode) & 0o077:
        raise ValueError("the socket isn't this user's alone")
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
    message = json.dumps(request).encode()
    socket.send_fds(connection, [len(message).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(message)
    answer = connection.recv(8)
    if len(answer) != 8 or not (child := int.from_bytes(answer, "big")):
        raise ValueError("refused")
    connection.settimeout(None)
    return connection, child


def wait_for(connection: socket.socket, child: int) -> int:
    """The child's wait status; that of a failure if the preloaded process died and can't tell it."""
    for number in _PASSED_ON:
        signal.signal(number, lambda received, _: _pass_on(child, received))
    try:
        alive = os.pidfd_open(child)
    except OSError:  # it has ended already, or the kernel has no pidfd: the connection tells
        alive = -1
    answer = b""
    while len(answer) < 8:
        watched = [connection.fileno()] + ([alive] if alive >= 0 else [])
        readable, _, _ = select.select(watched, [], [])
        if connection.fileno() in readable:
            received = connection.recv(8 - len(answer))
            answer += received
            if not received:  # the preloaded process is gone; the child goes on without it
                if alive >= 0:
                    select.select([alive], [], [])
                return 1 << 8
        elif alive in readable:  # dead, and its status is on the way
            alive = -1
    return int.from_bytes(answer, "big")


def end_like(status: int) -> None:
    """End this process as the child ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def _pass_on(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass


def _oom_score_adj() -> str:
    """What raylet gave this process, so that the kernel ends workers first where memory runs out; empty if unknown."""
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
