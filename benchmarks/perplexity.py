"""What quantised weights cost in quality: `make bench-perplexity`.

    python -m benchmarks.perplexity [--windows 128] [--shape bench-xs]

On the demo model: perplexity of the standard library's files that its training held out, and how
far next-token distributions are from those of float32. On a random model perplexity says nothing
(its text is noise), so only the distance is given, from bfloat16. Writes
docs/performance/quantization.md.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from benchmarks.machine import describe_machine
from benchmarks.random_checkpoint import SHAPES, write_named_checkpoint
from models.train_demo.corpus import read_sources, split, standard_library
from models.train_demo.evaluation import heldout_windows
from models.train_demo.recipe import Recipe
from models.train_demo.windows import encode_stream
from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import StepContext
from router_service.model.batch import ForwardBatch
from router_service.model.decoder import MixtralDecoder
from router_service.model.kv_cache import KVCache
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.kernels.choice import kernels_name, set_num_threads
from services.core.quantization.formats import WeightsSetting

DEMO = Path("models/demo")
_CPU = torch.device("cpu")
_BLOCK_SIZE = 16
_RANDOM_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    name: str
    dtype: torch.dtype = torch.bfloat16
    expert_weights: WeightsSetting = "auto"
    shard_weights: WeightsSetting = "auto"


VARIANTS = (
    Variant(name="float32", dtype=torch.float32),
    Variant(name="bfloat16"),
    Variant(name="int8 experts", expert_weights="int8"),
    Variant(name="int8 experts, attention and head", expert_weights="int8", shard_weights="int8"),
    Variant(name="int4 experts", expert_weights="int4"),
    Variant(
        name="int4 experts, int8 attention and head", expert_weights="int4", shard_weights="int8"
    ),
)


class Model:
    """One variant of a checkpoint, experts in process."""

    def __init__(self, folder: Path, variant: Variant, longest: int) -> None:
        checkpoint = Checkpoint.open(str(folder))
        self._decoder = MixtralDecoder.load(
            checkpoint, dtype=variant.dtype, device=_CPU, shard_weights=variant.shard_weights
        )
        self._experts = LocalExperts.load(
            checkpoint, dtype=variant.dtype, device=_CPU, expert_weights=variant.expert_weights
        )
        self._kv_cache = KVCache(
            checkpoint.config,
            num_blocks=-(-longest // _BLOCK_SIZE),
            block_size=_BLOCK_SIZE,
            dtype=variant.dtype,
            device=_CPU,
        )

    @torch.inference_mode()
    def log_probabilities(self, token_ids: Tensor) -> Tensor:
        """Of every next token: int64 [T] -> float32 [T, V]."""
        logits = asyncio.run(self._logits(token_ids))
        return functional.log_softmax(logits, dim=-1)

    async def _logits(self, token_ids: Tensor) -> Tensor:
        num_tokens = len(token_ids)
        rows = torch.arange(num_tokens)
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=rows,
            slot_mapping=rows,
            query_start=(0, num_tokens),
            context_lens=(num_tokens,),
            block_tables=torch.arange(-(-num_tokens // _BLOCK_SIZE))[None],
            sample_rows=rows,
        )
        return await self._decoder.forward(batch, self._kv_cache, self._experts, StepContext())


@dataclass(slots=True, kw_only=True)
class Score:
    """Sums over all targets."""

    num_targets: int = 0
    nats: float = 0.0
    divergence: float = 0.0
    num_agreeing: int = 0

    def add(self, targets: Tensor, log_probabilities: Tensor, reference: Tensor) -> None:
        self.num_targets += len(targets)
        self.nats += functional.nll_loss(log_probabilities, targets, reduction="sum").item()
        self.divergence += functional.kl_div(
            log_probabilities, reference, reduction="sum", log_target=True
        ).item()
        agreeing = log_probabilities.argmax(-1) == reference.argmax(-1)
        self.num_agreeing += int(agreeing.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.num_targets)

    @property
    def mean_divergence(self) -> float:
        return self.divergence / self.num_targets

    @property
    def agreement(self) -> float:
        return self.num_agreeing / self.num_targets


def score(
    folder: Path, windows: Sequence[Tensor], variants: Sequence[Variant], reference: str
) -> dict[str, Score]:
    """Every variant on every window, int64 [T + 1]; compared with the variant `reference`."""
    longest = max(len(window) for window in windows)
    models = {variant.name: Model(folder, variant, longest) for variant in variants}
    scores = {name: Score() for name in models}
    for window in windows:
        inputs, targets = window[:-1], window[1:]
        found = {name: model.log_probabilities(inputs) for name, model in models.items()}
        for name, log_probabilities in found.items():
            scores[name].add(targets, log_probabilities, found[reference])
    return scores


def demo_windows(max_windows: int) -> list[Tensor]:
    """Held-out text of the demo model, as its model card measures it; evenly chosen windows."""
    recipe = Recipe()
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    heldout = split(read_sources(standard_library()), recipe.heldout_fraction, recipe.seed).heldout
    windows = [
        torch.from_numpy(window)
        for source in heldout
        for window in heldout_windows(
            encode_stream(tokenizer, [source.text]), recipe.context_length
        )
    ]
    return windows[:: max(1, -(-len(windows) // max_windows))]


def random_windows(vocab_size: int, num_windows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (num_windows, _RANDOM_TOKENS + 1)
    return list(torch.randint(vocab_size, size, generator=generator))


def report(
    demo: dict[str, Score], random: dict[str, Score], random_name: str, num_windows: int
) -> Iterator[str]:
    yield "# What quantised weights cost in quality"
    yield ""
    yield "Written by `make bench-perplexity`; [quantization](../quantization.md) explains it."
    yield f"{describe_machine()}; kernels: {kernels_name(torch.bfloat16, _CPU)}."
    yield ""
    num_targets = demo["float32"].num_targets
    yield "## The demo model on text it was not trained on"
    yield ""
    yield f"{num_targets} tokens in {num_windows} windows. Divergence is the mean of KL(float32 ||"
    yield "variant) over next-token distributions; agreement is how often both have the same most"
    yield "likely token."
    yield ""
    yield "| weights | perplexity | to float32 | divergence, nats | agreement |"
    yield "|---|---:|---:|---:|---:|"
    for name, found in demo.items():
        change = found.perplexity / demo["float32"].perplexity - 1
        yield (
            f"| {name} | {found.perplexity:.3f} | {change:+.2%} | "
            f"{found.mean_divergence:.5f} | {found.agreement:.2%} |"
        )
    yield ""
    yield f"## A random model ({random_name}), {random['bfloat16'].num_targets} random tokens"
    yield ""
    yield "Its weights are noise, so perplexity would say nothing, and its most likely token is"
    yield "hardly likelier than others: agreement is lower than on a trained model. From bfloat16:"
    yield ""
    yield "| weights | divergence, nats | agreement |"
    yield "|---|---:|---:|"
    for name, found in random.items():
        yield f"| {name} | {found.mean_divergence:.5f} | {found.agreement:.2%} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what quantised weights cost in quality.")
    parser.add_argument("--windows", type=int, default=128, help="windows of held-out text")
    parser.add_argument("--random-windows", type=int, default=4, help="of random tokens")
    parser.add_argument("--shape", choices=SHAPES, default="bench-xs", help="the random model")
    parser.add_argument("--folder", type=Path, help="where the random model lies or is written")
    parser.add_argument("--out", type=Path, default=Path("docs/performance/quantization.md"))
    options = parser.parse_args(arguments)
    set_num_threads(torch.get_num_threads())
    windows = demo_windows(options.windows)
    demo = score(DEMO, windows, VARIANTS, "float32")
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_named_checkpoint(options.shape, options.folder or Path(scratch) / "random")
        vocab_size = Checkpoint.open(str(folder)).config.vocab_size
        noise = random_windows(vocab_size, options.random_windows)
        random = score(folder, noise, VARIANTS, "bfloat16")
    text = "\n".join(report(demo, random, options.shape, len(windows))) + "\n"
    options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
