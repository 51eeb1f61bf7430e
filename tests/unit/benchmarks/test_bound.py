from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bound import Ceilings, decode_bound, prefill_bound, step_cost
from benchmarks.random_checkpoint import RandomShape, write_random_checkpoint
from services.core.model_config import ModelConfig, load_model_config

SHAPE = RandomShape(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[ModelConfig, int]:
    """The model's shape, and the bytes of its weights."""
    weight_bytes = write_random_checkpoint(tmp_path / "model", SHAPE)
    return load_model_config(tmp_path / "model"), weight_bytes


def test_a_large_batch_reads_every_matrix_but_the_embeddings(
    checkpoint: tuple[ModelConfig, int],
) -> None:
    config, weight_bytes = checkpoint
    norms = 2 * config.hidden_size * (2 * config.num_hidden_layers + 1)
    embeddings = 2 * config.hidden_size * config.vocab_size

    cost = step_cost(config, num_rows=1000, context=0)

    assert cost.read_bytes == pytest.approx(weight_bytes - norms - embeddings)


def test_one_row_reads_and_computes_two_experts_of_a_layer(
    checkpoint: tuple[ModelConfig, int],
) -> None:
    config, _ = checkpoint
    cost = step_cost(config, num_rows=1, context=0)

    hidden, kv_size = 64, 32
    layer = 2 * hidden * hidden + 2 * hidden * kv_size + hidden * 8 + 2 * 3 * hidden * 96
    weights = 3 * layer + 128 * hidden
    assert cost.read_bytes == pytest.approx(2 * weights)
    assert cost.flop == pytest.approx(2 * weights)


def test_each_sequence_reads_its_own_context(checkpoint: tuple[ModelConfig, int]) -> None:
    config, _ = checkpoint
    short, long = (step_cost(config, num_rows=4, context=context) for context in (0, 100))

    assert long.read_bytes - short.read_bytes == 4 * 100 * config.kv_bytes_per_token(2)


def test_the_slower_of_memory_and_arithmetic_binds(checkpoint: tuple[ModelConfig, int]) -> None:
    config, _ = checkpoint
    cost = step_cost(config, num_rows=8, context=10)
    slow_memory = Ceilings(read_bytes_per_s=1.0, flop_per_s=1e30)
    slow_cores = Ceilings(read_bytes_per_s=1e30, flop_per_s=1.0)

    assert decode_bound(config, slow_memory, batch=8, context=10) == 8 / cost.read_bytes
    assert decode_bound(config, slow_cores, batch=8, context=10) == 8 / cost.flop
    assert prefill_bound(config, slow_cores, num_tokens=512) > 1 / cost.flop
