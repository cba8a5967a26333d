# SPDX-License-Identifier: Apache-2.0
"""Saves tensors in the format of safetensors, with one copy: from the tensors into the memory that the daemon reads.

Source: the format's description (https://github.com/huggingface/safetensors, "Format"): eight bytes with the length of
the header, the header in JSON, then the tensors' bytes. What is unusual, the library itself makes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

from . import _files
from .saves import Ticket

# In the library's order of the tensors in a file: the largest elements come first, so that each tensor is aligned.
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: index for index, dtype in enumerate(_NAMES)}
_HEADER_ALIGNMENT = 8


def save_file(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> Ticket:
    """Saves what `safetensors.torch.save_file(tensors, path, metadata)` writes, through the daemon.

    Raises:
        what safetensors raises for tensors that it does not take; also as `noether_writer.save`.
    """
    if not all(_is_usual(each) for each in tensors.values()) or _share(tensors):
        return _files.save_bytes(
            safetensors.torch.save(dict(tensors), None if metadata is None else dict(metadata)), path
        )
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0].encode()))
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    places: list[tuple[int, int, torch.Tensor]] = []
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        places.append((start, end, tensor))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text

    def fill(memory: memoryview) -> None:
        memory[: len(header)] = header
        if end:
            content = torch.frombuffer(memory, dtype=torch.uint8)[len(header) :]
            for first, last, tensor in places:
                content[first:last].copy_(tensor.detach().reshape(-1).view(torch.uint8))

    return _files.save_raw(path, len(header) + end, fill)


def _is_usual(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.dtype in _NAMES
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and tensor.device.type in ("cpu", "cuda")
        and not tensor.is_neg()
    )


def _share(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether two of them lie in one storage: the library says what it thinks of that."""
    storages = [each.untyped_storage().data_ptr() for each in tensors.values() if each.numel()]
    return len(set(storages)) != len(storages)
