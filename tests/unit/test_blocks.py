"""Blocks: each is read once while it is held, and every item is read from its own block."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftexp.data.sources import blocks
from ftexp.data.sources.blocks import BlockCache, BlockReader


class Remote:
    """Replaces Ray's tasks: runs them at once, and a reference is their result."""

    def __init__(self, function):
        self._function = function

    def remote(self, *arguments):
        return self._function(*arguments)


@pytest.fixture
def reads(monkeypatch):
    """List of the blocks that a BlockCache reads, in order."""
    monkeypatch.setattr(blocks.ray, "remote", lambda **_: Remote)
    return []


def cache(reads, capacity):
    def fetch(block):
        reads.append(block)
        if block == 13:
            raise OSError("block 13 is torn")
        return f"content of {block}"

    return BlockCache(fetch, capacity)


def test_a_block_is_read_once_while_it_is_held(reads):
    held = cache(reads, 3)
    assert held.refs([2, 0]) == ["content of 2", "content of 0"]
    assert held.refs([0, 1, 2]) == ["content of 0", "content of 1", "content of 2"]
    assert reads == [2, 0, 1]


def test_the_block_that_was_not_asked_for_for_longest_is_dropped(reads):
    held = cache(reads, 3)
    held.refs([0, 1, 2])
    held.refs([0])
    held.refs([3])  # drops 1, the least recently requested
    held.refs([0, 2, 3])
    assert reads == [0, 1, 2, 3]
    held.refs([1])
    assert reads == [0, 1, 2, 3, 1]


def test_all_blocks_of_one_request_are_held_even_where_they_are_more_than_the_capacity(reads):
    held = cache(reads, 2)
    assert held.refs([0, 1, 2, 3]) == [f"content of {block}" for block in range(4)]
    held.refs([3, 2, 1])
    assert reads == [0, 1, 2, 3]
    held.refs([1, 2])
    held.refs([3])
    assert reads == [0, 1, 2, 3, 3]  # the capacity is two again


def test_a_forgotten_block_is_read_again(reads):
    held = cache(reads, 3)
    held.refs([0, 1])
    held.forget(1)
    held.forget(7)  # it isn't held
    held.refs([0, 1])
    assert reads == [0, 1, 1]


def test_what_keeps_a_block_from_being_read_is_a_value(reads):
    (found,) = cache(reads, 3).refs([13])
    assert isinstance(found, OSError)
    assert str(found) == "block 13 is torn"


class Numbers:
    """Blocks of integers: item i is i. The block `torn` can't be read."""

    def __init__(self, sizes, torn=None):
        self.firsts, self.torn, self.fetched = np.cumsum(sizes) - sizes, torn, []
        self._sizes = sizes

    def first_items(self):
        return self.firsts

    def fetch(self, block):
        self.fetched.append(block)
        if block == self.torn:
            raise OSError("torn")
        return list(range(self.firsts[block], self.firsts[block] + self._sizes[block]))

    def pick(self, data, block, row):
        return self.where(block, row), lambda: data[row]

    def where(self, block, row):
        return f"row {row} of block {block}"


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any).map(np.array), data=st.data())
def test_items_come_as_asked_for_each_from_its_own_block(sizes, data):
    source = Numbers(sizes)
    items = np.array(data.draw(st.lists(st.integers(0, int(sizes.sum()) - 1), min_size=1)))
    found = list(BlockReader(source)(items))
    assert [get() for _, get in found] == items.tolist()
    owners = np.repeat(np.arange(len(sizes)), sizes)[items]
    assert [where for where, _ in found] == [
        f"row {item - source.firsts[block]} of block {block}" for item, block in zip(items, owners, strict=True)
    ]
    assert source.fetched == sorted(set(owners.tolist()))


def test_a_block_that_cannot_be_read_costs_its_own_items_alone():
    found = list(BlockReader(Numbers(np.array([2, 2, 2]), torn=1))(np.array([5, 3, 0, 2])))
    assert [where for where, _ in found] == [
        "row 1 of block 2", "row 1 of block 1", "row 0 of block 0", "row 0 of block 1",
    ]  # fmt: skip
    assert [found[0][1](), found[2][1]()] == [5, 0]
    for number in (1, 3):
        with pytest.raises(OSError, match="torn"):
            found[number][1]()
