"""KV blocks as bytes: out of the cache for the session store, and back in."""

from __future__ import annotations

from typing import Protocol

import torch

from router_service.scheduling.sequence import Payload
from services.core.tensor_codec import tensor_from_buffer, tensor_to_bytes, torch_dtype
from services.sessions.store import BlockLayout


class BlockStorage(Protocol):
    """The KV cache as far as whole blocks are concerned.

    A block is [layers, 2, block_size, kv_heads, head_dim], contiguous, on the CPU.
    """

    def export_block(self, block_id: int) -> torch.Tensor: ...

    def import_block(self, block_id: int, block: torch.Tensor) -> None: ...


class BlockTransfer:
    """Copies blocks between a KV cache and payloads of one layout."""

    def __init__(self, kv_cache: BlockStorage, layout: BlockLayout) -> None:
        self._kv_cache = kv_cache
        self._dtype = torch_dtype(layout.dtype)
        self._shape = (
            layout.num_layers,
            2,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
        )

    def import_block(self, block_id: int, payload: Payload) -> None:
        """Raises `ValueError` when the payload has another size than the layout says."""
        block = tensor_from_buffer(payload, self._dtype, self._shape)
        self._kv_cache.import_block(block_id, block)

    def export_block(self, block_id: int) -> memoryview | None:
        """A copy of the block's bytes; None when it holds NaN or infinity, which nobody wants."""
        block = self._kv_cache.export_block(block_id)
        # A sum is not finite if a term is not, and takes a tenth of the time of looking at each.
        if not bool(block.sum(dtype=torch.float32).isfinite()):
            return None
        return tensor_to_bytes(block)
