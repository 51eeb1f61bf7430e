"""Protobuf fields written by hand (https://protobuf.dev/programming-guides/encoding)."""

from __future__ import annotations

from collections.abc import Sequence

_ONE_BYTE = [bytes((value,)) for value in range(256)]


def varint(value: int) -> bytes:
    if value < 0x80:
        return _ONE_BYTE[value]
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def number_field(field: int, value: int) -> bytes:
    """Nothing for 0, as proto3 has it."""
    return _ONE_BYTE[field << 3] + varint(value) if value else b""


def bytes_field(field: int, value: bytes) -> bytes:
    return _ONE_BYTE[field << 3 | 2] + varint(len(value)) + value if value else b""


def packed_field(field: int, values: Sequence[int]) -> bytes:
    try:
        packed = bytes(values)  # a byte each, if all are below 128
        is_short = packed.isascii()
    except ValueError:
        is_short = False
    return bytes_field(field, packed if is_short else b"".join(map(varint, values)))
