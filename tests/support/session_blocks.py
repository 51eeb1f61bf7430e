"""Small KV blocks with random payloads, and their chain of hashes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from services.sessions.store import BlockLayout, SessionRef, StoredBlock

LAYOUT = BlockLayout(
    model_fingerprint=bytes(range(16)),
    num_layers=2,
    block_size=4,
    num_kv_heads=2,
    head_dim=8,
    dtype="bfloat16",
)
OTHER_MODEL = replace(LAYOUT, model_fingerprint=LAYOUT.model_fingerprint[:8] + b"other...")
OTHER_SHAPE = replace(LAYOUT, num_layers=4, block_size=2)
"""Another model of the same key prefix, and another layout of the same payload size."""

ALICE = SessionRef(tenant="alice", session_id="s1")


def random_blocks(count: int, layout: BlockLayout = LAYOUT) -> list[StoredBlock]:
    return [
        StoredBlock(hash=os.urandom(16), payload=os.urandom(layout.payload_bytes))
        for _ in range(count)
    ]


def hashes_of(blocks: list[StoredBlock]) -> list[bytes]:
    return [block.hash for block in blocks]


def payloads_of(blocks: list[StoredBlock]) -> list[bytes | None]:
    return [bytes(block.payload) for block in blocks]


def as_bytes(payloads: Sequence[memoryview | None]) -> list[bytes | None]:
    return [None if payload is None else bytes(payload) for payload in payloads]
