"""One rank of several processes dies and is started again: the result is bitwise identical to a clean run."""

import pytest


@pytest.mark.parametrize("ranks", ["2 1 6 6+", "3 2 1 5 9"])
def test_a_run_whose_rank_is_killed_in_a_step_and_replaced_ends_as_if_nothing_had_happened(preloaded, tmp_path, ranks):
    assert preloaded.run("replaced_ranks", str(tmp_path), *ranks.split()) == "bitwise identical\n"
