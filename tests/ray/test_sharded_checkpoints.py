"""Sharded checkpoints between processes: 2 save, 4 and 1 resume, HSDP, damage, and writers that fail or die."""

import subprocess
import sys

from tests.support.command import DEADLINE_S


def run(where):
    command = [sys.executable, "-m", "tests.support.saving_ranks", where]
    found = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    assert found.stdout == "as it was saved\n"


def test_processes_of_any_number_resume_bitwise_what_others_saved_in_shards(tmp_path):
    run(str(tmp_path))


def test_shards_on_s3_are_written_by_each_process_and_read_in_slices(s3):
    run(s3.uri)
