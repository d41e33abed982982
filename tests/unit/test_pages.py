"""The pages: every link has a target, ftexp accepts every command, and every Python block is valid."""

import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ftexp.config.checks.validate import validate
from ftexp.config.schema import Config, config_dir

ROOT = config_dir().parent
LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    cwd=ROOT, capture_output=True, text=True, check=True,
).stdout  # fmt: skip
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in LISTED.split()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = {page: FENCE.sub("", text) for page, text in PAGES.items()}
MODULES = (
    *("train", "evaluate", "predict", "export", "drill", "checkpoints", "sweeps", "data", "report"),
    *("dashboard", "doctor", "deploy"),
)


def blocks(language):
    """Return (page, text) of every fenced block in `language`."""
    return [(page, block) for page, text in PAGES.items() for name, block in FENCE.findall(text) if name == language]


def links(page):
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", PROSE[page]) if not link.startswith(("http:", "https:"))]


def headings(page):
    """Return the anchors of a page's headings, as GitHub generates them."""
    found = re.findall(r"^#+ (.+)$", PROSE[page], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def target(page, link):
    """Return (path from the root, anchor) of a link on `page`."""
    path, _, anchor = link.partition("#")
    whole = os.path.normpath(ROOT / page if not path else (ROOT / page).parent / path)
    return os.path.relpath(whole, ROOT), anchor


def commands():
    """Return {command: (module, words)} of every `python -m ftexp.<module>` in console blocks and inline code."""
    lines = [line[2:] for _, block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    lines += [" ".join(code.split()) for text in PROSE.values() for code in re.findall(r"`([^`]+)`", text)]
    found = {}
    for line in lines:
        _, command, rest = line.partition("python -m ftexp.")
        if command and "..." not in line and "<" not in line:
            module, *words = shlex.split(rest.partition(" > ")[0], comments=True)
            found[shlex.join([f"ftexp.{module}", *words])] = (module, words)
    return found


COMMANDS = commands()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_or_heading_that_exists(page):
    for link in links(page):
        path, anchor = target(page, link)
        assert (ROOT / path).exists(), f"{page}: {link}"
        assert not anchor or anchor in headings(path), f"{page}: {link}"
    for path in re.findall(r"`((?:ftexp|scripts|conf)/[\w./]+)`", PROSE[page]):
        assert (ROOT / path).exists(), f"{page}: {path}"


def test_every_page_is_linked_from_readme():
    assert {target("README.md", link)[0] for link in links("README.md")} >= set(PAGES) - {"README.md"}


def test_there_is_a_command_of_each_kind_to_check():
    assert {module for module, _ in COMMANDS.values()} == {*MODULES}


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """Function that runs a command up to the point where it would start Ray or read a run."""
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)
    (tmp_path / "weights.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTEXP_HOOK", "https://hooks.example.com/secret")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # run_hydra sets it; this restores it afterwards
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("ftexp.config.checks.scaling.num_local_gpus", lambda: 0)
    monkeypatch.setattr("ftexp.sweep.run.grid.run_grid", lambda configs, *_: [0.0] * len(configs))
    monkeypatch.setattr("ftexp.sweep.search.search.run_search", lambda _: None)
    monkeypatch.setattr("ftexp.cli.trained_run.SavedRun.at", lambda _: SimpleNamespace(config=Config()))

    def validated(config, *_, **__):
        validate(config)
        return {}

    def drilled(config, own, _):
        validate(dataclasses.replace(config, chaos=dataclasses.replace(config.chaos, faults=own.faults)))
        return True

    instead = {
        "train": {"train": validated},
        "data": {"inspect": validated},
        "drill": {"drill": drilled},
        "evaluate": {"evaluate": lambda *_: None, "print_result": lambda _: None},
        "export": {"export": lambda _: None},
        "predict": {"top_k": lambda *_: None, "predict": lambda *_: None},
        "checkpoints": {"show": lambda _: True, "show_differences": lambda *_: True, "convert": lambda *_: True},
        "sweeps": {"show": lambda _: None},
        "report": {"_written": lambda *_: ""},
        "dashboard": {},
        "doctor": {"diagnose": lambda config: validate(config) is None},
        "deploy": {},
    }

    def run(module, words):
        package = importlib.import_module(f"ftexp.{module}")
        entry = importlib.import_module(f"ftexp.{module}.__main__") if hasattr(package, "__path__") else package
        entry = sys.modules[entry.main.__module__]
        for name, replacement in instead[module].items():
            monkeypatch.setattr(entry, name, replacement)
        monkeypatch.setattr("sys.argv", [module, *words])
        try:
            entry.main()
        except SystemExit as ended:
            return ended.code or 0, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_taken(check, command):
    code, err = check(*COMMANDS[command])
    assert code == 0, err


def test_every_python_block_compiles():
    found = blocks("python")
    assert found
    for page, block in found:
        compile(block, page, "exec")


def test_every_plugin_of_the_pages_registers_itself(preloaded, tmp_path):
    plugins = [block for _, block in blocks("python") if "register" in block]
    for number, block in enumerate(plugins):
        (tmp_path / f"plugin_{number}.py").write_text(block, encoding="utf-8")
    program = tmp_path / "program.py"
    program.write_text(f"""
from ftexp.registry import load_plugins
load_plugins(f"plugin_{{number}}" for number in range({len(plugins)}))
import timm
from ftexp.checkpoint.registry import check_names
from ftexp.data.sources import sources
from ftexp.trackers.registry import trackers
check_names(["counter"])
assert "mine" in sources and "mine" in trackers and timm.is_model("my_net")
""")
    done = subprocess.run(
        [*preloaded.python, program],
        cwd=tmp_path, env=preloaded.environment(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
