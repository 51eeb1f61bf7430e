"""Which attention shard a request goes to: its session's, else one that has its prefix, else the
least loaded. Pure bookkeeping: no I/O, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b

from services.core.generation import GenerateRequest

CHUNK_TOKENS = 64
RUNNING_COST = 64
"""What a running sequence weighs beside waiting prompt tokens."""
_MAX_CHUNKS = 1 << 16
_SLACK_TOKENS = 1024


class ShardChooser:
    """Remembers what prefixes went where. A prefix is never shared between tenants."""

    def __init__(self) -> None:
        self._shard_of_chunk: OrderedDict[bytes, str] = OrderedDict()
        self._chosen: OrderedDict[str, None] = OrderedDict()
        """Shards, the one that was chosen last at the end."""

    def choose(self, request: GenerateRequest, load: Mapping[str, float]) -> str:
        """One of the shards of `load`, which is in waiting tokens and not empty.

        A session sticks to its shard by rendezvous hashing (Thaler and Ravishankar, 1998), so few
        sessions move when shards come and go. A cached prefix counts as long as its shard is not
        clearly busier than the least loaded one. Of equally loaded shards it is the turn of the one
        that was not chosen for longest.
        """
        if request.session_id is not None:
            return session_shard(request.tenant, request.session_id, list(load))
        turns = {shard: turn for turn, shard in enumerate(self._chosen)}
        least = min(load, key=lambda shard: (load[shard], turns.get(shard, -1)))
        chunks = list(_chunk_hashes(request))
        for chunk in reversed(chunks):
            known = self._shard_of_chunk.get(chunk, "")
            if known in load and load[known] <= 2 * load[least] + _SLACK_TOKENS:
                least = known
                break
        for chunk in chunks:
            self._shard_of_chunk[chunk] = least
            self._shard_of_chunk.move_to_end(chunk)
        while len(self._shard_of_chunk) > _MAX_CHUNKS:
            self._shard_of_chunk.popitem(last=False)
        self._chosen[least] = None
        self._chosen.move_to_end(least)
        while len(self._chosen) > len(load):
            self._chosen.popitem(last=False)
        return least


def session_shard(tenant: str, session_id: str, shards: Sequence[str]) -> str:
    """The shard a session sticks to; `shards` is not empty."""

    def weight(shard: str) -> bytes:
        return blake2b(repr((tenant, session_id, shard)).encode(), digest_size=8).digest()

    return max(shards, key=weight)


def request_cost(request: GenerateRequest) -> int:
    """Prompt tokens to compute before the first token, of all there is to be resumed."""
    resumed = sum(len(choice.token_ids) for choice in request.resumed)
    return len(request.prompt_token_ids) + resumed


def _chunk_hashes(request: GenerateRequest) -> Iterator[bytes]:
    """Of the prompt's leading chunks, each over all tokens until its end."""
    digest = blake2b(repr(request.tenant).encode(), digest_size=16)
    tokens = request.prompt_token_ids
    for start in range(0, len(tokens) - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        digest.update(repr(tokens[start : start + CHUNK_TOKENS]).encode())
        yield digest.digest()
