"""Train the demo model: `python -m models.train_demo --help` lists the options."""

import argparse
import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from .card import TrainingRun, write_card
from .commented_functions import commented_functions
from .corpus import Corpus, read_sources, split, standard_library
from .evaluation import evaluate
from .export import write_model
from .memory import keep_freed_memory
from .network import Decoder
from .recipe import Architecture, Recipe
from .tokenizer import train_tokenizer, write_tokenizer
from .training import Progress, train
from .windows import Tokens, WindowSampler, anchors, encode_stream

logger = logging.getLogger("train_demo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that training and evaluation read."""

    corpus: Corpus
    num_functions: int
    tokenizer: Tokenizer
    stream: Tokens


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    recipe, arch = Recipe(), Architecture()
    if options.steps is not None:
        recipe = dataclasses.replace(recipe, num_steps=options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keep_freed_memory()
    torch.set_num_threads(recipe.num_threads)
    torch.manual_seed(recipe.seed)

    wall_start, processor_start = time.monotonic(), time.process_time()
    prepared = prepare(recipe, arch, options.every_nth_file)
    write_tokenizer(prepared.tokenizer, options.out, arch.max_position_embeddings)
    reports = fit(prepared, recipe, arch, options.out)
    run = TrainingRun(
        num_train_files=len(prepared.corpus.train),
        num_heldout_files=len(prepared.corpus.heldout),
        num_functions=prepared.num_functions,
        num_stream_tokens=len(prepared.stream),
        wall_s=time.monotonic() - wall_start,
        processor_s=time.process_time() - processor_start,
        best_quarter_tokens_per_s=np.quantile([r.tokens_per_s for r in reports], 0.75).item(),
        last_loss=reports[-1].loss,
    )
    describe(prepared, recipe, arch, run, options.out)


def prepare(recipe: Recipe, arch: Architecture, every_nth_file: int = 1) -> Prepared:
    """Read and split the standard library; train the tokenizer on one side and encode that side."""
    sources = read_sources(standard_library())[::every_nth_file]
    corpus = split(sources, recipe.heldout_fraction, recipe.seed)
    texts = [source.text for source in corpus.train]
    functions = [function for text in texts for function in commented_functions(text)]
    tokenizer = train_tokenizer(texts, arch.vocab_size)
    stream = encode_stream(tokenizer, texts + functions)
    logger.info(
        "%d files and %d functions to train on, %d tokens; %d files held out",
        len(texts),
        len(functions),
        len(stream),
        len(corpus.heldout),
    )
    return Prepared(corpus=corpus, num_functions=len(functions), tokenizer=tokenizer, stream=stream)


def fit(prepared: Prepared, recipe: Recipe, arch: Architecture, out: Path) -> list[Progress]:
    """Train, writing the weights to `out` now and then and at the end; return all reports."""
    decoder = Decoder(arch)
    sampler = WindowSampler(
        prepared.stream,
        anchors(prepared.tokenizer, prepared.stream),
        recipe.context_length,
        recipe.seed,
    )
    reports: list[Progress] = []

    def report(progress: Progress) -> None:
        reports.append(progress)
        logger.info("%s", progress)

    train(decoder, sampler, recipe, report=report, checkpoint=lambda: write_model(decoder, out))
    write_model(decoder, out)
    return reports


def describe(
    prepared: Prepared, recipe: Recipe, arch: Architecture, run: TrainingRun, out: Path
) -> None:
    """Measure the model in `out` and write its card."""
    heldout = [source.text for source in prepared.corpus.heldout]
    logger.info("measuring on %d held-out files", len(heldout))
    evaluation = evaluate(out, prepared.tokenizer, heldout, prepared.stream, recipe.context_length)
    write_card(out, arch, recipe, run, evaluation)
    logger.info(
        "held-out loss %.3f nats per token, trigram %.3f, unigram %.3f; card in %s",
        evaluation.model.nats_per_token,
        evaluation.trigram.nats_per_token,
        evaluation.unigram.nats_per_token,
        out / "README.md",
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.train_demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="folder to write")
    parser.add_argument("--steps", type=int, help="train for fewer steps than the recipe's")
    parser.add_argument(
        "--every-nth-file", type=int, default=1, help="read only a part of the standard library"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
