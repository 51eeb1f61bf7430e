from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from services.core.errors import UnsupportedModelError
from services.gateway.detokenizer import Detokenizer
from services.gateway.token_bytes import TokenBytes
from tests.unit.gateway.tiny_models import train_byte_level, train_sentencepiece_like

BYTE_LEVEL = train_byte_level()
SENTENCEPIECE_LIKE = train_sentencepiece_like()
BOTH = [BYTE_LEVEL, SENTENCEPIECE_LIKE]


def deltas_of(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    token_bytes = TokenBytes(tokenizer)
    detokenizer = Detokenizer(
        token_bytes.text, strip_leading_space=token_bytes.strips_leading_space
    )
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@pytest.mark.parametrize("tokenizer", BOTH, ids=["byte-level", "sentencepiece-like"])
@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_the_deltas_of_any_text_join_to_the_whole_and_never_hold_half_a_character(
    tokenizer: Tokenizer, text: str
) -> None:
    token_ids = tokenizer.encode(text).ids
    deltas = deltas_of(tokenizer, token_ids)
    assert "".join(deltas) == tokenizer.decode(token_ids) == text
    assert "�" in text or not any("�" in delta for delta in deltas)


@settings(deadline=None)
@given(token_ids=st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 5), max_size=60))
def test_any_byte_level_tokens_decode_as_the_library_decodes_them(token_ids: list[int]) -> None:
    assert "".join(deltas_of(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


def test_a_character_of_several_tokens_comes_out_once_it_is_complete() -> None:
    token_ids = BYTE_LEVEL.encode("🦊", add_special_tokens=False).ids
    assert len(token_ids) > 1
    *before, last, rest = deltas_of(BYTE_LEVEL, token_ids)
    assert before == [""] * len(before)
    assert (last, rest) == ("🦊", "")


def test_a_text_that_ends_inside_a_character_ends_in_a_replacement_character() -> None:
    token_ids = BYTE_LEVEL.encode("🦊", add_special_tokens=False).ids
    assert "".join(deltas_of(BYTE_LEVEL, token_ids[:-1])) == "�"


def test_bytes_that_never_become_a_character_are_not_held_back() -> None:
    lone_continuation = SENTENCEPIECE_LIKE.token_to_id("<0x80>")
    assert lone_continuation is not None
    deltas = deltas_of(SENTENCEPIECE_LIKE, [lone_continuation] * 100)
    assert deltas == ["�"] * 100 + [""]


def test_the_leading_space_is_kept_where_the_text_goes_on() -> None:
    token_ids = SENTENCEPIECE_LIKE.encode("The fox", add_special_tokens=False).ids
    token_bytes = TokenBytes(SENTENCEPIECE_LIKE)
    continuing = Detokenizer(token_bytes.text)
    assert "".join(map(continuing.push, token_ids)) == " The fox"


def test_special_tokens_are_no_text_but_can_be_spelled_out() -> None:
    token_bytes = TokenBytes(BYTE_LEVEL)
    assert (token_bytes.text(2), token_bytes.piece(2)) == (b"", b"</s>")


def test_added_tokens_in_plain_text_keep_their_characters() -> None:
    tokenizer = train_byte_level()
    tokenizer.add_tokens(["<tool 工具>"])
    token_ids = tokenizer.encode("a <tool 工具> b").ids
    assert "".join(deltas_of(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_metaspace_decoders_are_read() -> None:
    vocab = {"▁The": 0, "▁fox": 1, "es": 2}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.Metaspace()
    assert "".join(deltas_of(tokenizer, [0, 1, 2])) == tokenizer.decode([0, 1, 2]) == "The foxes"


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), None], ids=["word-piece", "none"])
def test_a_decoder_of_another_family_is_refused(decoder: decoders.Decoder | None) -> None:
    tokenizer = Tokenizer(models.BPE())
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(UnsupportedModelError, match="decoder"):
        TokenBytes(tokenizer)


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    token_ids = (BYTE_LEVEL.encode("你好世界 🦊 quick", add_special_tokens=False).ids * 4000)[
        :20000
    ]
    detokenizer = Detokenizer(TokenBytes(BYTE_LEVEL).text)

    def seconds_for(part: list[int]) -> float:
        started = time.perf_counter()
        for token_id in part:
            detokenizer.push(token_id)
        return time.perf_counter() - started

    first, *_, last = [seconds_for(token_ids[at : at + 2000]) for at in range(0, 20000, 2000)]
    assert last < 10 * first
