"""What decides the time of an expert's FFN: reading its weights, or arithmetic on its rows."""

from __future__ import annotations

from services.core.model_config import ModelConfig

ROWS_PER_READ = 16.0
"""Rows whose arithmetic takes about as long as reading an expert's weights from memory."""


def tokens_per_read(config: ModelConfig) -> float:
    """Tokens in a layer that give each expert `ROWS_PER_READ` rows, where the gate is even; of a
    dense model's FFN likewise."""
    return ROWS_PER_READ * max(1, config.num_local_experts) / max(1, config.num_experts_per_tok)
