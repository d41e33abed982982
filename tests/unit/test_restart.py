"""A command that replaces itself by a new interpreter: the same process to others, without its open resources."""

import json
import os
import subprocess
import sys

PROGRAM = """
import json, os, sys
from ftexp.driver.restart import Restart, begin_again, begun_again
from ftexp.config.schema import Config, RunConfig
from ftexp.rundir.state import Failure

restart = begun_again()
if restart is None:
    print(json.dumps([os.getpid(), os.getcwd()]))
    os.environ["SET_BY_RAY"] = "1"
    os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
    os.chdir("elsewhere")
    failure = Failure(attempt=1, cause="ray", rank=None, step=7, error="x")
    begin_again(Restart(Config(run=RunConfig(name="demo")), ["seed=1"], 3, 1.5, [failure]))
again = begun_again() is not None
left = [number for number in range(3, 50) if os.path.exists(f"/dev/fd/{number}")]
found = [restart.config.run.name, restart.overrides, restart.num_before, restart.noticed_at, sys.argv[1:]]
found.append([failure.step for failure in restart.unwritten])
print(json.dumps([os.getpid(), os.getcwd(), found, left, os.environ.get("SET_BY_RAY"), again]))
"""


def test_the_new_interpreter_is_the_same_process_where_the_old_one_was_and_finds_what_to_go_on_with(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    child = subprocess.run(
        [sys.executable, "program.py", "key=value"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (pid, directory), again = map(json.loads, child.stdout.splitlines())
    assert directory == str(tmp_path)
    expected = ["demo", ["seed=1"], 3, 1.5, ["key=value"], [7]]
    assert again == [pid, f"{tmp_path}/elsewhere", expected, [], None, False]


def test_an_order_that_another_process_was_given_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from ftexp.driver import restart

    taken = {}
    monkeypatch.setattr(os, "execve", lambda *arguments: taken.update(arguments[2]))
    monkeypatch.setattr(os, "set_inheritable", lambda *_: None)
    restart.begin_again("an order")
    monkeypatch.setenv("FTEXP_RESTART", taken["FTEXP_RESTART"])
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert restart.begun_again() is None
    assert "FTEXP_RESTART" not in os.environ
