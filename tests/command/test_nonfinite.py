"""A run that rolls back to before a step with a non-finite gradient."""

import pytest

from ftexp.rundir.sample_ledger import problems, read_updates
from ftexp.storage.directory import Storage


@pytest.mark.timeout(400)
def test_a_run_that_rolled_back_and_was_killed_leaves_out_the_same_without_finding_it_out_again(ftexp, run_folder):
    # the checkpoint at step 40 is the first, so it doesn't wait for another; it is written while rank 1 hangs
    faults = "{kind: nonfinite, step: 49, rank: 1}, {kind: hang, step: 60, rank: 1, seconds: 8}, "
    faults += "{kind: kill_worker, step: 78, rank: 1}"
    command = ftexp(
        "failure.on_nonfinite=rollback", "train.max_steps=120", "train.ledger=true", "checkpoint.every_steps=40",
        "model.kwargs.depth=1", "checkpoint.every_epochs=null", "run.name=killed",
        f"chaos.faults=[{faults}]",
    )  # fmt: skip
    run = run_folder("killed")
    assert command.wait() == 0, command.output
    (event,) = run.events("rolled_back")
    assert (event["step"], event["to_step"], event["positions"]) == (50, 40, [1568, 1600])
    assert "the gradient of step 50 is not finite: back to step 40 in memory" in command.output
    # the restart resumes from the same step, and the fault doesn't occur again
    assert [event["step"] for event in run.events("restored")] == [40]
    assert [failure["cause"] for failure in run.record["failures"]] == ["crash"]
    assert run.record["skipped"] == [[1568, 1600]]
    updates = read_updates(Storage.at(str(run.path)))
    assert [(update.step, update.attempt) for update in updates if update.skipped] == [(50, 2)]
    assert list(problems(updates, run.record["data"]["num_samples"]["train"], 32)) == []
    assert len(updates) == 120
