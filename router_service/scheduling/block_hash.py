"""Names of KV blocks: a chain of hashes, so that equal names mean equal tokens from the start on.

A block's KV depends on every token before it, so its hash covers its parent's hash and its own
tokens. The root is salted by tenant (nobody finds another's blocks), by the model's fingerprint
(other weights, other KV) and by the block size.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

HASH_BYTES: Final = 16


def root_hash(*, tenant: str, model_fingerprint: bytes, block_size: int) -> bytes:
    """The parent of every first block. Fields are length-prefixed, so no two inputs collide."""
    digest = blake2b(digest_size=HASH_BYTES, person=b"expertfleet-kv-1")
    for field in (model_fingerprint, block_size.to_bytes(8, "little"), tenant.encode()):
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.digest()


def block_hash(parent: bytes, token_ids: bytes | memoryview) -> bytes:
    """blake2b-128 of the parent's hash and the block's token ids (int64, little-endian)."""
    digest = blake2b(parent, digest_size=HASH_BYTES)
    digest.update(token_ids)
    return digest.digest()
