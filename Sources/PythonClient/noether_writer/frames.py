# SPDX-License-Identifier: Apache-2.0
"""Frames and packed payloads of the wire protocol: pure functions over bytes. See docs/PROTOCOL.md."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import OTHER_VERSION, ProtocolError, UnsupportedValue

HEADER = struct.Struct("<HBBIIHH")
MAGIC = 0x574E
VERSION = 1
# Of the protocol, which `hello` offers.
VERSIONS = [1]
PAYLOAD_BYTES = 1 << 20
KEY_BYTES = 1024
KEYS_PER_RUN = 65_536
VALUES_PER_LOG = 16_384
STORAGES = 100_000
TARGETS = 4
_SHOWN = 100
#: Of updates that the daemon has refused; there may be one an update.
ERRORS_KEPT = 64

HELLO, OPEN_RUN, DEFINE_KEYS, LOG, SAVE, FINISH = 1, 2, 3, 4, 5, 6
VALUES, ENTRIES, STATUS, WAIT, CLOSE, SUBSCRIBE, LEAVE = 7, 8, 9, 10, 11, 12, 14
REMOVE, COMMIT, WAIT_PATH, RESTORE = 15, 16, 17, 18
WELCOME, ERROR, RUN_OPENED, LOG_ACK, CHECKPOINT_EVENT = 64, 65, 66, 67, 68
FINISHED, VALUES_PAGE, ENTRIES_PAGE, STATUS_REPORT, WAITED = 69, 70, 71, 72, 73
SUBSCRIBED, STREAM_EVENT, ROWS, RESTORED = 74, 75, 76, 78

FLOAT, INT, BOOL, NONE, STR, BIG_INT = range(6)
NO_UPDATE = -(1 << 63)
_U64 = (1 << 64) - 1

Scalar = float | int | bool | str | None


@dataclass(frozen=True)
class Frame:
    type: int
    request: int
    payload: bytes
    #: How many descriptors came with its first byte.
    descriptors: int = 0

    def json(self) -> dict[str, Any]:
        try:
            message = json.loads(self.payload)
        except ValueError as error:
            raise ProtocolError(f"the JSON of frame type {self.type} cannot be decoded") from error
        if not isinstance(message, dict):
            raise ProtocolError(f"frame type {self.type} does not hold a JSON object")
        return message


def pack(type_: int, payload: bytes = b"", request: int = 0, fds: int = 0) -> bytes:
    if len(payload) > PAYLOAD_BYTES:
        raise UnsupportedValue(f"a message has {len(payload)} bytes, and at most {PAYLOAD_BYTES} can be sent")
    return HEADER.pack(MAGIC, VERSION, type_, request, len(payload), fds, 0) + payload


def pack_json(type_: int, message: dict[str, Any], request: int = 0) -> bytes:
    return pack(type_, json.dumps(message, ensure_ascii=False).encode(), request)


def check_welcome(welcome: dict[str, Any]) -> None:
    """
    Raises:
        ProtocolError: the daemon has chosen a version that was not offered.
    """
    if (version := welcome.get("version")) not in VERSIONS:
        raise ProtocolError(
            f"{welcome.get('daemon')} speaks version {version} of the protocol, and this library {VERSIONS[-1]}; "
            f"{OTHER_VERSION}"
        )


def wrong_header(kind: str, version: int, length: int) -> ProtocolError:
    """Words for a header that breaks a rule: `header`, `version` or `length`."""
    if kind == "version":
        return ProtocolError(
            f"the daemon frames its messages in version {version}, and this library in {VERSION}; {OTHER_VERSION}"
        )
    if kind == "length":
        return ProtocolError(f"the daemon sends a payload of {length} bytes, and at most {PAYLOAD_BYTES} are possible")
    return ProtocolError(
        "what listens there does not speak the noether-writer protocol: NOETHER_WRITER_SOCKET names the socket of "
        "something else"
    )


class FrameDecoder:
    """Cuts a byte stream into frames. It gives the same frames if it is fed one byte at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        self._buffer += data
        frames: list[Frame] = []
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            magic, version, type_, request, length, fds, reserved = HEADER.unpack_from(self._buffer, start)
            # guard: client-checks-headers (never)
            if magic != MAGIC or reserved != 0 or fds > (type_ == RESTORED):
                raise wrong_header("header", version, length)
            if version != VERSION:  # guard: client-checks-version (never)
                raise wrong_header("version", version, length)
            if length > PAYLOAD_BYTES:  # guard: client-checks-length (never)
                raise wrong_header("length", version, length)
            end = start + HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append(Frame(type_, request, bytes(self._buffer[start + HEADER.size : end]), fds))
            start = end
        del self._buffer[:start]
        return frames


def scalar(value: object) -> float | int | bool | str | bytes | None:
    """A Python value as its plain type; an integer of more than 64 bits as bytes (two's complement, little-endian).

    Raises:
        UnsupportedValue.
    """
    if value is None or isinstance(value, bool):  # guard: bool-is-no-int (never: isinstance(value, bool))
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        number = int(value)
        if -(1 << 63) <= number < 1 << 63:  # guard: huge-integers (always)
            return number
        tail = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        if len(tail) > 255:
            raise UnsupportedValue("an integer of more than 255 bytes cannot be logged")
        return tail
    if isinstance(value, str):
        text = str.__str__(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UnsupportedValue("a text with half of a surrogate pair cannot be logged") from None
        return text
    raise UnsupportedValue(
        f"{kind_of(value)} is not a scalar: log a float, int, bool, str or None "
        "(tensors and numpy values of one element are converted)"
    )


def kind_of(value: object) -> str:
    """In words, for errors."""
    noun = type(value).__name__
    return "None" if value is None else f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def shown(value: object, as_text: Callable[[object], str] = repr) -> str:
    """Whatever somebody has handed in, for errors: short, also where it has no text (as an integer of more than 4,300
    digits)."""
    try:
        text = as_text(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def check_key(key: Any) -> None:
    """
    Raises:
        UnsupportedValue: it cannot be a key of a log.
    """
    if not isinstance(key, str):
        raise UnsupportedValue(f"the key {shown(key)} is {kind_of(key)}: a key must be a text")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise UnsupportedValue(f"the key {shown(key)} holds half of a surrogate pair") from None
    if not 0 < size <= KEY_BYTES:  # guard: client-key-length (never)
        raise UnsupportedValue(f"the key {key[:40]!r} has {size} bytes; a key must have 1 to {KEY_BYTES}")
    if "\0" in key:  # guard: client-key-nul (never)
        raise UnsupportedValue(f"the key {shown(key)} holds a NUL")


def untag_scalar(tag: int, bits: int, tail: bytes) -> Scalar:
    if tag == FLOAT:
        return float(struct.unpack("<d", bits.to_bytes(8, "little"))[0])
    if tag == INT:
        return bits - (1 << 64) if bits >> 63 else bits
    if tag == BOOL:
        return bool(bits)
    if tag == STR:
        return tail.decode()
    if tag == BIG_INT:
        return int.from_bytes(tail, "little", signed=True)
    return None


def pack_save(sequence: int, storage_lengths: list[int], message: dict[str, Any]) -> bytes:
    """The payload of a `save`; `message` is its JSON."""
    text = json.dumps(message, ensure_ascii=False).encode()
    head = struct.pack("<QII", sequence, len(storage_lengths), len(text))
    return head + struct.pack(f"<{len(storage_lengths)}Q", *storage_lengths) + text


def unpack_log_ack(payload: bytes) -> tuple[int, int, int | None]:
    """(sequence, update, the last update that survives power loss)."""
    sequence, update, durable = struct.unpack("<Qqq", payload)
    return sequence, update, None if durable == NO_UPDATE else durable


def unpack_values_page(payload: bytes) -> tuple[int, list[int], list[Scalar]]:
    """(total number of values, updates, values) of a `values_page`."""
    total, count, _ = struct.unpack_from("<QII", payload)
    updates = list(struct.unpack_from(f"<{count}q", payload, 16))
    values, _end = _unpack_scalars(payload, 16 + 8 * count, count, 0)
    return total, updates, values


def _unpack_scalars(payload: bytes, at: int, count: int, gap: int) -> tuple[list[Scalar], int]:
    """Values, tags (`gap` bytes after the values) and their tail; and where they end."""
    bits = struct.unpack_from(f"<{count}Q", payload, at)
    tags = payload[at + 8 * count + gap : at + 9 * count + gap]
    end = at + 9 * count + gap
    values: list[Scalar] = []
    for tag, value in zip(tags, bits, strict=True):
        tail = b""
        if tag in (STR, BIG_INT):
            tail = payload[end : end + value]
            end += value
        values.append(untag_scalar(tag, value, tail))
    return values, end


def unpack_entries_page(payload: bytes) -> tuple[int, list[tuple[int, dict[str, Scalar]]]]:
    """(total number of rows, [(update, {key: value})]) of an `entries_page`."""
    total, rows = unpack_rows(payload)
    return total, [(update, values) for update, _, values in rows]


def unpack_rows(payload: bytes) -> tuple[int, list[tuple[int, float, dict[str, Scalar]]]]:
    """(total number of rows, [(update, wall time, s since 1970, {key: value})]) of `entries_page` and `rows`."""
    total, rows, key_count = struct.unpack_from("<QII", payload)
    at = 16
    keys: dict[int, str] = {}
    for _ in range(key_count):
        id_, length = struct.unpack_from("<IH", payload, at)
        keys[id_] = payload[at + 6 : at + 6 + length].decode()
        at += 6 + length
    entries = []
    for _ in range(rows):
        _, update, wall_time, count, _ = struct.unpack_from("<QqdII", payload, at)
        at += 32
        ids = struct.unpack_from(f"<{count}I", payload, at + 8 * count)
        values, at = _unpack_scalars(payload, at, count, 4 * count)
        entries.append((update, wall_time, {keys[i]: v for i, v in zip(ids, values, strict=True)}))
    return total, entries
