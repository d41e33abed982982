"""The garbage collector during imports that take seconds."""

import contextlib
import gc
import sys
import weakref

import pytest

from ftexp.cluster.importing import import_meanwhile, importing_for_good, uncollected


@pytest.mark.parametrize("fails", [False, True])
def test_the_collector_leaves_alone_what_was_imported_and_works_on_afterwards(fails):
    made, collects = [], []
    with pytest.raises(ImportError) if fails else contextlib.nullcontext(), importing_for_good():
        made.append([])
        collects.append(gc.isenabled())
        if fails:
            raise ImportError("not there")
    assert (collects, gc.isenabled()) == ([False], True)
    assert not any(each is made[0] for each in gc.get_objects())


def test_a_module_is_imported_on_a_thread_without_the_collector(tmp_path, monkeypatch):
    (tmp_path / "asks_at_import.py").write_text("import gc\nCOLLECTS = gc.isenabled()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_meanwhile("asks_at_import").join()
    assert sys.modules.pop("asks_at_import").COLLECTS is False
    assert gc.isenabled()


def test_what_a_program_drops_after_an_import_is_freed_and_a_collector_that_was_off_stays_off(tmp_path, monkeypatch):
    class Cycle:
        pass

    (tmp_path / "imported_beside.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    cycle = Cycle()
    cycle.own, alive = cycle, weakref.ref(cycle)
    import_meanwhile("imported_beside").join()
    del cycle
    gc.collect()
    assert alive() is None
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
