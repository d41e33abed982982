"""A worker that is killed in a step is replaced, without a restart of the others."""

import pytest

from ftexp.drill.report import compare
from ftexp.wire.messages import REPLACED
from tests.support.command import DEADLINE_S
from tests.support.processes import descendants_with
from tests.support.reference import BATCH, OPTIONS

SAVED_BY = 43  # the first epoch's checkpoint is written by this step; during a write, a kill restarts all workers
PLUGIN = f"""
import os, signal
from pathlib import Path

from ftexp.worker import step
from tests.support.processes import wait_until

whole = step._forward_backward

def deadly(job, micro):
    here = Path(__file__)
    if job.progress.step == {SAVED_BY}:
        wait_until(lambda: list(here.parent.rglob("step_*.a1")))
    mark = here.with_name(f"die{{job.progress.step}}")
    if mark.exists():
        there = here.with_name(f"there{{job.progress.step}}")
        if job.group.rank == 0:
            there.touch()
        if job.group.rank == 1:
            wait_until(there.exists)  # until then rank 0 may be between two steps
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    return whole(job, micro)

step._forward_backward = deadly
"""
KILLED_AFTER = (0, 20, 21, 45)  # steps: the first, two in a row, and one in the second epoch


@pytest.mark.timeout(3 * DEADLINE_S)
def test_a_worker_that_is_killed_is_replaced_alone_and_changes_nothing(
    ftexp, run_folder, tmp_path, clean_run, pictures
):
    (tmp_path / "deadly.py").write_text(PLUGIN)
    for step in KILLED_AFTER:
        (tmp_path / f"die{step}").touch()
    words = [*OPTIONS[1:], "plugins=[obedient,deadly]", "failure.recovery=replace", "failure.max_failures=-1"]
    command = ftexp(*words, *pictures, "data.feed=streaming", "run.name=replaced")
    assert command.wait() == 0, command.output
    run = run_folder("replaced")
    assert compare(clean_run.storage, run.storage, BATCH, 0).differences == []
    failures = run.record["failures"]
    assert [(each["rank"], each["cause"], each["step"]) for each in failures] == [
        (1, "crash", step) for step in KILLED_AFTER
    ]
    assert {(each["recovery"], each["steps_replayed"]) for each in failures} == {(REPLACED, 0)}
    assert run.record["attempts"] == 1
    first, *later = [event["pids"] for event in run.events("ready")]
    assert {pids[0] for pids in later} == {first[0]}
    assert [pids[1] for pids in later] == [event["pid"] for event in run.events("worker_replaced")]
    assert len({first[1], *(pids[1] for pids in later)}) == 1 + len(KILLED_AFTER)
    assert "rank 1 replaced, replaying 0 steps" in command.output
    assert not descendants_with(str(run.path))
