"""The pieces of the demo model's training, at a size that runs in seconds."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from models.train_demo.commented_functions import commented_functions
from models.train_demo.corpus import SourceFile, read_sources, split
from models.train_demo.export import write_model
from models.train_demo.network import Decoder
from models.train_demo.ngram import TrigramModel, UnigramModel, trigram_nats, unigram_nats
from models.train_demo.recipe import Architecture, Recipe
from models.train_demo.routing import Routing, load_balancing_loss, route
from models.train_demo.tokenizer import BOS_ID, EOS_ID, train_tokenizer, write_tokenizer
from models.train_demo.training import Progress, learning_rate_at, train
from models.train_demo.windows import WindowSampler, anchors, encode_stream

TINY = Architecture(
    vocab_size=300, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_local_experts=4
)
SOURCE = (
    "import os\n\n\nclass Greeter:\n    def greet(self, name):\n"
    '        """Return a greeting\n        for a name.\n\n        Longer text.\n        """\n'
    '        prefix = "hello, "\n        return prefix + name\n\n\n'
    "def area(width, height):\n    return width * height\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([SOURCE], TINY.vocab_size)


def routing_of(probabilities: list[list[float]]) -> Routing:
    return route(torch.tensor(probabilities).log(), 1)


def test_load_balancing_loss_is_the_formula_for_each_layer() -> None:
    # Two tokens on expert 0, one on expert 1: shares 2/3 and 1/3, mean probabilities 0.6 and 0.4.
    uneven = routing_of([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    even = routing_of([[0.8, 0.2], [0.2, 0.8]])
    by_hand = 2 * (2 / 3 * 0.6 + 1 / 3 * 0.4)
    assert load_balancing_loss([uneven]).item() == pytest.approx(by_hand)
    assert load_balancing_loss([even]).item() == pytest.approx(1.0)
    assert load_balancing_loss([uneven, even]).item() == pytest.approx((by_hand + 1.0) / 2)


def test_load_balancing_loss_sees_layers_that_collapse_onto_different_experts() -> None:
    collapsed = [routing_of([[0.9, 0.1]] * 4), routing_of([[0.1, 0.9]] * 4)]
    assert load_balancing_loss(collapsed).item() == pytest.approx(1.8)


def test_route_renormalises_the_chosen_weights() -> None:
    routing = route(torch.randn(16, 8), 2)
    assert torch.allclose(routing.topk_weights.sum(dim=-1), torch.ones(16))
    assert routing.expert_load().sum() == 32
    assert routing.expert_share().sum().item() == pytest.approx(1.0)


def test_split_depends_on_path_and_seed_only() -> None:
    sources = [SourceFile(path=f"package/file{i}.py", text="x") for i in range(400)]
    whole, part = split(sources, 0.2, seed=1), split(sources[::2], 0.2, seed=1)
    assert whole == split(sources, 0.2, seed=1)
    assert set(part.heldout) == set(whole.heldout) & set(sources[::2])
    assert set(whole.train).isdisjoint(whole.heldout)
    assert 40 <= len(whole.heldout) <= 120
    assert split(sources, 0.2, seed=2) != whole


def test_sources_are_read_in_path_order_without_tests(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "test/t.py", "site-packages/s.py", "encodings/e.py", "n.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "empty.py").write_text("\n")
    assert [source.path for source in read_sources(tmp_path)] == ["a/z.py", "b.py"]


def test_a_documented_method_becomes_a_comment_and_code_at_the_margin() -> None:
    (function,) = commented_functions(SOURCE)
    comment, code = function[: function.index("def")], function[function.index("def") :]
    assert comment == "# Return a greeting\n# for a name.\n"
    assert ast.unparse(ast.parse(code)).startswith("def greet(self, name):\n    prefix =")
    assert list(commented_functions("def broken(:")) == []


def test_tokens_survive_and_lines_end_at_token_borders(tokenizer: Tokenizer) -> None:
    text = "    if x:\n        return 'é\t\u2603'\n\n\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode(text).ids[0] == BOS_ID
    whole = tokenizer.encode("def f(n):\n    return n").ids
    for prompt in ("def f(n):\n", "def f(n):\n    "):
        ids = tokenizer.encode(prompt).ids
        assert whole[: len(ids)] == ids


def test_chat_template_renders_the_form_of_the_training_documents(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer(tokenizer, tmp_path, 64)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = ImmutableSandboxedEnvironment().from_string(config["chat_template"])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Return a greeting\nfor a name."},
    ]
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    prompt = template.render(messages=messages, **names)
    assert prompt == "<s># Be brief.\n# Return a greeting\n# for a name.\n"
    messages += [
        {"role": "assistant", "content": "x = 1\n"},
        {"role": "user", "content": "Again."},
    ]
    assert template.render(messages=messages, **names) == prompt + "x = 1\n</s><s># Again.\n"


def test_windows_start_with_bos_and_follow_the_stream(tokenizer: Tokenizer) -> None:
    stream = encode_stream(tokenizer, [SOURCE] * 8)
    assert (stream == BOS_ID).sum() == (stream == EOS_ID).sum() == 8
    starts = anchors(tokenizer, stream)
    windows = WindowSampler(stream, starts, 16, seed=3).batch(64)
    assert torch.equal(windows, WindowSampler(stream, starts, 16, seed=3).batch(64))
    assert windows.shape == (64, 17)
    assert (windows[:, 0] == BOS_ID).all()
    text = tokenizer.decode(stream.tolist(), skip_special_tokens=False)
    for window in windows:
        assert tokenizer.decode(window[1:].tolist(), skip_special_tokens=False) in text


def test_anchors_are_document_starts_and_lines_at_the_margin(tokenizer: Tokenizer) -> None:
    stream = encode_stream(tokenizer, [SOURCE])
    starts = [tokenizer.decode(stream[anchor:].tolist()) for anchor in anchors(tokenizer, stream)]
    assert [start.split()[0] for start in starts] == ["import", "class", "def"]


def test_unigram_is_the_add_one_frequency() -> None:
    model = UnigramModel(np.array([3, 3, 1]), vocab_size=4)
    assert np.exp(-unigram_nats(model, np.array([1, 3, 2]))) == pytest.approx([3 / 7, 1 / 7])


def test_trigram_probabilities_sum_to_one_and_use_the_context() -> None:
    stream = np.random.default_rng(0).integers(1, 6, size=400)
    stream[::3] = 5
    model = TrigramModel(stream, vocab_size=6)
    targets = np.arange(6)
    for before, previous in ((5, 1), (2, 2), (0, 5), (0, 0)):
        context = np.full(6, before), np.full(6, previous)
        assert model.probabilities(*context, targets).sum() == pytest.approx(1.0)
    unigram = UnigramModel(stream, vocab_size=6)
    assert trigram_nats(model, stream).mean() < unigram_nats(unigram, stream).mean()


def test_learning_rate_warms_up_and_ends_at_the_final_rate() -> None:
    recipe = Recipe(num_steps=50, num_warmup_steps=10)
    rates = [learning_rate_at(step, recipe) for step in range(1, 51)]
    assert rates[9] == max(rates) == recipe.peak_learning_rate
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(recipe.final_learning_rate)


def test_training_lowers_the_loss_and_reports_every_layer(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    stream = encode_stream(tokenizer, [SOURCE] * 8)
    sampler = WindowSampler(stream, anchors(tokenizer, stream), 16, seed=0)
    recipe = Recipe(
        num_steps=30,
        num_warmup_steps=5,
        batch_size=4,
        context_length=16,
        peak_learning_rate=1e-2,
    )
    reports: list[Progress] = []
    checkpoints: list[int] = []
    train(
        Decoder(TINY),
        sampler,
        recipe,
        report=reports.append,
        checkpoint=lambda: checkpoints.append(len(reports)),
        report_every=10,
        checkpoint_every=20,
    )
    assert [progress.step for progress in reports] == [10, 20, 30]
    assert checkpoints == [2]
    assert reports[-1].loss < reports[0].loss - 1
    assert all(len(progress.max_expert_share) == 2 for progress in reports)


def test_transformers_reads_the_written_model_and_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    decoder = Decoder(TINY).to(torch.bfloat16).float()
    write_model(decoder, tmp_path)
    oracle, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    token_ids = torch.randint(0, TINY.vocab_size, (2, 24))
    with torch.no_grad():
        logits, _ = decoder(token_ids)
        torch.testing.assert_close(logits, oracle(token_ids).logits, rtol=1e-4, atol=1e-5)
