"""A sweep's report: what it says agrees with the trials, and whatever is in them is only text."""

import dataclasses
import json

import pytest
from PIL import Image

from ftexp.report.drawing import Line
from ftexp.report.sweep_charts import TrialLine, curves_chart, parallel_chart
from ftexp.report.sweep_page import SweepReport
from ftexp.report.write import write_report
from ftexp.rundir.record import FAILED, FINISHED, INTERRUPTED, RUN_FILE, RunState
from ftexp.rundir.sweep_record import Ledger, Trial
from ftexp.storage.directory import Storage
from tests.support.pages import HOSTILE, Page, assert_only_text


@pytest.fixture
def folder(tmp_path):
    return Storage.at(str(tmp_path / "lr"))


def write_sweep(folder, *trials, name="lr", keys=("optim.lr", "optim.name")):
    """`trials`: (name, values, status, the metric at each epoch, error)."""
    ledger = Ledger(name=name, metric="val_accuracy", mode="max", keys=list(keys), started=1_700_000_000.0)
    for own, values, status, scores, error in trials:
        ledger.trials.append(Trial(name=own, values=values, epochs=3, status=status, error=error))
        state = RunState(name=own, status=status, epoch=len(scores), seconds=12.5)
        state.metrics["last"] = {"val_accuracy": scores[-1], "val_loss": 0.5} if scores else {}
        points = [{"split": "val", "step": 9 * n, "epoch": n, "time": n, "val_accuracy": score}
                  for n, score in enumerate(scores, start=1)]  # fmt: skip
        trial = folder.local_path / own
        trial.mkdir(parents=True)
        (trial / RUN_FILE).write_text(json.dumps(dataclasses.asdict(state)))
        (trial / "metrics.jsonl").write_text("".join(f"{json.dumps(point)}\n" for point in points))
    ledger.write(folder)


def four_trials(folder):
    write_sweep(
        folder,
        ("a", {"optim.lr": "0.1", "optim.name": "sgd"}, FINISHED, [0.2, 0.4, 0.5], None),
        ("b", {"optim.lr": "0.001", "optim.name": "adamw"}, FINISHED, [0.5, 0.8, 0.9], None),
        ("c", {"optim.lr": "0.01", "optim.name": "sgd"}, INTERRUPTED, [0.3], None),
        ("d", {"optim.lr": "1", "optim.name": "sgd"}, FAILED, [], "NonFiniteError: the loss is NaN"),
    )
    folder.child("b").write_bytes("report.html", b"its own")


def test_the_page_shows_the_leaderboard_and_what_failed_and_loads_nothing(folder):
    four_trials(folder)
    assert write_report(folder) == f"{folder.uri}/report.html"
    page = Page(folder.read_bytes("report.html").decode())
    for part in ("2 of 4 finished", "best val_accuracy 0.9000", "optim.lr=0.001, optim.name=adamw", "1 interrupted",
                 "NonFiniteError: the loss is NaN", "1 0.9000 0.001 adamw 0.5000 3/3 12.5 s 0 finished b",
                 "2 0.5000 0.1 sgd 0.5000", "Parallel coordinates", "val_accuracy by epoch."):  # fmt: skip
        assert part in page.text, part
    assert page.text.index("0.9000 0.001") < page.text.index("0.5000 0.1") < page.text.index("NonFiniteError")
    assert not page.tags["script"] + page.tags["link"]
    assert [value for _, name, value in page.attributes if name in ("src", "href")] == ["b/report.html"]
    for chart in ("trials", "curves"):
        with Image.open(f"{folder.uri}/charts/{chart}.png") as picture:
            assert picture.width > 400


def test_whatever_comes_from_a_sweep_is_only_text(tmp_path):
    pages = []
    for kind, texts in (("calm", ["x" * len(text) for text in HOSTILE]), ("wild", HOSTILE)):
        folder = Storage.at(str(tmp_path / kind))
        trials = [(f"trial_{n}", dict.fromkeys(texts, text), (FINISHED, FAILED)[n % 2], [0.1 * n], text)
                  for n, text in enumerate(texts)]  # fmt: skip
        write_sweep(folder, *trials, name=texts[0], keys=texts)
        ledger = json.loads(folder.read_bytes("sweep.json"))
        ledger["metric"] = "val_accuracy"
        folder.write_bytes("sweep.json", json.dumps(ledger).encode())
        pages.append(Page(SweepReport(folder, "report.html").html()))
    calm, page = pages
    assert_only_text(page, calm, at_least=3)


def lines(*scores, **values):
    return [
        TrialLine(f"t{n}", {key: row[n] for key, row in values.items()}, score, score is not None, n)
        for n, score in enumerate(scores)
    ]


def drawn(drawing, trials):
    """{place: its line's points}; a trial's line is the one that tells of it."""
    told = {trial.told("acc"): trial.place for trial in trials}
    return {told[s.title]: s.points for s in drawing.shapes if isinstance(s, Line) and s.title in told}


@pytest.mark.parametrize("wide", [1000.0, None])
def test_a_line_goes_through_each_value_of_its_trial(wide):
    trials = lines(0.9, 0.5, 0.1, lr=["0.001", "0.01", "0.1"], name=["b", "a", "b"])
    drawing = parallel_chart(trials, ["lr", "name"], "acc", wide)

    found = drawn(drawing, trials)
    along = 1 if wide else 0  # which coordinate is the value
    sign = -1 if wide else 1  # up is more; to the right is more
    rates, names, scores = ([sign * found[n][axis][along] for n in range(3)] for axis in range(3))
    assert rates[0] < rates[1] < rates[2]
    assert rates[1] - rates[0] == pytest.approx(rates[2] - rates[1])  # they span a hundred: a logarithmic axis
    assert names[0] == names[2] != names[1]
    assert scores[0] > scores[1] > scores[2]
    assert all(0 <= x <= drawing.width and 0 <= y <= drawing.height for points in found.values() for x, y in points)


def test_the_best_is_drawn_last_and_what_has_not_finished_is_dashed():
    trials = [*lines(0.9, 0.5, lr=["1", "2"]), TrialLine("open", {"lr": "3"}, 0.7, False, 2)]
    shapes = [s for s in parallel_chart(trials, ["lr"], "acc", 1000.0).shapes if isinstance(s, Line) and s.title]

    assert [shape.role for shape in shapes] == ["faint", "train", "val"]
    assert [shape.dashed for shape in shapes] == [True, False, False]


def test_one_trial_or_one_value_is_a_chart_too():
    trials = lines(0.5, lr=["0.1"])
    assert drawn(parallel_chart(trials, ["lr"], "acc", 1000.0), trials)
    assert curves_chart("acc", [(trials[0], [(1.0, 0.5)])], None).shapes
    assert curves_chart("acc", [(trials[0], [(1.0, float("nan"))])], 1000.0).shapes


def test_a_sweep_of_2_000_trials_gives_a_small_page(folder):
    trials = [(f"t{n}", {"optim.lr": f"{10 ** (-n / 500):.3g}", "optim.name": f"opt{n % 40}"}, FINISHED,
               [0.1, 0.2, n / 2000], None) for n in range(2000)]  # fmt: skip
    write_sweep(folder, *trials)
    page = SweepReport(folder, "report.html").html()
    assert len(page) < 1_500_000
    assert "The best 300 trials; 1,700 more are in the table." in page


def test_a_sweep_of_which_nothing_has_begun_gives_a_page_too(folder):
    Ledger(name="new", metric="val_accuracy", mode="max", keys=["seed"]).write(folder)
    assert "0 of 0 finished" in SweepReport(folder, "report.html").html()
