"""Reader of wandb's files: records in LevelDB's log format, for which wandb has no Python reader.

The file consists of blocks of 32 KiB; the first one starts with a file header of seven bytes. Blocks consist of chunks,
each with a header: CRC-32 of type and content, length, and type (a whole record, or its first, a middle, or its last
part). The rest of a block that is too short for a header is zeros.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_FILE_HEAD = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_HEAD = struct.Struct("<IHB")
_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(content: bytes) -> Iterator[bytes]:
    """Yield each complete record of a file, up to where a kill has truncated it; none if it is no such file."""
    if not content.startswith(_FILE_HEAD):
        return
    position, parts = len(_FILE_HEAD), b""
    while position < len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEAD.size:
            position += left
            continue
        if position + _HEAD.size > len(content):
            return
        checksum, length, kind = _HEAD.unpack_from(content, position)
        start = position + _HEAD.size
        part = content[start : start + length]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or zlib.crc32(bytes([kind]) + part) != checksum:
            return
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            yield parts
        position = start + length
