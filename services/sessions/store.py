"""Where a session's KV blocks outlive their shard: the contract, and what is stored.

A block is the KV of `block_size` tokens over all layers. Its hash chains the hashes of the tokens
before it, salted by tenant, so the same hash means the same bytes and nobody finds another
tenant's. The store is never needed for correctness: whatever it does not give is recomputed.

Blocks of sessions and checkpoints of running sequences are kept apart, each with a life of its
own: the same block may be stored as both, and a checkpoint that goes takes nothing from a session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from services.core.generation import SessionInfo

RefusalReason = Literal["foreign", "version", "torn", "tampered"]
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """What the bytes of a block mean. Blocks of another layout are refused.

    `model_fingerprint` (8 to 32 bytes) identifies the weights. A payload is the contiguous tensor
    [num_layers, 2 (K, V), block_size, num_kv_heads, head_dim] of `dtype`.
    """

    model_fingerprint: bytes
    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    first_layer: int = 0

    def __post_init__(self) -> None:
        if not 8 <= len(self.model_fingerprint) <= 32:
            raise ValueError(f"fingerprint has {len(self.model_fingerprint)} bytes, not 8 to 32")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(DTYPE_BYTES)}")

    @property
    def payload_bytes(self) -> int:
        elements = 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRef:
    """A session belongs to one tenant; two tenants may use the same `session_id`."""

    tenant: str
    session_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlock:
    """One block on its way to the store. `hash` has 8 to 32 bytes, `payload` the layout's size."""

    hash: bytes
    payload: bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPrefix:
    """Of a prefix: `num_stored` leading blocks are stored for sessions and need not be written for
    one; `num_restorable` leading ones, never fewer, can be fetched, some from checkpoints."""

    num_stored: int
    num_restorable: int


class SessionStore(Protocol):
    """Keeps blocks by hash, and per session which blocks it used.

    A store serves one event loop and one layout. Every method may raise `UnavailableError` within
    a bounded time; the caller then goes on as if nothing were stored.
    """

    async def put(
        self,
        session: SessionRef,
        blocks: Sequence[StoredBlock],
        *,
        num_tokens: int,
        ttl_s: float,
    ) -> None:
        """Store blocks as part of a session that is now `num_tokens` long.

        What is stored under a block's hash is replaced: it may be a damaged value that nobody has
        read yet. Callers leave out what they know to be sound. The session then lives `ttl_s` from
        now, and so do the blocks it used earlier; none lives shorter than before. Payloads are
        read until this returns.
        """
        ...

    async def touch(
        self, session: SessionRef, hashes: Sequence[bytes], *, num_tokens: int, ttl_s: float
    ) -> None:
        """As `put`, for blocks that are stored already (found by prefix, or fetched).

        Hashes that are not stored are recorded as the session's all the same.
        """
        ...

    async def put_checkpoint(self, blocks: Sequence[StoredBlock], *, ttl_s: float) -> None:
        """Store blocks as checkpoints for `ttl_s`. One that is there stays, and lives at least
        so long from now."""
        ...

    async def forget_checkpoint(self, hashes: Sequence[bytes]) -> None:
        """Delete checkpoints. Blocks of sessions stay, whatever their hashes."""
        ...

    async def count_prefix(self, hashes: Sequence[bytes]) -> StoredPrefix:
        """What of a prefix is there. A hint: blocks can be evicted before they are read."""
        ...

    async def fetch(self, hashes: Sequence[bytes]) -> list[memoryview | None]:
        """Verified payloads (read-only), one entry per hash; all None from the first one that is
        absent or was refused. Refusals are counted and deleted, never raised.

        A checkpoint stands in for a session's block that is absent, and replaces one that was
        refused.
        """
        ...

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        """Counts only blocks that are still stored. None when unknown or expired."""
        ...

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        """Delete a session and every block it used. False if there was none.

        A block that another session of the tenant used too is gone for both; the other one
        recomputes it. Checkpoints of requests without a session stay as long as these run.
        """
        ...

    def refusals(self) -> dict[RefusalReason, int]:
        """Blocks refused since start, by reason."""
        ...

    async def close(self) -> None: ...
