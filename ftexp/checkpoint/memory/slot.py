"""A slot: memory for one snapshot, complete or not. Imports no torch.

    header     magic, sequence number, sizes of the parts, BLAKE3 of these numbers and the parts; takes a page
    data       the tensors
    facts      JSON, to choose among snapshots
    outline    the rest of the snapshot, and the locations of its tensors

The header is cleared first and written last. If the writer died, or wrote while another process was reading, the
content doesn't match the hash.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

from ftexp.checkpoint.hashing import new_hash

PAGE = 4096
_MAGIC = b"ftexp s1"
_NUMBERS = struct.Struct("<4Q")  # sequence, bytes of data, of facts, of the outline
_HEADER = struct.Struct(f"<8s{_NUMBERS.size}s32s")


@dataclass(frozen=True)
class Header:
    """The numbers of a complete snapshot."""

    sequence: int  # higher than any earlier one of the same writer on the node
    data_bytes: int
    facts_bytes: int
    outline_bytes: int
    digest: bytes

    @property
    def end(self) -> int:
        """Size of the snapshot in the slot, with the header."""
        return PAGE + self.data_bytes + self.facts_bytes + self.outline_bytes


class Slot:
    """Memory with room for a snapshot."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    @property
    def data(self) -> memoryview:
        """The memory after the header."""
        return self._memory[PAGE:]

    def clear(self) -> None:
        """Mark the slot as empty."""
        self._memory[: _HEADER.size] = bytes(_HEADER.size)

    def seal(self, sequence: int, data_bytes: int, facts: dict[str, Any], outline: bytes) -> bool:
        """Complete a snapshot whose data are written; False, and it stays incomplete, if the rest doesn't fit."""
        encoded = json.dumps(facts).encode()
        rest = PAGE + data_bytes
        if rest + len(encoded) + len(outline) > len(self._memory):
            return False
        self._memory[rest : rest + len(encoded)] = encoded
        self._memory[rest + len(encoded) : rest + len(encoded) + len(outline)] = outline
        numbers = _NUMBERS.pack(sequence, data_bytes, len(encoded), len(outline))
        end = rest + len(encoded) + len(outline)
        self._memory[: _HEADER.size] = _HEADER.pack(_MAGIC, numbers, _digest(numbers, self._memory[PAGE:end]))
        return True

    def header(self) -> Header | None:
        """Return the header, not verified yet; None if it is not the header of a complete snapshot."""
        magic, numbers, digest = _HEADER.unpack_from(self._memory)
        if magic != _MAGIC:
            return None
        sequence, data_bytes, facts_bytes, outline_bytes = _NUMBERS.unpack(numbers)
        header = Header(sequence, data_bytes, facts_bytes, outline_bytes, digest)
        return header if header.end <= len(self._memory) else None

    def facts(self) -> dict[str, Any] | None:
        """Return the facts, not verified yet; None if there is no complete snapshot."""
        header = self.header()
        if header is None:
            return None
        begin = PAGE + header.data_bytes
        try:
            facts: dict[str, Any] = json.loads(bytes(self._memory[begin : begin + header.facts_bytes]))
        except ValueError:
            return None
        return facts

    def outline(self, header: Header) -> bytes:
        """Return the outline: the state without its tensors, pickled."""
        begin = PAGE + header.data_bytes + header.facts_bytes
        return bytes(self._memory[begin : begin + header.outline_bytes])

    def verified(self, sequence: int) -> Header | None:
        """Return the header if the slot holds snapshot number `sequence` as it was written; else None."""
        header = self.header()
        if header is None or header.sequence != sequence:
            return None
        numbers = _NUMBERS.pack(header.sequence, header.data_bytes, header.facts_bytes, header.outline_bytes)
        return header if _digest(numbers, self._memory[PAGE : header.end]) == header.digest else None


def sequence_of(slot: Slot) -> int:
    """Return the sequence number of a slot's snapshot; 0 if it holds none."""
    header = slot.header()
    return 0 if header is None else header.sequence


def _digest(numbers: bytes, parts: memoryview) -> bytes:
    found = new_hash()
    found.update(numbers)
    found.update(parts)
    return bytes.fromhex(found.hexdigest())
