"""The command in a process: its exit code, and streams that accept little."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import process


def test_the_command_itself_exits_with_2_and_tells_why(tmp_path):
    done = process("-m", "ftexp.train", "scaling=single_gpu", "train.epochs=0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "ftexp: the config is invalid:",
        "  train.epochs=0 is out of range: it must be at least 1",
        "  scaling.use_gpu=true, but this machine has no GPU: set scaling=local or scaling.use_gpu=false",
    ]


COMMANDS = ["train", "evaluate", "predict", "export", "drill", "checkpoints", "sweeps", "data", "report"]


@pytest.mark.parametrize("module", COMMANDS)
def test_no_command_minds_what_its_streams_can_not_take(module, tmp_path):
    wrong = {"train": "seed=é⚡", "data": "seed=é⚡", "drill": "seed=é⚡", "export": "run=é⚡ format=onnx"}.get(
        module, "run=é⚡"
    )
    wrong = "é⚡" if module in ("checkpoints", "sweeps", "report") else wrong
    command = f"{shlex.quote(sys.executable)} -m ftexp.{module} {' '.join(map(shlex.quote, wrong.split()))}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for streams in ("", ">&-", ">&- 2>&- <&-"):
        shell = ["sh", "-c", f"{command} {streams}"]
        done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=120)
        assert done.returncode == 2, done.stderr
        assert b"Traceback" not in done.stdout + done.stderr
        assert ("2>" in streams) or b"??" in done.stderr, "the message, with what ASCII lacks replaced"


@pytest.mark.parametrize("form", [["-m", "ftexp"], [str(Path(sys.executable).with_name("ftexp"))]])
def test_both_forms_run_a_command_from_the_directory_that_the_user_is_in(form, tmp_path):
    (tmp_path / "mine.py").write_text("print('imported')")
    words = ["evaluate", "nowhere", "split=tset"]
    done = subprocess.run([sys.executable, *form, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "split='tset' is not one of" in done.stderr
