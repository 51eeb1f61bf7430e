"""One completion on its way through the engine: its tokens, its blocks, how far it is."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as TokenSequence
from enum import Enum
from hashlib import blake2b

from router_service.scheduling.block_hash import block_hash
from router_service.scheduling.choice_record import ChoiceRecord
from router_service.scheduling.rank import rank
from services.core.generation import SamplingParams

Payload = bytes | memoryview
"""KV bytes of one block as the session store gives them."""


class SequenceStatus(Enum):
    HELD = "held"
    """Waits for something other than room: its sibling's prefill, or a restore."""
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """State of completion `index` of a request. Mutable; only the scheduler and the engine write.

    `order` is the order of arrival, unique in the engine: the smaller, the older. `rank` says who
    comes first. `seed` is the
    64-bit seed of this completion. `token_ids` is prompt + output; of these, the KV of the first
    `num_computed_tokens` is in the blocks of `block_table`. The first `num_resumed_tokens` of the
    output came with the request, from a shard that was lost. `expert_choices` is there when the
    gate's choices are to be told.
    """

    __slots__ = (
        "block_table",
        "expert_choices",
        "hashes",
        "index",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_restored_tokens",
        "num_resumed_tokens",
        "num_saved_blocks",
        "order",
        "output_token_ids",
        "pending_imports",
        "prompt_token_ids",
        "rank",
        "restored",
        "sampling",
        "seed",
        "status",
        "token_ids",
        "waiting_cost",
        "was_admitted",
    )

    def __init__(
        self,
        *,
        order: int,
        index: int,
        prompt_token_ids: TokenSequence[int],
        sampling: SamplingParams,
        seed: int,
        root: bytes,
        output_token_ids: TokenSequence[int] = (),
        priority: int = 0,
        arrived_at: float = 0.0,
        is_resumed: bool = False,
        expert_choices: ChoiceRecord | None = None,
    ) -> None:
        self.order = order
        self.rank = rank(
            arrived_at=arrived_at, priority=priority, order=order, is_resumed=is_resumed
        )
        self.index = index
        self.prompt_token_ids = prompt_token_ids
        self.num_prompt_tokens = len(prompt_token_ids)
        self.sampling = sampling
        self.seed = seed
        self.token_ids = array("q", (*prompt_token_ids, *output_token_ids))
        self.output_token_ids = list(output_token_ids)
        self.num_resumed_tokens = len(self.output_token_ids)
        self.status = SequenceStatus.HELD
        self.block_table = array("q")
        self.hashes = [root]
        """The root, then the hash of every full block hashed so far."""
        self.num_computed_tokens = 0
        self.num_published_blocks = 0
        self.num_saved_blocks: int | None = None
        """Leading full blocks that the session store has or was given: for sessions where it has
        one, else as checkpoints; None: not known yet."""
        self.num_cached_tokens = 0
        self.num_restored_tokens = 0
        self.num_preemptions = 0
        self.was_admitted = False
        self.restored: Mapping[int, Payload] = {}
        """Fetched payloads by block index, until the sequence is admitted."""
        self.pending_imports: deque[tuple[int, Payload]] = deque()
        """(block_id, payload) that must be imported before tokens are computed."""
        self.waiting_cost = 0
        self.expert_choices = expert_choices

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_decoding(self) -> bool:
        """Whether all that is left to compute is the token drawn last."""
        return (
            bool(self.output_token_ids)
            and self.num_computed_tokens == len(self.token_ids) - 1
            and not self.pending_imports
        )

    def num_reusable_blocks(self, block_size: int) -> int:
        """Full blocks whose KV may come from elsewhere: those before the last token, which is
        always computed as its logits are wanted, and of which no choice of experts is missing."""
        num_tokens = len(self.token_ids) - 1
        if self.expert_choices is not None:
            num_tokens = min(num_tokens, self.expert_choices.num_tokens)
        return num_tokens // block_size

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Hashes of the first `num_blocks` blocks, which must be full."""
        assert num_blocks * block_size <= len(self.token_ids)
        while len(self.hashes) <= num_blocks:
            first = (len(self.hashes) - 1) * block_size
            tokens = self.token_ids[first : first + block_size].tobytes()
            self.hashes.append(block_hash(self.hashes[-1], tokens))
        return self.hashes[1 : num_blocks + 1]


def completion_seed(request_seed: int, index: int) -> int:
    """64-bit seed of completion `index` of a request.

    Completion 0 draws with the request's own seed, so it is the same whatever `n` is; completion
    i > 0 with the first 8 bytes of blake2b(seed, i), both as 8-byte little-endian integers.
    """
    seed = request_seed & (2**64 - 1)
    if index == 0:
        return seed
    data = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
