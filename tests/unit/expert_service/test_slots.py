from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_service.slots import SlotGroup, check_slots, parse_indices, parse_slots, select_slots
from services.core.errors import ConfigurationError, InvalidRequestError
from services.core.model_config import ModelConfig
from services.core.placement import format_slots
from services.core.registry import Slot

CONFIG = ModelConfig(
    architecture="MixtralForCausalLM",
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=32,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=None,
    tie_word_embeddings=False,
    hidden_act="silu",
    dtype="float32",
    bos_token_id=1,
    eos_token_ids=(2,),
)


@pytest.mark.parametrize(
    ("text", "indices"),
    [("0", (0,)), ("0,1,4-6", (0, 1, 4, 5, 6)), ("3-3", (3,)), (" 2 , 0-1, 1", (0, 1, 2))],
)
def test_lists_and_ranges_are_read(text: str, indices: tuple[int, ...]) -> None:
    assert parse_indices(text, setting="experts") == indices


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "3-1", "1-", "0x1", "1.5", "0-99999999999"])
def test_what_is_no_index_is_refused_naming_the_setting(text: str) -> None:
    with pytest.raises(ConfigurationError, match="layers=") as raised:
        parse_indices(text, setting="layers")
    assert raised.value.details["setting"] == "layers"


def test_without_layers_an_expert_is_held_in_every_layer() -> None:
    assert select_slots(CONFIG, [SlotGroup(experts=(3, 1))]) == (
        (0, 1),
        (0, 3),
        (1, 1),
        (1, 3),
        (2, 1),
        (2, 3),
    )


def test_layers_can_be_chosen() -> None:
    assert select_slots(CONFIG, [SlotGroup(experts=(0,), layers=(1,))]) == ((1, 0),)


@pytest.mark.parametrize(
    ("experts", "layers", "named"),
    [((4,), None, r"experts: \[4\].*0 to 3"), ((0,), (1, 3), r"layers: \[3\].*0 to 2")],
)
def test_what_the_model_does_not_have_is_refused(
    experts: tuple[int, ...], layers: tuple[int, ...] | None, named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named):
        select_slots(CONFIG, [SlotGroup(experts=experts, layers=layers)])


def test_a_dense_model_has_nothing_to_serve() -> None:
    dense = dataclasses.replace(CONFIG, num_local_experts=0)
    with pytest.raises(ConfigurationError, match="dense"):
        select_slots(dense, [SlotGroup(experts=(0,))])


def test_groups_of_layers_and_experts_are_read() -> None:
    groups = parse_slots("0-1:0,1; 2:3")
    assert select_slots(CONFIG, groups) == ((0, 0), (0, 1), (1, 0), (1, 1), (2, 3))


def test_a_slot_of_two_groups_is_held_once() -> None:
    assert select_slots(CONFIG, parse_slots("0:1;0-1:1")) == ((0, 1), (1, 1))


@pytest.mark.parametrize("text", ["", "0", "0-1:", ":1", "0:1;", "0:1:2", "a:1", "2-1:0", "0;1"])
def test_what_is_no_group_is_refused_naming_the_setting(text: str) -> None:
    with pytest.raises(ConfigurationError, match="slots=") as raised:
        parse_slots(text)
    assert raised.value.details["setting"] == "slots"


def test_a_huge_group_is_refused_before_it_is_spread_out() -> None:
    with pytest.raises(ConfigurationError, match="0 to 2"):
        select_slots(CONFIG, parse_slots("0-1000000:0-3"))


@settings(deadline=None)
@given(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1))
def test_slots_written_as_text_are_read_as_they_were(slots: set[Slot]) -> None:
    assert select_slots(CONFIG, parse_slots(format_slots(slots))) == tuple(sorted(slots))


def test_slots_are_written_briefly() -> None:
    slots = {(layer, expert) for layer in range(4) for expert in (0, 1)} | {(2, 7)}
    assert format_slots(slots) == "0-3:0-1;2:7"


@pytest.mark.parametrize("slots", [{(3, 0)}, {(0, 0), (1, 4)}, set()])
def test_slots_that_the_model_lacks_are_named_with_its_range(slots: set[Slot]) -> None:
    with pytest.raises(InvalidRequestError, match="layers 0 to 2 and experts 0 to 3"):
        check_slots(CONFIG, slots)
