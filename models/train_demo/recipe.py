"""Every number that decides what the demo model becomes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shape of the network, in the field names of a Mixtral `config.json`."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the network is trained; the defaults make `models/demo`."""

    seed: int = 20240108
    num_steps: int = 3600
    context_length: int = 256
    batch_size: int = 8
    peak_learning_rate: float = 2e-3
    final_learning_rate: float = 5e-5
    num_warmup_steps: int = 100
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    max_gradient_norm: float = 1.0
    load_balancing_coefficient: float = 0.02
    heldout_fraction: float = 0.05
    num_threads: int = 2
