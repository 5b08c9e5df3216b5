"""Whether a zip or safetensors file is as long as it says itself: what a cut-short copy is not."""

from __future__ import annotations

import struct
from typing import BinaryIO

import msgspec

from engine.loader.regular_files import read_exactly

# PKWARE APPNOTE 4.3.16, end of central directory: signature, disk, disk of the directory, entries here,
# entries, size and offset of the directory, length of the comment.
_END = struct.Struct("<4s4H2LH")
_END_MARK = b"PK\x05\x06"
_COMMENT_LIMIT = 0xFFFF
# APPNOTE 4.3.15, zip64 end of central directory locator: signature, disk, offset of the record, disks.
_LOCATOR = struct.Struct("<4sLQL")
# APPNOTE 4.3.14, zip64 end of central directory: signature, size, versions, disks, entries twice, size and
# offset of the directory.
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY_MARK = b"PK\x01\x02"


def zip_problem(file: BinaryIO, size: int) -> str | None:
    """What is wrong with a zip's end, or None. `size` is the file's length in bytes."""
    tail_start = max(0, size - _END.size - _COMMENT_LIMIT)
    tail = _read_at(file, tail_start, size - tail_start)
    at = tail.rfind(_END_MARK, 0, len(tail) - _END.size + len(_END_MARK))
    if at < 0:
        return "is a zip archive cut short: its end of central directory is missing"
    _, _, _, _, entries, length, offset, comment = _END.unpack_from(tail, at)
    end = tail_start + at
    if end + _END.size + comment != size:
        return f"is a zip archive of {end + _END.size + comment} bytes by its own account, but has {size}"
    if 0xFFFFFFFF in (length, offset) or entries == 0xFFFF:
        locator = _read_at(file, end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
        if len(locator) == _LOCATOR.size and locator.startswith(b"PK\x06\x07"):
            end = _LOCATOR.unpack(locator)[2]
            record = _read_at(file, end, _END_64.size) if end < size else b""
            if len(record) < _END_64.size or not record.startswith(b"PK\x06\x06"):
                return "is a zip archive whose zip64 end of central directory is damaged"
            *_, entries, length, offset = _END_64.unpack(record)
    if offset + length > end:
        return f"is a damaged zip archive: its directory ends at byte {offset + length}, past {end}"
    if entries and _read_at(file, offset, 4) != _ENTRY_MARK:
        return f"is a damaged zip archive: no directory at byte {offset}, where it should be"
    return None


_HEADER_LIMIT = 100_000_000  # safetensors/src/tensor.rs, MAX_HEADER_SIZE


class _Tensor(msgspec.Struct):
    data_offsets: tuple[int, int]


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TENSOR = msgspec.json.Decoder(_Tensor)


def safetensors_problem(file: BinaryIO, size: int) -> str | None:
    """What is wrong with a safetensors file's header or length, or None. `size` is in bytes."""
    length = int.from_bytes(_read_at(file, 0, 8), "little")
    if length > _HEADER_LIMIT:
        return f"is no safetensors file: a header of {length} bytes is more than its loader takes"
    if 8 + length > size:
        return f"is a safetensors file cut short: its header ends at byte {8 + length}, the file at {size}"
    try:
        header = _HEADER.decode(_read_at(file, 8, length))
        ends = [_TENSOR.decode(raw).data_offsets[1] for name, raw in header.items() if name != "__metadata__"]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return f"is a safetensors file with a damaged header ({error})"
    end = 8 + length + max(ends, default=0)
    if end != size:
        return f"is a safetensors file of {end} bytes by its own account, but has {size}"
    return None


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return read_exactly(file, size)
