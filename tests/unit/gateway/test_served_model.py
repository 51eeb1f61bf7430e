from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from services.core.errors import CheckpointError, InvalidRequestError
from services.core.settings import Settings, load_settings
from services.gateway.errors import ModelNotFoundError
from services.gateway.served_model import ServedModel, served_name
from services.gateway.tokenizer import TextTokenizer
from tests.unit.gateway.tiny_models import CHAT_TEMPLATE, write_model_folder


def settings_with(**values: object) -> Settings:
    return load_settings(model="org/tiny", **values)


async def test_a_completion_prompt_gets_the_bos_of_the_post_processor(model_folder: Path) -> None:
    model = ServedModel.load(settings_with(), model_folder)
    token_ids = await model.encode_text("quick", param="prompt")
    assert token_ids[0] == 1
    assert model.decode(token_ids) == "quick"


async def test_a_conversation_has_only_the_bos_that_its_template_writes(model_folder: Path) -> None:
    model = ServedModel.load(settings_with(), model_folder)
    token_ids = await model.encode_chat([{"role": "user", "content": "hi"}])
    assert token_ids.count(1) == 1 and token_ids[0] == 1


async def test_a_long_text_is_encoded_as_a_short_one_and_leaves_the_loop_free(
    byte_level: Tokenizer,
) -> None:
    tokenizer = TextTokenizer(byte_level, {})
    text = "the quick brown fox, 你好世界. " * 20_000
    gaps: list[float] = []

    async def watch() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - before)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    started = time.perf_counter()
    token_ids = await tokenizer.encode(text, add_special_tokens=True)
    elapsed = time.perf_counter() - started
    watcher.cancel()
    assert list(token_ids) == byte_level.encode(text).ids
    assert max(gaps) < 0.6 * elapsed


async def test_truncation_and_padding_in_the_file_do_not_apply(byte_level: Tokenizer) -> None:
    limited = Tokenizer.from_str(byte_level.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=64)
    token_ids = await TextTokenizer(limited, {}).encode("quick brown fox", add_special_tokens=True)
    assert list(token_ids) == byte_level.encode("quick brown fox").ids


async def test_without_a_tokenizer_text_is_refused_and_token_ids_are_not(
    bare_model_folder: Path,
) -> None:
    model = ServedModel.load(settings_with(), bare_model_folder)
    with pytest.raises(InvalidRequestError, match=r"no tokenizer\.json"):
        await model.encode_text("hi", param="prompt")
    with pytest.raises(InvalidRequestError, match=r"no tokenizer\.json"):
        await model.encode_chat([{"role": "user", "content": "hi"}])
    assert model.check_prompt((5, 6), param="prompt") == (5, 6)
    assert model.decode((5, 6)) == ""


async def test_without_a_chat_template_chat_is_refused(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    folder = write_model_folder(tmp_path, byte_level)
    (folder / "tokenizer_config.json").unlink()
    model = ServedModel.load(settings_with(), folder)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        await model.encode_chat([{"role": "user", "content": "hi"}])


async def test_special_tokens_missing_in_the_config_come_from_the_models_ids(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    folder = write_model_folder(tmp_path, byte_level)
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    model = ServedModel.load(settings_with(), folder)
    token_ids = await model.encode_chat(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    )
    assert token_ids.count(1) == 1 and token_ids.count(2) == 1


@pytest.mark.parametrize("token_ids", [(640,), (0, -1), (3, 10**9)])
async def test_ids_outside_the_vocabulary_are_refused(
    model_folder: Path, token_ids: tuple[int, ...]
) -> None:
    model = ServedModel.load(settings_with(), model_folder)
    with pytest.raises(InvalidRequestError, match="outside the vocabulary, 0 to 639"):
        model.check_prompt(token_ids, param="prompt")


def test_a_continued_text_keeps_its_space_and_a_new_one_does_not(
    tmp_path: Path, sentencepiece_like: Tokenizer
) -> None:
    folder = write_model_folder(tmp_path, sentencepiece_like)
    model = ServedModel.load(settings_with(), folder)
    fox = sentencepiece_like.encode("fox", add_special_tokens=False).ids
    continued = model.detokenizer((1, *fox))
    fresh = model.detokenizer((1,))
    assert "".join(map(continued.push, fox)) == " fox"
    assert "".join(map(fresh.push, fox)) == "fox"


def test_the_context_is_bounded_by_model_setting_and_kv_cache(model_folder: Path) -> None:
    # 2 (K, V) x 2 layers x 2 heads x 8 x 2 bytes = 128 bytes a token, 2048 a block of 16.
    def length(**values: object) -> int:
        return ServedModel.load(settings_with(**values), model_folder).max_model_len

    assert length() == 256
    assert length(max_model_len=100) == 100
    assert length(kv_cache_bytes=65536, dtype="float32") == 256
    assert length(kv_cache_bytes=65536, dtype="float32", block_size=200) == 200
    assert length(max_model_len=10_000) == 256


@pytest.mark.parametrize(
    ("model", "name"),
    [("mistralai/Mixtral-8x7B-v0.1", "Mixtral-8x7B-v0.1"), ("/no/such/place/tiny", "tiny")],
)
def test_a_model_is_named_by_the_last_part_of_where_it_is(model: str, name: str) -> None:
    assert served_name(model) == name


def test_only_the_served_name_is_known(model_folder: Path) -> None:
    model = ServedModel.load(settings_with(served_model_name="mine"), model_folder)
    model.check_name("mine")
    model.check_name(None)
    with pytest.raises(ModelNotFoundError, match="'tiny' does not exist here; 'mine' is served"):
        model.check_name("tiny")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, byte_level: Tokenizer, name: str) -> None:
    folder = write_model_folder(tmp_path, byte_level)
    (folder / name).write_text("{")
    with pytest.raises(CheckpointError, match=name):
        ServedModel.load(settings_with(), folder)
