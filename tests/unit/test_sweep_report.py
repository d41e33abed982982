"""A sweep's report agrees with the trials, and escapes all text in them."""

import dataclasses
import io
import json
from itertools import groupby, pairwise

import pytest
from PIL import Image

from ftexp.report.drawing import Dot, Drawing, Label, Line
from ftexp.report.png import png
from ftexp.report.sweep_charts import TrialLine, curves_chart, parallel_chart, values_chart
from ftexp.report.sweep_page import SweepReport
from ftexp.report.write import write_report
from ftexp.rundir.names import RUN_FILE
from ftexp.rundir.state import FAILED, FINISHED, INTERRUPTED, RunState
from ftexp.rundir.sweep_record import SweepRecord, Trial
from ftexp.storage.directory import Storage
from tests.support.pages import HOSTILE, Page, assert_only_text


@pytest.fixture
def directory(tmp_path):
    return Storage.at(str(tmp_path / "lr"))


def write_sweep(directory, *trials, name="lr", keys=("optim.lr", "optim.name")):
    """Write a sweep's files; `trials`: (name, values, status, metric by epoch, error)."""
    ledger = SweepRecord(name=name, metric="val_accuracy", mode="max", keys=list(keys), started=1_700_000_000.0)
    for own, values, status, scores, error in trials:
        ledger.trials.append(Trial(name=own, values=values, epochs=3, status=status, error=error))
        state = RunState(name=own, status=status, epoch=len(scores), seconds=12.5)
        state.metrics["last"] = {"val_accuracy": scores[-1], "val_loss": 0.5} if scores else {}
        points = [{"split": "val", "step": 9 * n, "epoch": n, "time": n, "val_accuracy": score}
                  for n, score in enumerate(scores, start=1)]  # fmt: skip
        trial = directory.local_path / own
        trial.mkdir(parents=True)
        (trial / RUN_FILE).write_text(json.dumps(dataclasses.asdict(state)))
        (trial / "metrics.jsonl").write_text("".join(f"{json.dumps(point)}\n" for point in points))
    ledger.write(directory)


def four_trials(directory):
    write_sweep(
        directory,
        ("a", {"optim.lr": "0.1", "optim.name": "sgd"}, FINISHED, [0.2, 0.4, 0.5], None),
        ("b", {"optim.lr": "0.001", "optim.name": "adamw"}, FINISHED, [0.5, 0.8, 0.9], None),
        ("c", {"optim.lr": "0.01", "optim.name": "sgd"}, INTERRUPTED, [0.3], None),
        ("d", {"optim.lr": "1", "optim.name": "sgd"}, FAILED, [], "NonFiniteError: the loss is NaN"),
    )
    directory.child("b").write_bytes("report.html", b"its own")


def test_the_page_shows_the_leaderboard_and_what_failed_and_loads_nothing(directory):
    four_trials(directory)
    assert write_report(directory) == f"{directory.uri}/report.html"
    page = Page(directory.read_bytes("report.html").decode())
    for part in ("2 of 4 finished", "best val_accuracy 0.9000", "optim.lr=0.001, optim.name=adamw", "1 interrupted",
                 "NonFiniteError: the loss is NaN", "1 0.9000 0.001 adamw 0.5000 3/3 12.5 s 0 finished b",
                 "2 0.5000 0.1 sgd 0.5000", "Parallel coordinates", "val_accuracy by epoch."):  # fmt: skip
        assert part in page.text, part
    assert page.text.index("0.9000 0.001") < page.text.index("0.5000 0.1") < page.text.index("NonFiniteError")
    assert not page.tags["script"] + page.tags["link"]
    assert [value for _, name, value in page.attributes if name in ("src", "href")] == ["b/report.html"]
    for chart in ("trials", "curves"):
        with Image.open(f"{directory.uri}/charts/{chart}.png") as picture:
            assert picture.width > 400


def test_whatever_comes_from_a_sweep_is_only_text(tmp_path):
    pages = []
    for kind, texts in (("calm", ["x" * len(text) for text in HOSTILE]), ("wild", HOSTILE)):
        directory = Storage.at(str(tmp_path / kind))
        trials = [(f"trial_{n}", dict.fromkeys(texts, text), (FINISHED, FAILED)[n % 2], [0.1 * n], text)
                  for n, text in enumerate(texts)]  # fmt: skip
        write_sweep(directory, *trials, name=texts[0], keys=texts)
        ledger = json.loads(directory.read_bytes("sweep.json"))
        ledger["metric"] = "val_accuracy"
        directory.write_bytes("sweep.json", json.dumps(ledger).encode())
        pages.append(Page(SweepReport(directory, "report.html").html()))
    calm, page = pages
    assert_only_text(page, calm, at_least=3)


def lines(*scores, **values):
    return [
        TrialLine(f"t{n}", {key: row[n] for key, row in values.items()}, score, score is not None, n)
        for n, score in enumerate(scores)
    ]


def drawn(drawing, trials):
    """Return {place: points of the trial's line}; lines are identified by their tooltips."""
    told = {trial.tooltip("acc"): trial.place for trial in trials}
    return {told[s.title]: s.points for s in drawing.shapes if isinstance(s, Line) and s.title in told}


@pytest.mark.parametrize("wide", [1000.0, None])
def test_a_line_goes_through_each_value_of_its_trial(wide):
    trials = lines(0.9, 0.5, 0.1, lr=["0.001", "0.01", "0.1"], name=["b", "a", "b"])
    drawing = parallel_chart(trials, ["lr", "name"], "acc", wide)

    found = drawn(drawing, trials)
    along = 1 if wide else 0  # the coordinate of the value
    sign = -1 if wide else 1  # values increase upwards, or to the right
    rates, names, scores = ([sign * found[n][axis][along] for n in range(3)] for axis in range(3))
    assert rates[0] < rates[1] < rates[2]
    # they span a factor of 100, so the axis is logarithmic
    assert rates[1] - rates[0] == pytest.approx(rates[2] - rates[1])
    assert names[0] == names[2] != names[1]
    assert scores[0] > scores[1] > scores[2]
    assert all(0 <= x <= drawing.width and 0 <= y <= drawing.height for points in found.values() for x, y in points)


def test_the_best_is_drawn_last_and_what_has_not_finished_is_dashed():
    trials = [*lines(0.9, 0.5, lr=["1", "2"]), TrialLine("open", {"lr": "3"}, 0.7, False, 2)]
    shapes = [s for s in parallel_chart(trials, ["lr"], "acc", 1000.0).shapes if isinstance(s, Line) and s.title]

    assert [shape.role for shape in shapes] == ["faint", "train", "val"]
    assert [shape.dashed for shape in shapes] == [True, False, False]


@pytest.mark.parametrize("values", [["0.001", "0.01", "0.1"], ["a", "b", "c"]], ids=["log", "words"])
def test_a_swept_key_is_drawn_to_scale_or_with_a_place_for_each_word(values):
    trials = [*lines(0.9, 0.5, 0.1, key=values), TrialLine("open", {"key": values[0]}, 0.7, False, 3)]
    dots = {shape.role: shape for shape in values_chart(trials[:1], "key", "acc").shapes if isinstance(shape, Dot)}
    assert [*dots] == ["val"]
    last, middle, best = (shape for shape in values_chart(trials, "key", "acc").shapes if isinstance(shape, Dot))
    assert (last.role, middle.role, best.role) == ("train", "train", "val")
    assert best.x < middle.x < last.x
    assert middle.x - best.x == pytest.approx(last.x - middle.x)
    assert best.y < middle.y < last.y


@pytest.mark.parametrize("letters", [3, 14])
@pytest.mark.parametrize("number", [2, 5, 12])
def test_the_labels_of_a_swept_key_do_not_overlap_and_stay_in_the_picture(letters, number):
    words = [chr(ord("a") + n) * letters for n in range(number)]
    drawing = values_chart(lines(*([0.5] * number), key=words), "key", "acc")
    places = [(s.y, s.x - 6 * letters / 2, s.x + 6 * letters / 2) for s in drawing.shapes
              if isinstance(s, Label) and s.text in words]  # fmt: skip
    assert len(places) == number
    assert all(end <= drawing.width and y < drawing.height - 10 for y, _, end in places)
    for (y, _, end), (other_y, start, _) in pairwise(sorted(places)):
        assert y != other_y or end < start


def test_drawings_lie_side_by_side_in_one_picture_each_with_all_that_it_shows():
    red, blue = Drawing("", 100, 50), Drawing("", 60, 80)
    red.add(Dot(50, 25, 10, "fault"))
    blue.add(Line([(0, 40), (60, 40)], "train", 3, dashed=True))
    with Image.open(io.BytesIO(png(red, blue, title="both"))) as picture:
        assert picture.size == (2 * (100 + 60 + 4 * 10), 2 * (80 + 7 * 10))
        colours = picture.convert("RGB")
    assert colours.getpixel((2 * (10 + 50), 2 * (60 + 25))) == pytest.approx((0xC4, 0x30, 0x2B), abs=8)
    row = [colours.getpixel((2 * (130 + x), 2 * (60 + 40)))[0] < 128 for x in range(60)]
    assert [len([*group]) for _, group in groupby(row)][:-1] == [3] * 19


def test_the_dashes_of_a_curve_with_a_point_at_each_pixel_can_be_told_apart():
    drawing = Drawing("", 60, 80)
    drawing.add(Line([(x, 40) for x in range(61)], "train", 3, dashed=True))
    with Image.open(io.BytesIO(png(drawing))) as picture:
        colours = picture.convert("RGB")
    dark = sum(colours.getpixel((2 * (10 + x), 2 * (30 + 40)))[0] < 128 for x in range(60))
    assert dark == pytest.approx(30, abs=6)


def test_one_trial_or_one_value_is_a_chart_too():
    trials = lines(0.5, lr=["0.1"])
    assert drawn(parallel_chart(trials, ["lr"], "acc", 1000.0), trials)
    assert curves_chart("acc", [(trials[0], [(1.0, 0.5)])], None).shapes
    assert curves_chart("acc", [(trials[0], [(1.0, float("nan"))])], 1000.0).shapes


def test_a_sweep_of_2_000_trials_gives_a_small_page(directory):
    trials = [(f"t{n}", {"optim.lr": f"{10 ** (-n / 500):.3g}", "optim.name": f"opt{n % 40}"}, FINISHED,
               [0.1, 0.2, n / 2000], None) for n in range(2000)]  # fmt: skip
    write_sweep(directory, *trials)
    page = SweepReport(directory, "report.html").html()
    assert len(page) < 1_500_000
    assert "The best 300 trials; 1,700 more are in the table." in page


def test_a_sweep_of_which_nothing_has_begun_gives_a_page_too(directory):
    SweepRecord(name="new", metric="val_accuracy", mode="max", keys=["seed"]).write(directory)
    assert "0 of 0 finished" in SweepReport(directory, "report.html").html()
