"""The Mixtral decoder as it is trained: one grouped pass per expert instead of a loop over tokens.

The mathematics is that of `transformers.MixtralForCausalLM` (export.py writes its layout and
evaluation.py reads the result back through it); only the order of the work differs.

Shape legend: B sequences, T tokens per sequence, N = B*T, H hidden, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .recipe import Architecture
from .routing import Routing, route

_INIT_STD = 0.02


class Decoder(nn.Module):
    """Token ids [B, T] to logits [B, T, V], with the routing of every layer beside them."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.embed_tokens = nn.Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(Layer(arch) for _ in range(arch.num_hidden_layers))
        self.norm = nn.RMSNorm(arch.hidden_size, eps=arch.rms_norm_eps)
        self.lm_head = nn.Linear(arch.hidden_size, arch.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # Projections into the residual stream start smaller (GPT-2, section 2.3).
                writes_residual = name.endswith(("o_proj.weight", "down_proj"))
                depth = math.sqrt(2 * arch.num_hidden_layers) if writes_residual else 1.0
                nn.init.normal_(parameter, std=_INIT_STD / depth)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, list[Routing]]:
        hidden_states = self.embed_tokens(token_ids)
        cos, sin = rotary_table(self.arch, token_ids.shape[1])
        routings = []
        for layer in self.layers:
            hidden_states, routing = layer(hidden_states, cos, sin)
            routings.append(routing)
        return self.lm_head(self.norm(hidden_states)), routings


class Layer(nn.Module):
    """Pre-norm attention and pre-norm experts, each added to the residual stream."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(arch.hidden_size, eps=arch.rms_norm_eps)
        self.self_attn = Attention(arch)
        self.post_attention_layernorm = nn.RMSNorm(arch.hidden_size, eps=arch.rms_norm_eps)
        self.experts = Experts(arch)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Routing]:
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states), cos, sin
        )
        expert_output, routing = self.experts(self.post_attention_layernorm(hidden_states))
        return hidden_states + expert_output, routing


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.num_heads = arch.num_attention_heads
        self.num_kv_heads = arch.num_key_value_heads
        self.head_dim = arch.hidden_size // arch.num_attention_heads
        self.q_proj = nn.Linear(arch.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(arch.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(arch.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, arch.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch, length, self.num_heads, self.head_dim)
        key = self.k_proj(hidden_states).view(batch, length, self.num_kv_heads, self.head_dim)
        value = self.v_proj(hidden_states).view(batch, length, self.num_kv_heads, self.head_dim)
        context = functional.scaled_dot_product_attention(
            rotate(query, cos, sin).transpose(1, 2),
            rotate(key, cos, sin).transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
            enable_gqa=True,
        )
        output: Tensor = self.o_proj(context.transpose(1, 2).reshape(batch, length, -1))
        return output


class Experts(nn.Module):
    """Rows sorted by expert, one dense feed-forward per expert, rows summed back by token."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        hidden, inner, num_experts = (
            arch.hidden_size,
            arch.intermediate_size,
            arch.num_local_experts,
        )
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.gate_up_proj = nn.ParameterList(
            nn.Parameter(torch.empty(2 * inner, hidden)) for _ in range(num_experts)
        )
        self.down_proj = nn.ParameterList(
            nn.Parameter(torch.empty(hidden, inner)) for _ in range(num_experts)
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Routing]:
        """Hidden states [B, T, H] to the experts' weighted sum, in float32."""
        tokens = hidden_states.flatten(0, 1)
        routing = route(self.gate(tokens), self.arch.num_experts_per_tok)
        order = routing.topk_ids.flatten().argsort(stable=True)
        token_of_row = order // self.arch.num_experts_per_tok
        rows = tokens.index_select(0, token_of_row)
        outputs = []
        for expert, expert_rows in enumerate(torch.split(rows, routing.expert_load().tolist())):
            gate, up = functional.linear(expert_rows, self.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append(functional.linear(functional.silu(gate) * up, self.down_proj[expert]))
        weights = routing.topk_weights.flatten().index_select(0, order).unsqueeze(-1)
        combined = torch.zeros_like(tokens, dtype=torch.float32)
        combined = combined.index_add(0, token_of_row, torch.cat(outputs).float() * weights)
        return combined.view_as(hidden_states), routing


def rotary_table(arch: Architecture, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, 1, head_dim] of the half-rotation form of RoPE (arXiv:2104.09864)."""
    head_dim = arch.hidden_size // arch.num_attention_heads
    frequency = arch.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
    return angle.cos(), angle.sin()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotation to [B, T, heads, head_dim] in float32, keeping the dtype of `heads`."""
    wide = heads.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(heads.dtype)
