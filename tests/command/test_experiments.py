"""The experiment that checks whether a machine runs ftexp at all; tests/unit/test_experiments.py has all of them."""


def test_the_smoke_experiment_runs_and_the_same_command_prints_it_again(ftexp, run_folder):
    words = ["experiment=smoke", "run.name=smoke", "report.enabled=true"]
    command, run = ftexp(*words), run_folder("smoke")
    assert command.wait() == 0, command.output
    assert (run.record["status"], run.record["world_sizes"]) == ("finished", [2])
    assert (run.path / "report.html").exists()

    before = (run.path / "run.json").stat().st_mtime_ns
    again = ftexp(*words)
    assert again.wait() == 0
    assert "test accuracy" in again.output
    assert (run.path / "run.json").stat().st_mtime_ns == before

    changed = ftexp(*words, "optim.lr=0.5")
    assert changed.wait() == 2
    assert "optim.lr was 0.002, and is 0.5 now" in changed.output
