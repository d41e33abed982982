"""For wrong overrides, help and a report, the command imports no heavy modules."""

import json
import shutil

import torch

from tests.support.command import TELL_IMPORTS, WRITE_REPORT, process


def test_a_start_from_nowhere_is_told_before_anything_is_started(tmp_path):
    done = process("-c", TELL_IMPORTS, "torch,ray,timm,torchvision", "resume_from=/nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "ftexp: resume_from=/nowhere: /nowhere holds no checkpoint that verifies: "
        "set a run directory, or a directory under its checkpoints/",
        "imported: []",
    ]
    assert list(tmp_path.iterdir()) == []


def test_weights_that_fit_nothing_are_told_before_ray_is_imported(tmp_path):
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "w.bin")
    done = process("-c", TELL_IMPORTS, "ray", "model.pretrained=w.bin", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    told, imported = done.stderr.splitlines()
    assert told.startswith("ftexp: model.pretrained=w.bin: 0 of the model's 55 tensors can be taken from its 1: none")
    assert imported == "imported: []"
    assert [path.name for path in tmp_path.iterdir()] == ["w.bin"]


def test_data_that_are_not_there_are_told_before_ray_is_imported(tmp_path):
    done = process("-c", TELL_IMPORTS, "torch,ray,timm", "data=image_folder", "data.root=photos", cwd=tmp_path)
    told = [f"ftexp: data.root={tmp_path}/photos does not exist", "imported: []"]
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (1, "", told)
    assert list((tmp_path / "runs").iterdir()) == []


# runs commands in sequence; after each, prints its exit code and which of the given modules were imported by then
COMMANDS = """
import json, sys
from ftexp.train import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:], code = words, 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    print("ended:", words, code, sorted({*HEAVY} & set(sys.modules)), file=sys.stderr)
"""
HEAVY = ["torch", "ray", "timm", "numpy", "pandas", "pyarrow", "torchvision", "sklearn"]
WRONG = [["optim.lr=-1"], ["optim.lrr=1"], ["model=vitt"], ["chaos.faults=[nope]"], ["resume=must"]]
ASKING = [["--help"], ["--cfg", "job"]]


def test_nothing_heavy_is_imported_before_the_config_is_known_to_be_good(tmp_path):
    program = COMMANDS.replace("HEAVY", str(HEAVY))
    done = process("-c", program, json.dumps(WRONG + ASKING), cwd=tmp_path)
    ended = [line for line in done.stderr.splitlines() if line.startswith("ended: ")]
    codes = [(words, 2) for words in WRONG] + [(words, 0) for words in ASKING]
    assert ended == [f"ended: {words} {code} []" for words, code in codes]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # and no files are left


def test_a_wrong_search_is_told_before_anything_heavy_is_imported(tmp_path):
    words = ["-m", "hydra/sweeper=tune", "optim.lr=interval(1e-4, 1e-1)", "hydra.sweeper.num_trials=0"]
    done = process("-c", TELL_IMPORTS, "torch,ray,timm,optuna", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "imported: []" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_sweep_is_told_before_anything_heavy_is_imported(tmp_path):
    words = ["-m", "seed=1,2", "scaling.num_workers=32"]  # the last check that is made
    done = process("-c", TELL_IMPORTS, "torch,ray,timm", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "scaling.num_workers=32 with 1 CPU each want more than" in done.stderr
    assert "imported: []" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_report_imports_nothing_heavy_and_is_written_where_it_is_told(clean_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(clean_run.path, run, ignore=shutil.ignore_patterns("report.html", "charts"))
    done = process("-c", WRITE_REPORT, str(run), "--out", "elsewhere/first.html", cwd=tmp_path)
    assert done.stdout.splitlines() == [f"written to {tmp_path}/elsewhere/first.html", "[]"], done.stderr
    assert "<h1>clean" in (tmp_path / "elsewhere" / "first.html").read_text()
    assert (tmp_path / "elsewhere" / "charts" / "timeline.png").exists()
    assert (tmp_path / "elsewhere" / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
    assert not (run / "report.html").exists()
