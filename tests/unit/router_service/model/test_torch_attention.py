from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router_service.model.torch_attention import (
    DecodeGroup,
    TorchAttentionPlan,
    group_by_length,
)
from tests.support.attention_scene import NO_ROTATION, NUM_KV_HEADS, Scene
from tests.support.checkpoints import fresh_seed


def test_keys_before_the_window_are_not_read() -> None:
    scene = Scene([(40, 1), (30, 3)], seed=fresh_seed())
    plan = TorchAttentionPlan.build(
        scene.batch(), scene.cache, sliding_window=8, rotation=NO_ROTATION
    )
    assert [len(part.head_rows) for part in plan.parts] == [8 * NUM_KV_HEADS, 10 * NUM_KV_HEADS]


def test_decodes_of_one_length_need_neither_mask_nor_copies_of_the_queries() -> None:
    scene = Scene([(8, 1), (8, 1)], seed=fresh_seed())
    plan = TorchAttentionPlan.build(
        scene.batch(), scene.cache, sliding_window=None, rotation=NO_ROTATION
    )
    (group,) = plan.parts
    assert isinstance(group, DecodeGroup)
    assert group.mask is None
    assert group.query_rows is None


@given(st.dictionaries(st.integers(0, 99), st.integers(1, 5000), max_size=40))
def test_groups_hold_every_sequence_once_and_pad_little(num_keys: dict[int, int]) -> None:
    groups = group_by_length(num_keys, max_keys=8000)
    assert sorted(seq for group in groups for seq in group) == sorted(num_keys)
    for group in groups:
        longest = max(num_keys[seq] for seq in group)
        assert group == sorted(group)
        assert sum(longest - num_keys[seq] for seq in group) <= 256
        assert len(group) == 1 or len(group) * longest <= 8000
    longests = [max(num_keys[seq] for seq in group) for group in groups]
    assert longests == sorted(longests, reverse=True)


def test_sequences_of_about_one_length_share_a_group() -> None:
    lengths = {0: 100, 1: 103, 2: 98, 3: 4000}
    assert group_by_length(lengths, max_keys=9999) == [[3], [0, 1, 2]]
    assert group_by_length(lengths, max_keys=210) == [[3], [0, 1], [2]]
