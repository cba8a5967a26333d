"""Where each record of a torch.save file lies: PROTOCOL.md section 5. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BIG = 0xFFFFFFFF
_LEADING = ((".format_version", 1), (".storage_alignment", 2), ("byteorder", 6))
_TRAILING = (("version", 2), (".data/serialization_id", 40))


@dataclass(frozen=True)
class Layout:
    """Offsets and lengths in bytes."""

    pickle_offset: int
    storage_offsets: list[int]
    image_length: int


def layout(archive: str, pickle_length: int, storage_lengths: Sequence[int]) -> Layout:
    """
    Args:
        archive: the file's name without `.th`.
        pickle_length: of data.pkl in bytes.
        storage_lengths: of data/0, data/1, ... in bytes.
    """
    prefix = len(archive.encode()) + 1
    offset = central = 0

    def add(name_length: int, size: int) -> int:
        nonlocal offset, central
        name_length += prefix
        zip64 = 0
        if size >= _BIG or offset >= _BIG:
            zip64 = 4 + (16 if size >= _BIG else 0) + (8 if offset >= _BIG else 0)
        payload = (offset + 34 + name_length + zip64 + 63) & ~63
        offset = payload + size + (0 if size == 0 else 24 if zip64 else 16)
        central += 46 + name_length + zip64
        return payload

    pickle_offset = add(len("data.pkl"), pickle_length)
    for name, size in _LEADING:
        add(len(name), size)
    offsets = [add(5 + len(str(i)), size) for i, size in enumerate(storage_lengths)]
    for name, size in _TRAILING:
        add(len(name), size)
    return Layout(pickle_offset, offsets, offset + central + 56 + 20 + 22)
