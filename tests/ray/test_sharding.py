"""Sharded training between processes: DDP's losses, HSDP, and every bit again after a resume."""

import os
import subprocess
import sys

from tests.support.command import DEADLINE_S


def test_ranks_train_under_fsdp_and_hsdp_as_under_ddp_and_resume_to_the_same_bits(tmp_path):
    command = [sys.executable, "-m", "tests.support.sharded_ranks", "3", "4"]
    environment = {**os.environ, "MEETING": str(tmp_path / "meeting")}
    found = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, env=environment)
    assert found.returncode == 0, found.stderr[-4000:]
    assert found.stdout == "".join(f"{world} ranks agree\n" for world in (3, 4))
