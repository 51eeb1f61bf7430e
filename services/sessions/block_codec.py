"""A stored block: 128 bytes of header, then the payload.

Little-endian: magic, format version, header size, model fingerprint and block hash (zero-padded to
32 bytes each), first layer and the layer after the last, block_size, KV heads, head_dim, dtype
code, payload size, and the xxh3-128 of everything before it and of the payload. The header's size
keeps the payload aligned for tensors.

The checksum finds what breaks by accident: torn writes, flipped bits, another model's blocks, a
block under a wrong key. It is not a signature: whoever may write to the store could compute it. A
keyed digest would need a secret shared by the shards, which there is no setting for.
"""

from __future__ import annotations

import struct

import xxhash

from services.sessions.store import BlockLayout, RefusalReason

FORMAT_VERSION = 1
HEADER_BYTES = 128

_MAGIC = b"EFKV"
_FIELDS = struct.Struct("<4sHH32s32s5IB3xQ8x")
_CHECKSUM_BYTES = 16
_VERSION = struct.Struct("<4sHH")
_DTYPE_CODES = {"bfloat16": 1, "float16": 2, "float32": 3}

assert _FIELDS.size + _CHECKSUM_BYTES == HEADER_BYTES


class BlockRefusedError(ValueError):
    """A stored value is not the block asked for. `reason` is the class to count it under."""

    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.reason: RefusalReason = reason


def encode_block(layout: BlockLayout, block_hash: bytes, payload: bytes | memoryview) -> bytes:
    """Header and payload as one value. Raises `ValueError` on a payload of another size."""
    view = memoryview(payload).cast("B")
    if view.nbytes != layout.payload_bytes:
        raise ValueError(f"payload has {view.nbytes} bytes, the layout {layout.payload_bytes}")
    fields = _pack_fields(layout, block_hash)
    return b"".join((fields, _checksum(fields, view), view))


def decode_block(layout: BlockLayout, block_hash: bytes, value: bytes | memoryview) -> memoryview:
    """The payload of `value`, without a copy. Raises `BlockRefusedError`, and nothing else.

    The checksum comes before the fields it covers, so that "foreign" is a whole block of
    something else and a damaged header is "tampered".
    """
    view = memoryview(value).toreadonly()
    if view.nbytes < HEADER_BYTES:
        if view[:4] == _MAGIC:
            raise BlockRefusedError("torn", f"{view.nbytes} bytes are shorter than a header")
        raise BlockRefusedError("foreign", "not a KV block")
    magic, version, header_bytes = _VERSION.unpack_from(view)
    if magic != _MAGIC:
        raise BlockRefusedError("foreign", "not a KV block")
    if version != FORMAT_VERSION or header_bytes != HEADER_BYTES:
        raise BlockRefusedError("version", f"format {version}, this reads {FORMAT_VERSION}")
    fields, payload = view[: _FIELDS.size], view[HEADER_BYTES:]
    payload_bytes: int = _FIELDS.unpack(fields)[-1]
    if payload.nbytes != payload_bytes:
        raise BlockRefusedError("torn", f"payload has {payload.nbytes} of {payload_bytes} bytes")
    if view[_FIELDS.size : HEADER_BYTES] != _checksum(fields, payload):
        raise BlockRefusedError("tampered", "the checksum does not match")
    if fields != _pack_fields(layout, block_hash):
        _refuse_other_block(layout, fields)
    return payload


def _refuse_other_block(layout: BlockLayout, fields: memoryview) -> None:
    """Raise for a sound block that is not the one asked for."""
    _, _, _, fingerprint, found_hash, *_ = _FIELDS.unpack(fields)
    if fields == _pack_fields(layout, found_hash):
        raise BlockRefusedError("tampered", "another block lies under this block's key")
    if fingerprint != layout.model_fingerprint.ljust(32, b"\0"):
        raise BlockRefusedError("foreign", "the block is of another model")
    raise BlockRefusedError("foreign", "the block is of another layout")


def _pack_fields(layout: BlockLayout, block_hash: bytes) -> bytes:
    if not 8 <= len(block_hash) <= 32:
        raise ValueError(f"block hash has {len(block_hash)} bytes, not 8 to 32")
    return _FIELDS.pack(
        _MAGIC,
        FORMAT_VERSION,
        HEADER_BYTES,
        layout.model_fingerprint,
        block_hash,
        layout.first_layer,
        layout.first_layer + layout.num_layers,
        layout.block_size,
        layout.num_kv_heads,
        layout.head_dim,
        _DTYPE_CODES[layout.dtype],
        layout.payload_bytes,
    )


def _checksum(fields: bytes | memoryview, payload: memoryview) -> bytes:
    digest = xxhash.xxh3_128(fields)
    digest.update(payload)
    return bytes(digest.digest())
