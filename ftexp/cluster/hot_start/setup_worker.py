"""Replacement of Ray's setup_worker.py, on a Ray that ftexp starts.

Ray's script imports all of ray, half a CPU-second for each worker, to read one JSON object and become a shell. This
one does the same for a worker whose runtime env has only variables and an interpreter. If the interpreter is ftexp's
launcher, it runs the launcher directly. For every other worker, it runs Ray's script.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys

import launcher  # type: ignore[import-not-found]  # next to this file, which is run by path

TYPE_CHECKING = False  # typing takes longer to import than all the rest
if TYPE_CHECKING:
    from typing import Any

_RAYS_OWN = "ray._private.workers.setup_worker"
_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context", "--language"


def main() -> None:
    """Become the worker's interpreter."""
    context, language, worker = read(sys.argv[1:])
    if not is_plain(context, language):
        os.execv(sys.executable, [sys.executable, "-m", _RAYS_OWN, *sys.argv[1:]])
    set_variables(context.get("env_vars") or {})
    executable = str(context.get("py_executable") or shlex.quote(sys.executable))
    words = shlex.split(executable)
    if launcher.__file__ in words:
        sys.argv = words[words.index(launcher.__file__) :] + worker
        launcher.main()
    os.execvp("bash", ["bash", "-c", f"exec {executable} {shlex.join(worker)}"])


def read(arguments: list[str]) -> tuple[dict[str, Any], str, list[str]]:
    """Return the runtime env's context, the worker's language, and the arguments for the worker itself."""
    found, worker, words = {}, [], iter(arguments)
    for word in words:
        name, is_joined, value = word.partition("=")
        if name in (_CONTEXT, _LANGUAGE):
            found[name] = value if is_joined else next(words)
        else:
            worker.append(word)
    return json.loads(found.get(_CONTEXT, "{}")), found.get(_LANGUAGE, ""), worker


def is_plain(context: dict[str, Any], language: str) -> bool:
    """Return whether the worker is a Python worker that needs only variables and the name of its interpreter."""
    return language == "PYTHON" and {name for name, value in context.items() if value} <= {"py_executable", "env_vars"}


def set_variables(values: dict[str, str]) -> None:
    """Set environment variables; ${X} in a value is replaced by X's current value, or by nothing if X is unset."""
    for name, value in values.items():
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))


if __name__ == "__main__":
    main()
