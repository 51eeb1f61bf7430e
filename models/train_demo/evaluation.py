"""Measure the written model on held-out files, read back the way any user of it would."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .ngram import TrigramModel, UnigramModel, trigram_nats, unigram_nats
from .tokenizer import BOS_ID, PAD_ID
from .windows import Tokens, encode_stream

_BATCH_SIZE = 16
_IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Mean next-token loss over the held-out tokens, in two units."""

    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt as the model sees it, and its greedy continuation."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Losses over the same tokens, and each layer's share of held-out tokens per expert."""

    num_tokens: int
    num_bytes: int
    model: Loss
    unigram: Loss
    trigram: Loss
    expert_share: tuple[tuple[float, ...], ...]
    samples: tuple[Sample, ...]


def evaluate(
    folder: Path,
    tokenizer: Tokenizer,
    heldout: Sequence[str],
    train_stream: Tokens,
    context_length: int,
) -> Evaluation:
    """Read the model in `folder` with transformers; compare it with counts of `train_stream`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = [
        window
        for text in heldout
        for window in heldout_windows(encode_stream(tokenizer, [text]), context_length)
    ]
    num_tokens = sum(len(window) - 1 for window in windows)
    num_bytes = sum(len(text.encode()) for text in heldout)
    vocab_size = tokenizer.get_vocab_size()
    unigram, trigram = (
        UnigramModel(train_stream, vocab_size),
        TrigramModel(train_stream, vocab_size),
    )
    model_nats, expert_share = model_loss_and_share(model, windows)

    def loss(nats: float) -> Loss:
        return Loss(nats_per_token=nats / num_tokens, bits_per_byte=nats / math.log(2) / num_bytes)

    return Evaluation(
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        model=loss(model_nats),
        unigram=loss(sum(unigram_nats(unigram, window).sum() for window in windows)),
        trigram=loss(sum(trigram_nats(trigram, window).sum() for window in windows)),
        expert_share=expert_share,
        samples=tuple(greedy_samples(model, folder)),
    )


def heldout_windows(file_tokens: Tokens, context_length: int) -> Iterator[Tokens]:
    """Cut one file (`<s>` first) into windows led by `<s>`; every later token is a target once."""
    targets = file_tokens[1:]
    for start in range(0, len(targets), context_length):
        yield np.concatenate(([BOS_ID], targets[start : start + context_length]))


@torch.inference_mode()
def model_loss_and_share(
    model: PreTrainedModel, windows: Sequence[Tokens]
) -> tuple[float, tuple[tuple[float, ...], ...]]:
    """Summed loss in nats over all targets, and per layer each expert's share of the rows."""
    nats = 0.0
    loads = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts)
    for first in range(0, len(windows), _BATCH_SIZE):
        token_ids, targets = _padded(windows[first : first + _BATCH_SIZE])
        output = model(token_ids, output_router_logits=True)
        nats += functional.cross_entropy(
            output.logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="sum"
        ).item()
        is_real = targets.flatten() != _IGNORED
        for layer, router_logits in enumerate(output.router_logits):
            topk_ids = router_logits[is_real].topk(model.config.num_experts_per_tok).indices
            loads[layer] += torch.bincount(topk_ids.flatten(), minlength=loads.shape[1])
    shares = loads / loads.sum(dim=1, keepdim=True)
    return nats, tuple(tuple(layer) for layer in shares.tolist())


def greedy_samples(model: PreTrainedModel, folder: Path) -> Iterator[Sample]:
    """One plain completion and one chat turn through the template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Return True if the path is a directory."}]
    chat_prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for prompt in (tokenizer.bos_token + "def fibonacci(n):\n", chat_prompt):
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        completion = tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
        yield Sample(prompt=prompt, completion=completion)


def _padded(windows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] of unequal windows; padding comes last, where no token sees it."""
    length = max(len(window) for window in windows) - 1
    token_ids = torch.full((len(windows), length), PAD_ID)
    targets = torch.full((len(windows), length), _IGNORED)
    for row, window in enumerate(windows):
        token_ids[row, : len(window) - 1] = torch.from_numpy(window[:-1])
        targets[row, : len(window) - 1] = torch.from_numpy(window[1:])
    return token_ids, targets
