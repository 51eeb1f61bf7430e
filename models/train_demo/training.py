"""The training loop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .network import Decoder
from .recipe import Recipe
from .routing import Routing, load_balancing_loss
from .windows import WindowSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One reporting interval; losses are its means, in nats per token."""

    step: int
    num_steps: int
    loss: float
    balance: float
    max_expert_share: tuple[float, ...]
    learning_rate: float
    tokens_per_s: float
    eta_s: float

    def __str__(self) -> str:
        shares = " ".join(f"{share:.2f}" for share in self.max_expert_share)
        return (
            f"step {self.step:5d}/{self.num_steps}  loss {self.loss:.3f}"
            f"  balance {self.balance:.3f}"
            f"  max share by layer {shares}  lr {self.learning_rate:.1e}"
            f"  {self.tokens_per_s:5.0f} tok/s  ETA {self.eta_s / 60:.1f} min"
        )


def train(
    decoder: Decoder,
    sampler: WindowSampler,
    recipe: Recipe,
    *,
    report: Callable[[Progress], None],
    checkpoint: Callable[[], None],
    report_every: int = 25,
    checkpoint_every: int = 250,
) -> None:
    """Take `recipe.num_steps` AdamW steps in place, reporting and checkpointing on the way."""
    optimizer = torch.optim.AdamW(
        _parameter_groups(decoder, recipe.weight_decay),
        lr=0.0,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        fused=True,
    )
    losses, balances = [], []
    started = interval_started = time.monotonic()
    for step in range(1, recipe.num_steps + 1):
        learning_rate = learning_rate_at(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss, balance, routings = training_loss(decoder, sampler.batch(recipe.batch_size))
        torch.autograd.backward(loss + recipe.load_balancing_coefficient * balance)
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        balances.append(balance.item())
        if step % report_every == 0 or step == recipe.num_steps:
            now = time.monotonic()
            tokens = len(losses) * recipe.batch_size * recipe.context_length
            progress = Progress(
                step=step,
                num_steps=recipe.num_steps,
                loss=sum(losses) / len(losses),
                balance=sum(balances) / len(balances),
                max_expert_share=tuple(r.expert_share().max().item() for r in routings),
                learning_rate=learning_rate,
                tokens_per_s=tokens / (now - interval_started),
                eta_s=(now - started) / step * (recipe.num_steps - step),
            )
            report(progress)
            losses, balances, interval_started = [], [], now
        if step % checkpoint_every == 0:
            checkpoint()


def training_loss(decoder: Decoder, window: Tensor) -> tuple[Tensor, Tensor, list[Routing]]:
    """Next-token loss (nats), load-balancing loss and routings of one batch of windows [B, T+1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, routings = decoder(window[:, :-1])
    loss = functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
    return loss, load_balancing_loss(routings), routings


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warmup, then a cosine from the peak down to the final rate at the last step."""
    if step <= recipe.num_warmup_steps:
        return recipe.peak_learning_rate * step / recipe.num_warmup_steps
    decay_steps = max(1, recipe.num_steps - recipe.num_warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - recipe.num_warmup_steps) / decay_steps))
    return recipe.final_learning_rate + cosine * (
        recipe.peak_learning_rate - recipe.final_learning_rate
    )


def _parameter_groups(decoder: Decoder, weight_decay: float) -> list[dict[str, object]]:
    matrices = [p for p in decoder.parameters() if p.dim() > 1]
    norms = [p for p in decoder.parameters() if p.dim() == 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
