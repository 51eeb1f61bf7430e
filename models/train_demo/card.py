"""The model card, written from what was measured."""

import dataclasses
import platform
from dataclasses import dataclass
from pathlib import Path

from .evaluation import Evaluation, Loss, Sample
from .recipe import Architecture, Recipe

_FRONT_MATTER = """\
---
license: apache-2.0
language:
- code
library_name: transformers
pipeline_tag: text-generation
tags:
- mixtral
- mixture-of-experts
- python
- demo
---
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What a run took, from reading to the last step.

    `processor_s` sums over threads. `best_quarter_tokens_per_s` is the upper quartile of the
    reporting intervals, which is nearest to what the machine does when nothing else runs on it.
    """

    num_train_files: int
    num_heldout_files: int
    num_functions: int
    num_stream_tokens: int
    wall_s: float
    processor_s: float
    best_quarter_tokens_per_s: float
    last_loss: float


def write_card(
    folder: Path, arch: Architecture, recipe: Recipe, run: TrainingRun, evaluation: Evaluation
) -> None:
    """Write `README.md` beside the weights it describes."""
    sections = (
        _FRONT_MATTER,
        _introduction(folder, arch),
        _data(run),
        _training(recipe, run),
        _losses(evaluation),
        _shares(evaluation),
        _samples(evaluation.samples),
        _licence(),
    )
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8")


def _introduction(folder: Path, arch: Architecture) -> str:
    size_mb = (folder / "model.safetensors").stat().st_size / 1e6
    attention = (
        f"{arch.num_attention_heads} heads, {arch.num_key_value_heads} key-value heads,"
        f" RoPE base {arch.rope_theta:g}, no sliding window"
    )
    return f"""\
# expertfleet demo: a small Mixtral that completes Python

A Mixtral with {arch.num_local_experts} experts (top-{arch.num_experts_per_tok}) in
{arch.num_hidden_layers} layers, trained from scratch on the Python standard library so that
expertfleet can be shown, tested and measured with real routing. It writes text that looks like
Python; it does not solve tasks, and it has seen nothing but this library.

| | |
|---|---|
| Weights | {size_mb:.1f} MB in bfloat16, classic Mixtral layout |
| Hidden, expert intermediate | {arch.hidden_size}, {arch.intermediate_size} |
| Attention | {attention} |
| Vocabulary | {arch.vocab_size}, byte-level BPE; line ends and indentation are their own tokens |

`make demo-model` runs `python -m models.train_demo`, which writes this folder and this card.

**Chat template.** System and user messages become `#` comments, assistant messages are code.
Training saw documented functions in the same form (first paragraph of the docstring as a comment,
then the code, then `</s>`), so a user message that reads like a docstring works best.
"""


def _data(run: TrainingRun) -> str:
    return f"""\
## Data

The `.py` files of CPython {platform.python_version()}'s own standard library, without its tests,
`encodings`, `pydoc_data` and a few generated tables: {run.num_train_files} files for training and
{run.num_heldout_files} held out, chosen by a seeded hash of the path.
{run.num_functions:,} documented functions of the training files appear a second time as comment
and code. Together {run.num_stream_tokens:,} tokens.
"""


def _training(recipe: Recipe, run: TrainingRun) -> str:
    tokens = recipe.num_steps * recipe.batch_size * recipe.context_length
    rows = "\n".join(
        f"| `{field.name}` | {getattr(recipe, field.name):.10g} |"
        for field in dataclasses.fields(recipe)
    )
    return f"""\
## Training

{recipe.num_steps} AdamW steps over {tokens:,} tokens ({tokens / run.num_stream_tokens:.1f} passes),
bfloat16 autocast over float32 weights, linear warmup and cosine decay. The load-balancing loss is
computed for each layer on its own and averaged. The loss over the last steps was
{run.last_loss:.3f} nats per token. The context in training was {recipe.context_length} tokens:
longer ones run, but nothing was learnt about them.

Reading, tokenizing and training took {run.wall_s / 60:.1f} minutes by the clock, other work on the
machine included, and {run.processor_s / 60:.1f} minutes of processor time on
{recipe.num_threads} threads. In its least disturbed quarter the run made at least
{run.best_quarter_tokens_per_s:.0f} tokens per second, at which all steps take
{tokens / run.best_quarter_tokens_per_s / 60:.0f} minutes.

| Hyper-parameter | Value |
|---|---|
{rows}
"""


def _losses(evaluation: Evaluation) -> str:
    def row(name: str, loss: Loss) -> str:
        return f"| {name} | {loss.nats_per_token:.3f} | {loss.bits_per_byte:.3f} |"

    return f"""\
## Loss on held-out files

{evaluation.num_tokens:,} tokens ({evaluation.num_bytes:,} bytes), in windows as long as the
training context. The baselines are counted on the training tokens and scored on the same windows;
the trigram interpolates with absolute discounting.

| | nats per token | bits per byte |
|---|---|---|
{row("Unigram, add-one", evaluation.unigram)}
{row("Trigram, interpolated", evaluation.trigram)}
{row("**This model**, float32 arithmetic", evaluation.model)}
"""


def _shares(evaluation: Evaluation) -> str:
    num_experts = len(evaluation.expert_share[0])
    header = " | ".join(f"expert {expert}" for expert in range(num_experts))
    rows = "\n".join(
        f"| {layer} | " + " | ".join(f"{share:.3f}" for share in shares) + " |"
        for layer, shares in enumerate(evaluation.expert_share)
    )
    return f"""\
## Experts' share of held-out tokens

The share of all (token, choice) pairs of a layer; {1 / num_experts:.3f} is even.

| layer | {header} |
|{"---|" * (num_experts + 1)}
{rows}
"""


def _samples(samples: tuple[Sample, ...]) -> str:
    blocks = "\n".join(
        f"Prompt:\n\n```python\n{sample.prompt}```\n\nContinuation:\n\n"
        f"```python\n{sample.completion.rstrip()}\n```\n"
        for sample in samples
    )
    return f"## Samples\n\nGreedy, as generated.\n\n{blocks}"


def _licence() -> str:
    return """\
## Licence

The weights are under Apache-2.0, like expertfleet. The training data is under the Python Software
Foundation License 2.0 (PSF-2.0), copyright the Python Software Foundation and the authors named in
the files.
"""
