"""The experiment that tells whether a machine runs ftexp at all; tests/unit/test_experiments.py has all of them."""

from tests.support.command import Command, RunFolder


def test_the_smoke_experiment_runs_and_the_same_command_prints_it_again(tmp_path, preloaded):
    words = ["experiment=smoke", f"run.storage={tmp_path}", "run.name=smoke"]
    command, run = Command("train", words, tmp_path, preloaded), RunFolder(tmp_path / "smoke")
    assert command.wait() == 0, command.output
    assert (run.record["status"], run.record["world_sizes"]) == ("finished", [2])
    assert (run.path / "report.html").exists()

    before = (run.path / "run.json").stat().st_mtime_ns
    again = Command("train", words, tmp_path, preloaded)
    assert again.wait() == 0
    assert "test accuracy" in again.output
    assert (run.path / "run.json").stat().st_mtime_ns == before

    changed = Command("train", [*words, "optim.lr=0.5"], tmp_path, preloaded)
    assert changed.wait() == 2
    assert "optim.lr was 0.002, and is 0.5 now" in changed.output
