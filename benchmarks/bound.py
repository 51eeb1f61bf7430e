"""The least time a decode step can take, from bytes and operations and the machine's ceilings."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.model_config import ModelConfig

WEIGHT_BYTES = KV_BYTES = 2
"""bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """The most this machine was seen to do: bytes read from memory, bfloat16 operations."""

    read_bytes_per_s: float
    flop_per_s: float

    def mean(self, other: Ceilings) -> Ceilings:
        return Ceilings(
            read_bytes_per_s=(self.read_bytes_per_s + other.read_bytes_per_s) / 2,
            flop_per_s=(self.flop_per_s + other.flop_per_s) / 2,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    read_bytes: float
    flop: float

    def least_s(self, ceilings: Ceilings) -> float:
        """Reading and computing overlap at best, so the longer of the two."""
        return max(self.read_bytes / ceilings.read_bytes_per_s, self.flop / ceilings.flop_per_s)


def step_cost(
    config: ModelConfig, *, num_rows: int, context: int, num_logits: int | None = None
) -> StepCost:
    """One pass of `num_rows` tokens that each attend to `context` tokens.

    With H hidden, F intermediate, L layers, V vocabulary, D = heads x head_dim, G = KV heads x
    head_dim, E experts of which k are taken, B rows:

    - weights of a layer outside its experts: 2 H D + 2 H G + H E; of an expert: 3 H F;
    - experts of a layer that B rows reach when the gate is even: E (1 - (1 - k / E)^B);
    - bytes = 2 (L (outside + reached x 3 H F) + V H) + KV read, 4 L G `context` for each sequence;
    - operations = 2 B L (outside + k 3 H F) + 2 `num_logits` V H + 4 B L D `context`.

    A decode step has a sequence for each row and logits for each (`num_logits` None). In a prefill
    the rows are one sequence that wants one row of logits, and `context` is half its length on
    average.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    query_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    num_experts = config.num_local_experts
    outside = 2 * hidden * query_size + 2 * hidden * kv_size + hidden * num_experts
    expert = 3 * hidden * config.intermediate_size
    missed = (1 - config.num_experts_per_tok / num_experts) ** num_rows
    reached = num_experts * (1 - missed)
    head = config.vocab_size * hidden
    num_sequences = num_rows if num_logits is None else num_logits
    kv_read = config.kv_bytes_per_token(KV_BYTES) * context * num_sequences
    return StepCost(
        read_bytes=WEIGHT_BYTES * (layers * (outside + reached * expert) + head) + kv_read,
        flop=2 * num_rows * layers * (outside + config.num_experts_per_tok * expert)
        + 2 * num_sequences * head
        + 4 * num_rows * layers * query_size * context,
    )


def decode_bound(config: ModelConfig, ceilings: Ceilings, *, batch: int, context: int) -> float:
    """Tokens per second of `batch` sequences of about `context` tokens."""
    return batch / step_cost(config, num_rows=batch, context=context).least_s(ceilings)


def prefill_bound(config: ModelConfig, ceilings: Ceilings, *, num_tokens: int) -> float:
    """Prompt tokens per second of one prompt."""
    cost = step_cost(config, num_rows=num_tokens, context=num_tokens // 2, num_logits=1)
    return num_tokens / cost.least_s(ceilings)
