"""Which experts each token of a choice went to, and how often neighbours share them. Pure.

The analysis of consecutive tokens is that of Jiang et al. 2024, Mixtral of Experts, section 5. A
token's choices are the bytes of uint8 [layers, k], the gate's favourite first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from services.core.errors import UnavailableError
from services.core.model_config import ModelConfig
from services.gateway.logprobs import token_name
from services.gateway.token_bytes import TokenBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """How many gates a model has, and what each chooses from."""

    num_layers: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, config: ModelConfig) -> Gates:
        return cls(
            num_layers=config.num_hidden_layers,
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
        )

    @property
    def token_bytes(self) -> int:
        return self.num_layers * self.top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRepeats:
    """Of the pairs of consecutive tokens, the share that has the same first choice, and the share
    that has any choice in common; None where there is no pair."""

    layer: int
    first: float | None
    any: float | None


def count_repeats(choices: bytes, gates: Gates) -> list[LayerRepeats]:
    """Layer by layer, over `choices` of consecutive tokens."""
    num_pairs = len(choices) // gates.token_bytes - 1
    if num_pairs < 1:
        return [
            LayerRepeats(layer=layer, first=None, any=None) for layer in range(gates.num_layers)
        ]
    repeats: list[LayerRepeats] = []
    for layer in range(gates.num_layers):
        columns = [
            choices[layer * gates.top_k + place :: gates.token_bytes]
            for place in range(gates.top_k)
        ]
        favourites = columns[0]
        sets = [frozenset(chosen) for chosen in zip(*columns, strict=True)]
        num_same = sum(map(int.__eq__, favourites, favourites[1:]))
        num_disjoint = sum(map(frozenset.isdisjoint, sets, sets[1:]))
        repeats.append(
            LayerRepeats(layer=layer, first=num_same / num_pairs, any=1 - num_disjoint / num_pairs)
        )
    return repeats


def random_first(gates: Gates) -> float:
    """What `first` would be if every set of k experts were equally likely."""
    return 1 / gates.num_experts


def random_any(gates: Gates) -> float:
    """What `any` would be: 1 - C(E - k, k) / C(E, k); 46 % for two of eight."""
    disjoint = comb(gates.num_experts - gates.top_k, gates.top_k)
    return 1 - disjoint / comb(gates.num_experts, gates.top_k)


def expert_choices_json(
    choices: bytes,
    gates: Gates,
    *,
    prompt_token_ids: Sequence[int],
    completion_token_ids: Sequence[int],
    token_bytes: TokenBytes | None,
) -> dict[str, Any]:
    """`expert_choices` of an answer's choice. `choices` are of the leading tokens of prompt and
    completion: all but the last, where that was not run through the model; it gets None. Raises
    `UnavailableError` when more are missing."""
    num_prompt = len(prompt_token_ids)
    needed = num_prompt + max(0, len(completion_token_ids) - 1)
    if len(choices) < needed * gates.token_bytes:
        raise UnavailableError(
            f"the attention shard told the experts of {len(choices) // gates.token_bytes} tokens "
            f"where {needed} were computed; it may be of a version that cannot tell them"
        )
    num_tokens = num_prompt + len(completion_token_ids)
    choices = choices[: num_tokens * gates.token_bytes]
    told: list[list[list[int]] | None] = [*_tokens(choices, gates)]
    told += [None] * (num_tokens - len(told))
    return {
        "num_layers": gates.num_layers,
        "top_k": gates.top_k,
        "prompt": {
            "tokens": _names(prompt_token_ids, token_bytes),
            "experts": told[:num_prompt],
        },
        "completion": {
            "tokens": _names(completion_token_ids, token_bytes),
            "experts": told[num_prompt:],
        },
        "repeats": [
            {"layer": repeats.layer, "first": repeats.first, "any": repeats.any}
            for repeats in count_repeats(choices, gates)
        ],
        "random_first": random_first(gates),
        "random_any": random_any(gates),
    }


def _tokens(choices: bytes, gates: Gates) -> Iterator[list[list[int]]]:
    """[layers][k] of each token."""
    for first in range(0, len(choices), gates.token_bytes):
        token = list(choices[first : first + gates.token_bytes])
        yield [token[at : at + gates.top_k] for at in range(0, gates.token_bytes, gates.top_k)]


def _names(token_ids: Sequence[int], token_bytes: TokenBytes | None) -> list[str]:
    return [token_name(token_id, token_bytes, "bytes:") for token_id in token_ids]
