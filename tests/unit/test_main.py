"""`ftexp <command>`, and imports of a user's module."""

import importlib
import sys
import tomllib

import pytest

import ftexp
import ftexp.__main__
import ftexp.plugins
from ftexp.cli.entry import as_value, with_run
from ftexp.config.schema import config_dir

ROOT = config_dir().parent


def test_every_entry_point_is_a_command():
    files = {file.stem for file in (ROOT / "ftexp").glob("*.py")} - {
        "__init__",
        "__main__",
        "api",
        "counting",
        "errors",
        "plugins",
        "registry",
    }
    packages = {file.parent.name for file in (ROOT / "ftexp").glob("*/__main__.py")}
    assert files | packages == set(ftexp.__main__.COMMANDS)


@pytest.mark.parametrize("start", [[], ["--help"], ["-h"]])
def test_without_a_command_they_are_listed(monkeypatch, capsys, start):
    monkeypatch.setattr(sys, "argv", ["ftexp", *start])
    ftexp.__main__.main()
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in ftexp.__main__.COMMANDS)
    assert max(map(len, listed.splitlines())) <= 80


def test_an_unknown_command_is_refused_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ftexp", "trian"])
    with pytest.raises(SystemExit, match="2"):
        ftexp.__main__.main()
    assert "trian is not a command. Did you mean 'train'?" in capsys.readouterr().err


def test_the_version_is_that_of_the_package():
    assert (
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]["path"] == "ftexp/__init__.py"
    )
    assert ftexp.__version__.count(".") == 2


def test_plugins_offers_what_the_registries_have():
    assert sorted(ftexp.plugins.__all__) == sorted(name for names in ftexp.plugins._HOMES.values() for name in names)
    for home, names in ftexp.plugins._HOMES.items():
        for name in names:
            assert getattr(ftexp.plugins, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="register_everything"):
        ftexp.plugins.register_everything  # noqa: B018


def test_a_run_may_be_given_without_its_key():
    assert with_run(["runs/a", "split=val"]) == ["run=runs/a", "split=val"]
    assert with_run(["split=val", "runs/lr=0.1"]) == ["split=val", "run=runs/lr=0.1"]
    assert with_run(["run=runs/a", "-m"]) == ["run=runs/a", "-m"]
    assert as_value("run=runs/a") == as_value("runs/a") == "runs/a"
    assert as_value("runs/run=a") == "runs/run=a"
