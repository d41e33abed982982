"""Layout of the tests: shared helpers are in tests/support, so that each test file can be read and moved alone."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
LANES = ("unit", "ray", "command")


def test_every_test_file_lies_in_a_lane():
    assert {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")} == set(LANES)


def test_nothing_is_imported_from_a_test_file():
    from_tests = re.compile(r"^ *(?:from|import) [\w.]*\btest_\w+.*$", re.MULTILINE)  # also in programs within strings
    found = {str(path): from_tests.findall(path.read_text()) for path in TESTS.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_test_has_the_marker_of_its_directory(request):
    assert [marker.name for marker in request.node.iter_markers() if marker.name in LANES] == ["unit"]
