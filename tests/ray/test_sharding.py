"""A sharded model over several processes: the numbers of a whole one, and the same bits after a restart."""

import os
import subprocess
import sys
from pathlib import Path


def test_sharded_ranks_train_as_whole_ones_and_resume_to_the_same_bits(tmp_path):
    command = [sys.executable, "-m", "tests.support.sharded_ranks", "3", "4"]
    environment = {**os.environ, "MEETING": str(tmp_path / "meeting"), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=200)
    assert done.stdout == "3 ranks agree\n4 ranks agree\n", done.stderr
