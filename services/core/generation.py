"""What a gateway and an attention shard say to each other, whatever carries it (Ray or a call)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

FinishReason = Literal["stop", "length"]

MIN_PRIORITY: Final = -8
MAX_PRIORITY: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Fields keep the OpenAI and Hugging Face names.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `repetition_penalty` is
    the multiplicative one of CTRL (Keskar et al. 2019) over prompt and completion;
    `presence_penalty` and `frequency_penalty` are OpenAI's additive ones over the completion.
    `logprobs` is None (off) or how many alternatives to report beside the chosen token.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumedChoice:
    """What a completion had come to when its shard was lost.

    `token_ids` are the tokens that were emitted; a finished completion needs none, and no more.
    """

    token_ids: tuple[int, ...] = ()
    is_finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One prompt and `n` completions of it.

    `tenant` salts every cache key. `session_id` turns on write-behind of the KV cache with
    `session_ttl_s`. `trace_context` is the W3C carrier (`traceparent`, `tracestate`).

    `resumed`, one for each completion, is given when another shard had the request before and was
    lost. A completion goes on behind its tokens exactly as it would have: with the same
    `sampling`, seed included, which therefore must be given. Only new tokens are emitted.

    The lower the `priority`, the earlier it is served: `MIN_PRIORITY` to `MAX_PRIORITY`.

    With `return_expert_choices` deltas tell which experts the gate chose for each token that was
    run through the model, so cached KV is only used for tokens of which that is known: of a
    resumed completion all but the last token, since the shard before has told them.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    tenant: str = "default"
    session_id: str | None = None
    session_ttl_s: float | None = None
    trace_context: Mapping[str, str] = field(default_factory=dict)
    resumed: tuple[ResumedChoice, ...] = ()
    priority: int = 0
    return_expert_choices: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Natural-log probability of the chosen token, and the most likely alternatives, best first.

    Probabilities are those of the model's raw logits, before temperature and penalties.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDelta:
    """New tokens of completion `index` since the last delta.

    A token that ended the completion (end of sequence or a stop id) is not among `token_ids`; it is
    `stop_token_id`. `num_cached_tokens` counts prompt tokens whose KV was not recomputed, of which
    `num_restored_tokens` came from the session store.

    `expert_choices`, where they were asked for, are uint8 [t, layers, experts a token], the
    gate's favourite first, of the t tokens of prompt and completion that follow those told before.
    A delta with tokens tells all before the last one it brings.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    num_restored_tokens: int = 0
    expert_choices: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """What is stored of one session. Times are Unix seconds."""

    session_id: str
    tenant: str
    num_tokens: int
    num_blocks: int
    stored_bytes: int
    created_at: float
    updated_at: float
    expires_at: float


class ShardClient(Protocol):
    """The gateway's view of the attention shards."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[tuple[GenerationDelta, ...]]:
        """Yield deltas until each of the `n` completions has a finish reason.

        Deltas that pile up while the caller is busy arrive together. Closing the iterator early
        aborts the request and frees its blocks within one step. Raises `ExpertfleetError`;
        `ShardLostError` when the request may be sent again, to another shard.
        """
        ...

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None: ...

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        """Forget a session's stored blocks. False if there was none."""
        ...

    async def check_ready(self) -> None:
        """Return when a shard could serve now; raise `UnavailableError` saying what is missing."""
        ...
