from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.generation import GenerationDelta, TokenLogprob
from services.gateway.choice import Choice, ChoiceUpdate
from services.gateway.detokenizer import Detokenizer
from services.gateway.token_bytes import TokenBytes
from tests.unit.gateway.tiny_models import train_byte_level

TOKENIZER = train_byte_level()
TOKEN_BYTES = TokenBytes(TOKENIZER)


def encode(text: str) -> list[int]:
    token_ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return token_ids


def new_choice(stops: list[str] | None = None, *, min_tokens: int = 0) -> Choice:
    return Choice(0, Detokenizer(TOKEN_BYTES.text), stops or [], min_tokens=min_tokens)


def feed(choice: Choice, token_ids: list[int], *, finish: bool = True) -> list[ChoiceUpdate]:
    """Token by token with log-probabilities, until the choice or the tokens end."""
    updates: list[ChoiceUpdate] = []
    for token_id in token_ids:
        logprob = TokenLogprob(token_id=token_id, logprob=-float(token_id))
        delta = GenerationDelta(index=0, token_ids=(token_id,), logprobs=(logprob,))
        updates.append(choice.accept(delta))
        if choice.finish_reason is not None:
            return updates
    if finish:
        updates.append(choice.accept(GenerationDelta(index=0, finish_reason="length")))
    return updates


def text_of(updates: list[ChoiceUpdate]) -> str:
    return "".join(update.text for update in updates)


def test_the_finish_reason_is_the_shards() -> None:
    choice = new_choice()
    updates = feed(choice, encode("quick fox"))
    assert text_of(updates) == "quick fox"
    assert [update.finish_reason for update in updates[-2:]] == [None, "length"]


def test_a_stop_string_ends_the_choice_with_reason_stop_and_without_its_text() -> None:
    choice = new_choice(["fox"])
    updates = feed(choice, encode("the quick fox jumps"))
    assert text_of(updates) == "the quick "
    assert choice.finish_reason == "stop"


def test_a_stop_string_that_the_last_characters_complete_counts_as_stop() -> None:
    fox = encode("🦊")
    choice = new_choice(["�"])
    updates = feed(choice, [*encode("a"), *fox[:-1]])
    assert (text_of(updates), choice.finish_reason) == ("a", "stop")


def test_stop_strings_wait_for_min_tokens() -> None:
    token_ids = encode("fox fox")
    choice = new_choice(["fox"], min_tokens=len(encode("fox")))
    assert text_of(feed(choice, token_ids)) == "fox "


def test_tokens_after_a_stop_string_are_not_counted() -> None:
    token_ids = encode("a fox")
    choice = new_choice(["fox"])
    delta = GenerationDelta(index=0, token_ids=(*token_ids, *encode(" jumps over")))
    update = choice.accept(delta)
    assert choice.num_tokens == len(update.token_ids) == len(token_ids)


def test_logprobs_of_the_tokens_of_a_stop_string_are_dropped() -> None:
    before, stop = encode("the quick"), encode("fox")
    updates = feed(new_choice(["fox"]), [*before, *stop])
    released = [placed.token.token_id for update in updates for placed in update.logprobs]
    assert released == before


def test_logprobs_are_not_told_before_the_text_of_their_token() -> None:
    choice = new_choice(["fox!"])
    held = feed(choice, encode("fox"), finish=False)
    assert (text_of(held), [update.logprobs for update in held]) == ("", [()] * len(held))
    after = feed(choice, encode("y"))
    assert text_of(after) == "foxy"
    assert len(after[0].logprobs) == len(held) + 1


def test_logprobs_of_a_character_of_several_tokens_come_with_the_character() -> None:
    token_ids = encode("🦊")
    updates = feed(new_choice(), token_ids, finish=False)
    assert [len(update.logprobs) for update in updates] == [0] * (len(token_ids) - 1) + [
        len(token_ids)
    ]


@settings(deadline=None)
@given(text=st.text(min_size=1, max_size=40), stop=st.text(min_size=1, max_size=2))
def test_every_text_offset_is_where_its_token_begins_in_the_text(text: str, stop: str) -> None:
    token_ids = encode(text)
    updates = feed(new_choice([stop]), token_ids)
    shown = text_of(updates)
    placed = [entry for update in updates for entry in update.logprobs]
    assert [entry.token.token_id for entry in placed] == token_ids[: len(placed)]
    for position, entry in enumerate(placed):
        before = TOKENIZER.decode(token_ids[:position])
        assert before.rstrip("�").startswith(shown[: entry.text_offset].rstrip("�"))
        assert entry.text_offset <= len(before)


@settings(deadline=None)
@given(text=st.text(max_size=40), cut=st.integers(1, 5))
def test_deltas_of_several_tokens_show_the_same_text(text: str, cut: int) -> None:
    token_ids = encode(text)
    choice, shown = new_choice(["e"]), ""
    for at in range(0, len(token_ids), cut):
        shown += choice.accept(
            GenerationDelta(index=0, token_ids=tuple(token_ids[at : at + cut]))
        ).text
        if choice.finish_reason:
            break
    else:
        shown += choice.accept(GenerationDelta(index=0, finish_reason="stop")).text
    assert shown == text.partition("e")[0]


def test_counts_of_cached_tokens_are_kept() -> None:
    choice = new_choice()
    choice.accept(
        GenerationDelta(index=0, token_ids=(5,), num_cached_tokens=48, num_restored_tokens=32)
    )
    choice.accept(GenerationDelta(index=0, finish_reason="stop"))
    assert (choice.num_cached_tokens, choice.num_restored_tokens) == (48, 32)
