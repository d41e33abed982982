"""The word list of .github/CONTRIBUTING.md: strings of ftexp, pages and comments of conf/ use no banned words."""

import ast
import re
import subprocess

import pytest

from ftexp.config.schema import config_dir

ROOT = config_dir().parent
# {pattern of a banned phrase: what to say}; the rows of the page's table, in its order
BANNED = {
    r"goes on|go on|going on|went on": "resume, continue",
    r"told|tells?|telling": "log, print, report, return",
    r"(?:does|do)n't count": "rejected: truncated, corrupt, missing",
    r"torn": "truncated, incomplete",
    r"last save|a save|saves before": "checkpoint",
    r"alike to the bit|identical to the bit|the very (?:numbers|same)": "bitwise identical",
    r"left out|leave (?:it|them) out": "excluded, skipped, removed",
    r"take (?:it|them|that) out|taken out": "remove",
    r"stood still|stands still": "no progress",
    r"stands? beside": "conflicts with",
    r"(?<!eval=)(?<!inline \| )beside(?! evaluates)": "next to, besides",
    r"anew|once more": "again",
    r"folders?": "directory",
    r"rivals?": "baseline",
    r"fewest": "min",
    r"put (?:back|right)|put these back": "restore, fix",
    r"once that is put right": "fix the cause, then",
    r"written by no run": "not a logged metric",
    r"mend": "fix",
}
PATTERNS = {
    re.compile(rf"(?<![\w.=/_-])(?:{banned})(?![\w=/_-])", re.IGNORECASE): say for banned, say in BANNED.items()
}


WORD_LIST = ".github/CONTRIBUTING.md"  # contains the banned words


def listed(*patterns):
    """Return the repository's files that match `patterns`."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [name for name in found if name != WORD_LIST]


def strings(source):
    """Yield (line, text) of every string literal that is not a docstring; of an f-string, its literal parts."""
    tree = ast.parse(source)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        # a single word is a key or a value, which programs read
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            if " " in node.value.strip():
                yield node.lineno, node.value


def docstrings(source):
    """Yield (line, text) of every docstring, and of every other string used as a statement."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def banned_in(lines):
    """Return a line for every banned phrase in (line, text) pairs."""
    return [
        f"{number}: {found[0]!r} in {text.strip()[:100]!r}; say: {say}"
        for number, text in lines
        for pattern, say in PATTERNS.items()
        for found in pattern.finditer(text)
    ]


@pytest.mark.parametrize("name", listed("ftexp/*.py"))
def test_no_string_has_a_banned_word(name):
    assert not banned_in(strings((ROOT / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", listed("ftexp/*.py", "scripts/*.py"))
def test_no_docstring_has_a_banned_word(name):
    assert not banned_in(docstrings((ROOT / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", listed("ftexp/*.py"))
def test_no_docstring_begins_with_what(name):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [
        node for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))) if isinstance(node, documented)
    ]
    assert [text for node in nodes if (text := ast.get_docstring(node) or "").startswith("What ")] == []


@pytest.mark.parametrize("name", listed("conf/*.yaml"))
def test_no_comment_of_a_group_has_a_banned_word(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert not banned_in((number, line.partition("#")[2]) for number, line in enumerate(lines, 1))


@pytest.mark.parametrize("name", listed("*.md"))
def test_no_page_has_a_banned_word(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert not banned_in(enumerate(lines, 1))


@pytest.mark.parametrize(
    ("read", "source", "found"),
    [
        (strings, 'print("the run goes on")', ["1: 'goes on' in 'the run goes on'; say: resume, continue"]),
        (strings, 'x = f"{key}={value}: take it out"', ["1: 'take it out' in ': take it out'; say: remove"]),
        (strings, '"""The run goes on."""', []),
        (strings, 'x = "beside"', []),
        (strings, 'x = "train.eval=beside evaluates checkpoints"', []),
        (strings, 'x = "data=image_folder data.root=here"', []),
        (docstrings, '"""The run goes on."""', ["1: 'goes on' in 'The run goes on.'; say: resume, continue"]),
        (
            docstrings,
            'x = 1\n"""Told to the hub."""',
            ["2: 'Told' in 'Told to the hub.'; say: log, print, report, return"],
        ),
        (docstrings, 'def f():\n    """Call `put_back`."""', []),
        (docstrings, 'x = "the run goes on"', []),
    ],
)
def test_banned_words_are_found_in_strings_and_in_docstrings_apart(read, source, found):
    assert banned_in(read(source)) == found
