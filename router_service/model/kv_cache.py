"""The paged KV cache: one tensor, cut into blocks of `block_size` tokens (Kwon et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from services.core.errors import ConfigurationError
from services.core.model_config import ModelConfig


class KVCache:
    """Keys and values of all layers: [layers, 2, num_blocks, block_size, kv_heads, head_dim].

    A slot is one token's place, block_id * block_size + offset. Which sequence owns a block is
    the block manager's business; readers touch only slots that their own sequence has written,
    so what an earlier owner left in a block (even NaN) reaches nobody.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.layer_token_bytes = 2 * self.num_kv_heads * self.head_dim * dtype.itemsize
        shape = (config.num_hidden_layers, 2, num_blocks, block_size)
        self.tensor = torch.zeros(
            (*shape, self.num_kv_heads, self.head_dim), dtype=dtype, device=device
        )
        by_slot = self.tensor.flatten(2, 3)
        self._key_slots = [layer[0] for layer in by_slot]
        self._value_slots = [layer[1] for layer in by_slot]
        self._head_rows = list(by_slot.flatten(2, 3))

    @staticmethod
    def num_blocks_for(
        config: ModelConfig, kv_cache_bytes: int, block_size: int, dtype: torch.dtype
    ) -> int:
        """How many blocks fit. Raises `ConfigurationError` if not even one does."""
        block_bytes = config.kv_bytes_per_token(dtype.itemsize) * block_size
        num_blocks = kv_cache_bytes // block_bytes
        if num_blocks < 1:
            raise ConfigurationError(
                f"kv_cache_bytes={kv_cache_bytes} holds no block of {block_size} tokens, which "
                f"takes {block_bytes} bytes for this model; give at least that",
                setting="kv_cache_bytes",
            )
        return num_blocks

    def write(self, layer: int, slot_mapping: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, kv_heads, head_dim] at slots int64 [T]."""
        self._key_slots[layer].index_copy_(0, slot_mapping, keys)
        self._value_slots[layer].index_copy_(0, slot_mapping, values)

    def by_slot(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer where they lie, each [slots, kv_heads, head_dim]."""
        return self._key_slots[layer], self._value_slots[layer]

    def head_rows(self, slots: Tensor) -> Tensor:
        """Indices for `gather`: int64 [B, L] slots -> [B * kv_heads * L], heads before tokens."""
        heads = torch.arange(self.num_kv_heads, device=slots.device)[:, None]
        return (slots[:, None, :] * self.num_kv_heads + heads).flatten()

    def gather(self, layer: int, head_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of keys and of values [len(head_rows), head_dim], in one read of the cache."""
        keys, values = self._head_rows[layer].index_select(1, head_rows)
        return keys, values

    def export_block(self, block_id: int) -> Tensor:
        """A CPU copy of one block: [layers, 2, block_size, kv_heads, head_dim], contiguous."""
        block = self.tensor[:, :, block_id]
        return block.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def import_block(self, block_id: int, block: Tensor) -> None:
        """Write back what `export_block` gave, here or in another cache of the same layout."""
        target = self.tensor[:, :, block_id]
        if block.shape != target.shape or block.dtype != target.dtype:
            raise ValueError(
                f"a block is {tuple(target.shape)} {target.dtype}, "
                f"got {tuple(block.shape)} {block.dtype}"
            )
        target.copy_(block)
