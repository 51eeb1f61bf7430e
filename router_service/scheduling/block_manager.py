"""Which KV blocks are free, who holds them, and which still hold tokens worth finding again.

Pure bookkeeping. A block is in one of three states:
- *held* by one or more sequences (reference count > 0);
- *cached*: held by nobody, but published under a hash, so a later prompt can take it up again;
- *free*: held by nobody and not published.
A cached block counts as free room: the least recently used one is forgotten when a block is needed
and no free one is left.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockManager:
    """Reference counts, published hashes and the order of eviction of `num_blocks` blocks."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}, must be at least 1")
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that can still be found by their hash."""
        return len(self._cached)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the leading hashes that are published, in order. Nothing is held yet."""
        matched: list[int] = []
        for block_hash in hashes:
            block_id = self._published.get(block_hash)
            if block_id is None:
                break
            matched.append(block_id)
        return matched

    def count_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of the blocks nobody holds: taking them up costs free room."""
        return sum(1 for block_id in block_ids if self._ref_counts[block_id] == 0)

    def touch(self, block_ids: Sequence[int]) -> None:
        """Make cached blocks the last to be forgotten; the first of a chain outlives its tail."""
        for block_id in reversed(block_ids):
            if block_id in self._cached:
                self._cached.move_to_end(block_id)

    def hold(self, block_ids: Iterable[int]) -> None:
        """Take up published blocks once more. They must come from `match`, just before."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self) -> int:
        """A block for writing, held once. Call only when `num_free` is above 0."""
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._forget_hash(block_id)
        self._ref_counts[block_id] = 1
        return block_id

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Let others find a held, full block whose KV has been computed.

        When another block carries the hash already, that one stays and this one is left unnamed.
        """
        assert self._ref_counts[block_id] > 0, f"block {block_id} is published but not held"
        if block_hash in self._published or self._hashes[block_id] is not None:
            return
        self._hashes[block_id] = block_hash
        self._published[block_hash] = block_id

    def unpublish(self, block_ids: Iterable[int]) -> None:
        """Let nobody find these held blocks again; those who hold them keep them."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} is unpublished but not held"
            self._forget_hash(block_id)

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up one hold on each block. Published ones stay findable until they are needed.

        Goes from the tail to the head, so that of one chain the tail is forgotten first: a head
        without its tail is useful, a tail without its head is not.
        """
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is released twice"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                if self._hashes[block_id] is None:
                    self._free.append(block_id)
                else:
                    self._cached[block_id] = None

    def _forget_hash(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            self._hashes[block_id] = None
            del self._published[block_hash]
