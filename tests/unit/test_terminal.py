"""The terminal output."""

import io

import pytest
from rich.console import Console

from ftexp.data.info import BadSample, DataInfo, Excluded
from ftexp.driver.session import _weights
from ftexp.driver.terminal import Terminal
from ftexp.rundir.state import Failure, RunState
from ftexp.storage.directory import Storage
from tests.support.configs import composed

INFO = DataInfo(
    ["0", "1"], 8, 1, [0.5], [0.5], {"train": 1258, "val": 179, "test": 360}, [BadSample("a.png", "torn")],
    excluded=[Excluded("no image extension", 3, "a/Thumbs.db")],
)  # fmt: skip


def state(**values):
    fields = {"name": "demo", "attempts": 1, "step": 40, "epoch": 1, "checkpoint": "step_00000040.a1", "seconds": 12.34}
    made = RunState(**{**fields, **values})
    made.model["num_parameters"] = 797322
    return made


def failure(**values):
    fields = {"attempt": 1, "cause": "crash", "rank": 1, "step": 57, "error": "the process died"}
    return Failure(**{**fields, **values})


def show(act, terminal=False):
    output = io.StringIO()
    act(Terminal(Console(file=output, width=100, force_terminal=terminal, highlight=False, color_system=None)))
    return output.getvalue()


def test_the_header_names_run_model_data_feed_and_workers():
    words = ("demo", "/runs/demo", "vit_tiny", INFO, "digits", "2 × (1 CPU)", "cached: it fits", "1,258 samples, once")
    text = show(lambda t: t.header(*words))
    for part in ("demo  (/runs/demo)", "vit_tiny", "1,258 train · 179 val · 360 test", "2 classes", "2 × (1 CPU)"):
        assert part in text
    assert "feed     cached: it fits\nepoch    1,258 samples, once\n" in text
    assert "weights" not in text
    assert "1 sample that can't be read (the first: a.png: torn)" in text
    assert "excluded 3 entries: no image extension (such as a/Thumbs.db)" in text


def test_the_header_of_pretrained_weights_says_how_their_images_are_prepared():
    config = composed("model=vit", "model.pretrained=w.pt", "data.crop_pct=0.9")
    words = _weights(config)
    assert words == "w.pt · mean [0.3053] · std [0.376] · interpolation bicubic · crop_pct 0.9 · crop_mode center"
    text = show(lambda t: t.header("demo", "/runs/demo", "vit_tiny", INFO, "digits", "2", "cached", "each once", words))
    assert f"weights  {words}" in text
    assert _weights(composed("model=vit")) is None


def test_a_failure_is_one_line_with_cause_place_and_decision():
    decision = "failure 1 of 3 allowed: restarting the workers"
    text = show(lambda t: t.failure(failure(decision=decision)))
    assert text.count("\n") == 1
    assert f"✗ rank 1 failed after step 57 [crash]: the process died; {decision}" in text
    assert "✗ a worker failed" in show(lambda t: t.failure(failure(rank=None)))


def test_a_recovery_says_what_it_cost():
    done = failure(seconds_to_detect=0.2, seconds_to_restart=8.0, seconds_to_restore=1.1, steps_replayed=17)
    text = show(lambda t: t.recovered(done, "step_00000040.a1", 1, [7, 8]))
    assert "training again after 9.3 s: restored step_00000040.a1 (1 rejected), replaying 17 steps" in text
    assert "pids 7, 8" in text
    assert "from the beginning" in show(lambda t: t.recovered(done, None, 0, []))
    kept = failure(recovery="memory", steps_replayed=2)
    assert "s: restored step_7.a1 from memory, replaying 2" in show(lambda t: t.recovered(kept, "step_7.a1", 0, []))
    kept = failure(recovery="replaced", steps_replayed=0)
    assert "s: rank 1 replaced, replaying 0 steps" in show(lambda t: t.recovered(kept, None, 0, []))


def test_without_a_terminal_each_epoch_is_a_plain_line():
    metrics = {"last": {"train_loss": 0.5, "val_accuracy": 0.9}, "best": {}}

    def act(terminal):
        terminal.ready(state(step=0), 100, 32, 3, [1, 2], "cpu")
        terminal.step(state(step=20))
        terminal.epoch(state(metrics=metrics), 40, 1)

    text = show(act)
    assert "797,322 parameters on cpu · 100 steps · pids 1, 2" in text
    assert "epoch 1/3 step 40 loss 0.500 val_acc 0.900" in text
    assert "\x1b" not in text
    assert text.count("\n") == 2


def test_with_a_terminal_there_is_a_bar_that_goes_away():
    def act(terminal):
        terminal.ready(state(step=0), 100, 32, 3, [1], "cpu")
        terminal.step(state(step=50))
        assert terminal._bar.tasks[0].completed == 50
        terminal.say("a line above the bar")
        terminal.close()
        assert terminal._bar is None

    text = show(act, terminal=True)
    assert "a line above the bar" in text
    assert "epoch" in text


def test_the_summary_tells_result_cost_and_place():
    metrics = {
        "last": {"test_accuracy": 0.98125, "test_loss": 0.1},
        "best": {"val_accuracy": 0.99, "step": 9, "epoch": 7},
    }
    done = state(status="finished", metrics=metrics, failures=[failure()])
    text = show(lambda t: t.summary(done, Storage("/runs/demo")))
    for part in ("finished", "0.9812", "val_accuracy 0.9900 at epoch 7", "1 survived", "12.3 s"):
        assert part in text
    assert "/runs/demo/checkpoints/step_00000040.a1" in text
    assert "run.name=" not in text


def test_the_summary_shows_other_metrics_and_why_a_run_stopped_early():
    last = {"test_accuracy": 0.5, "test_loss_ema": 0.1, "val_auroc": 0.7, "test_auroc": 0.75, "test_auroc_ema": 0.8}
    stopped = {"step": 1200, "epoch": 3, "reason": "val_loss has not improved", "rules": {}}
    done = state(status="finished", metrics={"last": last, "best": {}}, stopped=stopped)
    text = show(lambda t: t.summary(done, Storage("/runs/demo")))
    assert "\nstopped early  at step 1,200, epoch 3: val_loss has not improved\n" in text
    assert "\ntest auroc     0.7500\ntest auroc ema 0.8000\n" in text
    assert "0.7000" not in text


def test_the_summary_accounts_for_each_of_the_last_failures():
    costs = {"seconds_to_detect": 0.25, "seconds_to_restart": 8.0, "seconds_to_restore": 1.0, "steps_replayed": 17}
    costs |= {"seconds_to_new_step": 0.5, "recovery": "memory"}
    failures = [failure(step=step, **costs) for step in range(1, 12)] + [failure(cause="hang", rank=None)]
    text = show(lambda t: t.summary(state(status="finished", failures=failures, goodput=0.876), Storage("/runs/demo")))
    assert "12.3 s, 88% of it on steps that were kept" in text
    assert "12 survived" in text
    times = "0.2 s to detect, 8.0 s to restart, 1.0 s to restore, 0.5 s to a new step"
    cost = f"restored from memory, {times}, 17 steps replayed"
    shown = [line.strip() for line in text.splitlines() if " at step " in line]
    assert shown == [f"crash of rank 1 at step {step}: {cost}" for step in range(3, 12)] + [
        "hang of a worker at step 57:"  # its cost is unknown
    ]


def test_a_run_that_did_not_finish_says_how_to_go_on():
    text = show(
        lambda t: t.summary(state(status="failed", error="rank 1: gone", failures=[failure()]), Storage("/runs/demo"))
    )
    assert "status         failed: rank 1: gone\n" in text
    assert text.count("Fix the cause. To resume from the last checkpoint, run the same command with run.name=demo") == 1
    text = show(lambda t: t.summary(state(status="failed", error="x", checkpoint=None), Storage("/runs/demo")))
    assert "Fix the cause. To start again (there is no checkpoint), run the same command with run.name=demo" in text
    text = show(lambda t: t.summary(state(status="interrupted"), Storage("/runs/demo")))
    assert "\nTo resume from the last checkpoint, run the same command with run.name=demo" in text
    assert "0 survived" in text
    assert "the same command with run.name=demo" in text


def test_the_summary_does_not_repeat_the_error_of_a_failure_that_was_printed():
    ended = state(status="failed", error="rank 1: the process died; stopping", failures=[failure()])
    assert "\nstatus         failed\n" in show(lambda t: t.summary(ended, Storage("/runs/demo")))


class Unwritable(io.StringIO):
    """A stream whose encoding lacks symbols, or whose terminal is gone."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def isatty(self):
        return True

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), UnicodeEncodeError("ascii", "x", 0, 1, "no"), ValueError("closed file")]
)
def test_what_can_not_be_shown_ends_nothing(error):
    terminal = Terminal(Console(file=Unwritable(error), force_terminal=True))
    for _ in range(2):
        terminal.ready(state(), 100, 32, 3, [1, 2], "cpu")
        terminal.step(state())
        terminal.epoch(state(), 40, 1)
        terminal.say("⚡")
        terminal.close()


def test_a_terminal_gets_lines_broken_between_words_and_paths_whole():
    path = "/runs/" + "a" * 120
    text = show(lambda t: t.say(f"report   {path} and words " + "of a line " * 12), terminal=True)
    first, second, *rest = text.splitlines()
    assert (first, second) == ("report", f"         {path}")
    assert all(line.startswith(" " * 9) and len(line) <= 100 for line in rest)
    assert text.split() == ["report", path, "and", "words", *["of", "a", "line"] * 12]


def test_without_a_terminal_a_line_stays_a_line():
    assert len(show(lambda t: t.say("words " * 60)).splitlines()) == 1


def test_a_finished_run_says_that_there_is_nothing_to_train():
    text = show(lambda t: t.finished_before("demo", "/runs/demo"))
    assert (
        text == "run      demo  (/runs/demo)\nstatus   finished before: nothing to train; train.epochs=... trains on\n"
    )


@pytest.mark.parametrize(("steps", "words"), [(1, "replaying 1 step ·"), (2, "replaying 2 steps ·")])
def test_a_single_step_is_counted_as_one(steps, words):
    assert words in show(lambda t: t.recovered(failure(steps_replayed=steps), "step_1.a1", 0, [1, 2]))


@pytest.mark.parametrize(
    ("width", "shown", "hidden"),
    [
        (130, ("loss 0.217 acc 0.941 val_loss 0.112 val_acc 0.966",), ()),
        (80, ("loss 0.217 val_acc 0.966",), ("acc 0.941", "val_loss")),
    ],
)
def test_the_bar_shows_epoch_and_step_whole_and_the_values_that_fit(width, shown, hidden):
    output = io.StringIO()
    terminal = Terminal(Console(file=output, width=width, force_terminal=True, highlight=False, color_system=None))
    metrics = {"train_loss": 0.217, "train_accuracy": 0.941, "val_loss": 0.112, "val_accuracy": 0.966}
    current = state(step=552, epoch=14)
    current.metrics["last"] = metrics
    terminal.ready(current, 1180, 32, 30, [1, 2], "cpu")
    terminal.close()
    *_, bar = [line for line in output.getvalue().splitlines() if "step 552/1,180" in line]  # erased at the end
    assert all(part in bar for part in ("epoch 15/30 ", " left", *shown))
    assert not any(part in bar for part in hidden)
