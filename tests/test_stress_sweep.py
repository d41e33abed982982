"""scripts/stress_sweep.py with a few trials: on a cluster that was joined, by fractions of a CPU."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "stress_sweep.py"
NUM_TRIALS = 2


def test_trials_share_the_cpus_of_a_cluster_and_leave_nothing_behind(tmp_path):
    words = ["--trials", str(NUM_TRIALS), "--at-once", str(NUM_TRIALS), "--check", "--json", str(tmp_path / "found")]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert found["finished"] == found["most at once"] == NUM_TRIALS
