"""A file with one process's rows of tensors: safetensors, verifiable in part.

    8 bytes             length of the header
    header              JSON: {name: {dtype, shape, data_offsets}}, and under __metadata__ "pieces":
                        {name: {"first": first row, "shape": of the whole tensor, "blake3": [hex of each chunk]}}
    data                rows of each tensor in turn

The manifest has the hash of length and header. The header has a hash for each chunk of CHUNK_BYTES of a tensor's data.
A process that needs some rows thus reads and verifies only their chunks.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from ftexp.checkpoint.hashing import hex_of
from ftexp.errors import CheckpointError
from ftexp.storage.directory import Storage, write_all

HEADER, HEADER_BYTES = "header_blake3", "header_bytes"  # keys of such a file's manifest entry
CHUNK_BYTES = 1 << 18
_READ_BYTES = 1 << 23  # maximum size of a read
_GAP_BYTES = 1 << 18  # maximum gap between chunks that are read together
_ALIGNED = 8


@dataclass(frozen=True)
class Slice:
    """Rows of a tensor to write."""

    name: str
    dtype: str  # as safetensors calls it: F32
    num_rows: int
    first: int  # index of the first row in the whole tensor
    shape: tuple[int, ...]  # shape of the whole tensor
    num_bytes: int
    read: Callable[[int, int], memoryview]  # returns bytes [begin, end), valid until the next call
    written: Callable[[], object] = lambda: None  # called once the rows are in the file

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes, CHUNK_BYTES at a time."""
        for begin in range(0, self.num_bytes, CHUNK_BYTES):
            yield self.read(begin, min(begin + CHUNK_BYTES, self.num_bytes))


class SliceFile:
    """Content of a file; a call with a stream writes it. `described`: its manifest entry."""

    def __init__(self, slices: Iterable[Slice]) -> None:
        self._slices = list(slices)
        entries, about, begin = dict[str, Any](), dict[str, Any](), 0
        for each in self._slices:
            end = begin + each.num_bytes
            shape, offsets = [each.num_rows, *each.shape[1:]], [begin, end]
            entries[each.name] = {"dtype": each.dtype, "shape": shape, "data_offsets": offsets}
            hashes = list(map(hex_of, each.chunks()))
            about[each.name] = {"first": each.first, "shape": each.shape, "blake3": hashes}
            begin = end
        text = json.dumps({"__metadata__": {"format": "pt", "pieces": json.dumps(about)}, **entries}).encode()
        text += b" " * (-len(text) % _ALIGNED)
        self._header = len(text).to_bytes(8, "little") + text
        self.described = {
            "bytes": len(self._header) + begin,
            HEADER_BYTES: len(self._header),
            HEADER: hex_of(self._header),
        }

    def __call__(self, stream: BinaryIO) -> None:
        """Write the file."""
        write_all(stream, self._header)
        for each in self._slices:
            for chunk in each.chunks():
                write_all(stream, chunk)
            each.written()


@dataclass(frozen=True)
class Entry:
    """Rows of a tensor in a file."""

    name: str
    dtype: str
    first: int
    num_rows: int
    shape: tuple[int, ...]  # shape of the whole tensor
    begin: int  # offset in the file
    end: int
    hashes: list[str]

    @property
    def rows(self) -> range:
        """Indices of the rows in the whole tensor."""
        return range(self.first, self.first + self.num_rows)


@dataclass(frozen=True)
class Wanted:
    """Rows of a tensor to read. `put(offset, data)` receives their bytes; offset 0 is the first of these rows."""

    name: str
    rows: range
    dtype: str
    shape: tuple[int, ...]  # shape of the whole tensor
    put: Callable[[int, memoryview], object]


@dataclass(frozen=True)
class _Chunk:
    """Bytes of a file that are verified together; `put` receives the wanted ones."""

    begin: int
    end: int
    digest: str
    low: int = 0  # wanted bytes [low, high), relative to `begin`
    high: int = 0
    put: Callable[[memoryview], object] | None = None


def verify(directory: Storage, name: str, described: Mapping[str, Any]) -> None:
    """Verify all of a file; CheckpointError, with its name, if it isn't as described. OSError if it can't be read."""
    with directory.reading_at(name) as file:
        entries = _entries(file, name, described)
        _read(file, name, itertools.chain.from_iterable(map(_chunks, entries.values())))


def read(directory: Storage, name: str, described: Mapping[str, Any], wanted: Iterable[Wanted]) -> None:
    """Read rows, some at a time, and pass them on once they are verified; errors as of `verify`."""
    with directory.reading_at(name) as file:
        entries = _entries(file, name, described)
        chunks = [chunk for each in wanted for chunk in _chunks_of(_entry(entries, each, name), each)]
        _read(file, name, sorted(chunks, key=lambda chunk: chunk.begin))


def _entries(file: Any, name: str, described: Mapping[str, Any]) -> dict[str, Entry]:
    if (size := file.size()) != described["bytes"]:
        raise CheckpointError(f"{name} has {size} bytes, not {described['bytes']}")
    header = file.read_at(described[HEADER_BYTES], 0)
    if hex_of(header) != described[HEADER]:
        raise CheckpointError(f"{name} differs from its BLAKE3")
    content = json.loads(header[8:])
    about = json.loads(content.pop("__metadata__")["pieces"])
    return {key: _entry_of(key, entry, about[key], len(header)) for key, entry in content.items()}


def _entry_of(name: str, entry: dict[str, Any], about: dict[str, Any], data_at: int) -> Entry:
    begin, end = (data_at + offset for offset in entry["data_offsets"])
    num_rows, shape = entry["shape"][0], tuple(about["shape"])
    return Entry(name, entry["dtype"], about["first"], num_rows, shape, begin, end, about["blake3"])


def _entry(entries: Mapping[str, Entry], wanted: Wanted, name: str) -> Entry:
    entry = entries.get(wanted.name)
    if entry is None or (entry.shape, entry.dtype) != (wanted.shape, wanted.dtype):
        raise CheckpointError(f"{name} has no {wanted.name} of the shape and type that extra_state.pt says")
    if wanted.rows.start < entry.rows.start or wanted.rows.stop > entry.rows.stop:
        raise CheckpointError(f"{name} holds rows {entry.rows} of {wanted.name}, not {wanted.rows}")
    return entry


def _chunks(entry: Entry) -> Iterator[_Chunk]:
    for begin, digest in zip(range(entry.begin, entry.end, CHUNK_BYTES), entry.hashes, strict=True):
        yield _Chunk(begin, min(begin + CHUNK_BYTES, entry.end), digest)


def _chunks_of(entry: Entry, wanted: Wanted) -> Iterator[_Chunk]:
    """Yield the chunks that hold the wanted rows."""
    row_bytes = (entry.end - entry.begin) // max(entry.num_rows, 1)
    low = entry.begin + (wanted.rows.start - entry.first) * row_bytes
    high = low + len(wanted.rows) * row_bytes
    for chunk in _chunks(entry):
        begin, end = max(low, chunk.begin), min(high, chunk.end)
        if begin < end:
            put = functools.partial(wanted.put, begin - low)
            yield _Chunk(chunk.begin, chunk.end, chunk.digest, begin - chunk.begin, end - chunk.begin, put)


def _read(file: Any, name: str, chunks: Iterable[_Chunk]) -> None:
    for run in _runs(chunks):
        content = memoryview(file.read_at(run[-1].end - run[0].begin, run[0].begin))
        for chunk in run:
            data = content[chunk.begin - run[0].begin : chunk.end - run[0].begin]
            if hex_of(data) != chunk.digest:
                raise CheckpointError(f"{name} differs from its BLAKE3")
            if chunk.put is not None:
                chunk.put(data[chunk.low : chunk.high])


def _runs(chunks: Iterable[_Chunk]) -> Iterator[list[_Chunk]]:
    """Yield groups of chunks to read at once: another request to an object store costs more than reading the gap."""
    run: list[_Chunk] = []
    for chunk in chunks:
        if run and (chunk.begin > run[-1].end + _GAP_BYTES or chunk.end - run[0].begin > _READ_BYTES):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run
