"""The experiment that tells whether a machine runs ftexp at all; tests/unit/test_experiments.py has all of them."""

from tests.support.command import Command, RunFolder


def test_the_smoke_experiment_runs(tmp_path):
    command = Command("train", ["experiment=smoke", f"run.storage={tmp_path}", "run.name=smoke"], tmp_path)
    assert command.wait() == 0, command.output
    record = RunFolder(tmp_path / "smoke").record
    assert (record["status"], record["world_sizes"]) == ("finished", [2])
    assert (tmp_path / "smoke" / "report.html").exists()
