"""Listings: failed requests to a store are retried, and splits keep every item, its label and its block."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

import ftexp.data.listing
from ftexp.config.schema import DataConfig
from ftexp.data.listing import Listing, SteadyFile, raiser, retried
from ftexp.data.sources.parquet import RowGroup, RowGroups


@pytest.fixture
def slept(monkeypatch):
    """List of the seconds that would have been slept."""
    seconds = []
    monkeypatch.setattr(ftexp.data.listing.time, "sleep", seconds.append)
    return seconds


class Store:
    """Raises the given errors, one per call, then returns its content."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return b"content"


def test_what_a_store_fails_to_give_is_asked_for_again_after_ever_longer(slept):
    store = Store(OSError("slow down"), ConnectionResetError("gone"))
    assert retried(store) == b"content"
    assert store.calls == 3
    assert slept == sorted(slept) == [0.2, 1.0]


def test_what_a_store_never_gives_fails_with_the_last_error(slept):
    store = Store(*[OSError(f"failure {number}") for number in range(9)])
    with pytest.raises(OSError, match="failure 3"):
        retried(store)
    assert store.calls == 4
    assert len(slept) == 3


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("no such file"),
        NotADirectoryError("no folder any more"),
        PermissionError("forbidden"),
        ValueError("no image"),
    ],
    ids=repr,
)
def test_what_another_try_cannot_mend_fails_at_once(error, slept):
    store = Store(error)
    with pytest.raises(type(error), match=str(error)):
        retried(store)
    assert (store.calls, slept) == (1, [])


class FlakyFiles:
    """A filesystem with one file, on which the first attempt of every call fails."""

    def __init__(self, content):
        self._file, self._failed, self.closed = pa.BufferReader(content), set(), False

    def _fail_once(self, *call):
        if call not in self._failed:
            self._failed.add(call)
            raise OSError("slow down")

    def open_input_file(self, path):
        self._fail_once("open", path)
        return self

    def size(self):
        return self._file.size()

    def read_at(self, num_bytes, offset):
        self._fail_once(num_bytes, offset)
        return self._file.read_at(num_bytes, offset)

    def close(self):
        self.closed = True


def test_a_file_of_a_failing_store_reads_like_a_file(slept):
    content = bytes(range(200))
    store = FlakyFiles(content)
    with SteadyFile(store, "a.bin") as file, io.BytesIO(content) as expected:
        for opened in (file, expected):
            opened.seek(-50, io.SEEK_END)
            opened.seek(10, io.SEEK_CUR)
        assert file.tell() == expected.tell() == 160
        assert file.read(15) == expected.read(15)
        assert file.read() == expected.read()
        assert file.read(1) == b""
        file.seek(0)
        assert file.read() == content
    assert store.closed
    assert set(slept) == {0.2}


def test_a_damaged_row_group_fails_at_once_and_a_failing_store_does_not(tmp_path, slept):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [bytes([n]) * 300 for n in range(8)]}), path, compression="snappy")
    content = bytearray(path.read_bytes())
    store = FlakyFiles(bytes(content))
    groups = RowGroups(store, "image", Here([RowGroup("a.parquet", 0, 0)]))
    assert groups.fetch(0).to_pylist() == [bytes([n]) * 300 for n in range(8)]
    assert slept
    slept.clear()
    content[20:60] = bytes(40)  # within the column's only page
    path.write_bytes(content)
    damaged = RowGroups(LocalFileSystem(), "image", Here([RowGroup(str(path), 0, 0)]))
    with pytest.raises(OSError, match=r"."):
        damaged.fetch(0)
    assert not slept


class Here:
    """Replaces `Shared`, without Ray."""

    def __init__(self, value):
        self._value = value

    def get(self):
        return self._value


def test_what_cannot_be_got_raises_where_it_is_got():
    get = raiser(OSError("torn"))
    with pytest.raises(OSError, match="torn"):
        get()


class Local:
    """Replaces `Shared`, without Ray."""

    def __init__(self, value):
        self.get = lambda: value


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), seed=st.integers(0, 99), own_test=st.booleans())
@settings(max_examples=50)
def test_splits_keep_each_item_with_its_label_and_each_block_its_items(sizes, seed, own_test):
    num_items = sum(sizes)
    labels = {"train": np.random.default_rng(seed).integers(0, 3, num_items)}
    blocks, readers = {"train": np.array(sizes)}, {"train": "train's reader"}
    if own_test:
        labels["test"], blocks["test"], readers["test"] = np.array([2, 0, 1]), np.array([1, 2]), "test's reader"
    config = DataConfig(val_fraction=0.2, test_fraction=0.3, split_seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ftexp.data.listing, "Shared", Local)
        splits = Listing(["a", "b", "c"], labels, readers, blocks).splits(config, readers)

    found = []
    for name, split in splits.items():
        listed = "test" if own_test and name == "test" else "train"
        items, own_labels = split.table.get()
        assert split.read == readers[listed]
        assert len(split) == len(items)
        assert own_labels.tolist() == labels[listed][items].tolist()
        block_of = np.repeat(np.arange(len(blocks[listed])), blocks[listed])[items]
        assert split.block_sizes.tolist() == np.bincount(block_of, minlength=len(blocks[listed])).tolist()
        found += [(listed, item) for item in items.tolist()]
    assert sorted(found) == sorted((name, item) for name, own in labels.items() for item in range(len(own)))


@pytest.mark.parametrize(
    ("own", "per_class", "changes", "without"),
    [
        ({}, 4, {}, ["val"]),  # floor(0.1 * 4 + 0.5) = 0, floor(0.2 * 4 + 0.5) = 1
        ({}, 2, {}, ["val", "test"]),
        ({}, 10, {}, []),
        ({}, 4, {"val_fraction": 0.0, "test_fraction": 0.2}, []),
        ({"val": []}, 10, {}, []),  # the source's own split may be empty
    ],
)
def test_a_split_that_rounding_leaves_empty_is_named(own, per_class, changes, without):
    labels = {"train": np.repeat(np.arange(3), per_class), **{name: np.array(each, int) for name, each in own.items()}}
    readers = dict.fromkeys(labels)
    config = DataConfig(name="image_folder", **changes)
    listing = Listing(["a", "b", "c"], labels, readers, digest="")
    warnings = listing.facts(config, listing.splits(config, readers))["warnings"]
    assert [warning.partition(" ")[0] for warning in warnings] == without
    if without == ["val"]:
        assert warnings == [
            "val has no samples: data.val_fraction=0.1 of each class, rounded, is none; raise it, or set it to 0"
        ]
