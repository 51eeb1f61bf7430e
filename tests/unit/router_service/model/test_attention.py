from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from router_service.model.attention import AttentionPlan, DecodeGroup, group_by_length
from router_service.model.batch import ForwardBatch
from router_service.model.kv_cache import KVCache
from tests.support.checkpoints import fresh_seed
from tests.support.forward import TINY_CONFIG

BLOCK_SIZE = 4
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8
NUM_BLOCKS = 80


class Scene:
    """Sequences of known keys and values, of which some last tokens are this step's queries."""

    def __init__(self, sequences: list[tuple[int, int]], *, dtype: torch.dtype, seed: int) -> None:
        """`sequences` are (tokens in all, tokens of this step)."""
        torch.manual_seed(seed)
        free_blocks = list(range(1, NUM_BLOCKS))
        random.Random(seed).shuffle(free_blocks)
        self.sequences = sequences
        self.cache = KVCache(
            replace(TINY_CONFIG, num_hidden_layers=1),
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        self.cache.tensor.fill_(float("nan"))
        self.keys = [
            torch.randn(length, NUM_KV_HEADS, HEAD_DIM).to(dtype) for length, _ in sequences
        ]
        self.values = [torch.randn_like(keys) for keys in self.keys]
        self.queries = [torch.randn(count, NUM_HEADS, HEAD_DIM).to(dtype) for _, count in sequences]
        self.tables = [
            [free_blocks.pop() for _ in range(-(-length // BLOCK_SIZE))] for length, _ in sequences
        ]
        self.slots = [
            torch.tensor(
                [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]
            )
            for table, (length, _) in zip(self.tables, sequences, strict=True)
        ]

    def batch(self) -> ForwardBatch:
        counts = [count for _, count in self.sequences]
        width = max(map(len, self.tables))
        positions = [torch.arange(length - count, length) for length, count in self.sequences]
        return ForwardBatch(
            token_ids=torch.zeros(sum(counts), dtype=torch.int64),
            positions=torch.cat(positions),
            slot_mapping=torch.cat(self._new(self.slots)),
            query_start=(0, *accumulate(counts)),
            context_lens=tuple(length for length, _ in self.sequences),
            block_tables=torch.tensor([t + [0] * (width - len(t)) for t in self.tables]),
            sample_rows=torch.empty(0, dtype=torch.int64),
        )

    def attend(self, sliding_window: int | None) -> list[Tensor]:
        """The attention of every sequence, after its earlier tokens were put into the cache."""
        for keys, values, slots, (length, count) in zip(
            self.keys, self.values, self.slots, self.sequences, strict=True
        ):
            earlier = slice(0, length - count)
            self.cache.write(0, slots[earlier], keys[earlier], values[earlier])
        plan = AttentionPlan.build(
            self.batch(), self.cache, sliding_window=sliding_window, dtype=self.keys[0].dtype
        )
        new_keys, new_values = torch.cat(self._new(self.keys)), torch.cat(self._new(self.values))
        output = plan.attend(0, torch.cat(self.queries), new_keys, new_values, self.cache)
        starts = self.batch().query_start
        return [output[start:stop] for start, stop in pairwise(starts)]

    def expected(self, sequence: int, sliding_window: int | None) -> Tensor:
        """Token by token and head by head, in float32."""
        length, count = self.sequences[sequence]
        keys, values = self.keys[sequence].float(), self.values[sequence].float()
        rows = []
        for offset, position in enumerate(range(length - count, length)):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            for head in range(NUM_HEADS):
                kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
                query = self.queries[sequence][offset, head].float()
                seen = keys[first : position + 1, kv_head]
                shares = torch.softmax(seen @ query / HEAD_DIM**0.5, 0)
                rows.append(shares @ values[first : position + 1, kv_head])
        return torch.stack(rows).view(count, NUM_HEADS, HEAD_DIM)

    def _new(self, tensors: list[Tensor]) -> list[Tensor]:
        counts = [count for _, count in self.sequences]
        return [tensor[-count:] for tensor, count in zip(tensors, counts, strict=True)]


MIXED = [(9, 1), (12, 5), (1, 1), (30, 1), (7, 7), (33, 2), (4, 1)]


@pytest.mark.parametrize("sliding_window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(
    "sequences",
    [
        pytest.param(MIXED, id="mixed"),
        pytest.param([(17, 1)], id="one decode"),
        pytest.param([(8, 1), (8, 1), (8, 1)], id="decodes of one length"),
        pytest.param([(3, 1), (20, 1), (11, 1)], id="decodes of several lengths"),
        pytest.param([(21, 21)], id="whole prompt"),
        pytest.param([(21, 6)], id="chunk"),
        pytest.param([(150, 131)], id="chunk of several slices"),
        pytest.param([(13, 13), (18, 4)], id="prefills"),
    ],
)
def test_attention_equals_a_loop_over_visible_keys(
    sequences: list[tuple[int, int]], sliding_window: int | None
) -> None:
    scene = Scene(sequences, dtype=torch.float32, seed=fresh_seed())
    for sequence, output in enumerate(scene.attend(sliding_window)):
        expected = scene.expected(sequence, sliding_window)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_two_percent(dtype: torch.dtype) -> None:
    scene = Scene(MIXED, dtype=dtype, seed=fresh_seed())
    for sequence, output in enumerate(scene.attend(6)):
        assert output.dtype == dtype
        torch.testing.assert_close(
            output.float(), scene.expected(sequence, 6), atol=2e-2, rtol=2e-2
        )


def test_a_sequence_gets_the_same_beside_others_as_alone() -> None:
    seed = fresh_seed()
    scene = Scene(MIXED, dtype=torch.float32, seed=seed)
    together = scene.attend(None)
    for sequence, beside in enumerate(together):
        alone = Scene([MIXED[sequence]], dtype=torch.float32, seed=seed)
        alone.keys, alone.values = [scene.keys[sequence]], [scene.values[sequence]]
        alone.queries = [scene.queries[sequence]]
        torch.testing.assert_close(alone.attend(None)[0], beside, atol=1e-6, rtol=1e-5)


def test_the_same_step_gives_the_same_bits() -> None:
    seed = fresh_seed()
    first, second = (Scene(MIXED, dtype=torch.bfloat16, seed=seed).attend(5) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sliding_window", [None, 6])
def test_slots_of_others_and_slots_not_written_are_not_read(sliding_window: int | None) -> None:
    """Every slot that is not the sequences' own holds NaN in these scenes."""
    scene = Scene([(5, 1), (23, 1), (9, 3)], dtype=torch.float32, seed=fresh_seed())
    assert all(output.isfinite().all() for output in scene.attend(sliding_window))


def test_keys_before_the_window_are_not_read() -> None:
    scene = Scene([(40, 1), (30, 3)], dtype=torch.float32, seed=fresh_seed())
    plan = AttentionPlan.build(scene.batch(), scene.cache, sliding_window=8, dtype=torch.float32)
    assert [len(part.head_rows) for part in plan.parts] == [8 * NUM_KV_HEADS, 10 * NUM_KV_HEADS]


def test_decodes_of_one_length_need_neither_mask_nor_copies_of_the_queries() -> None:
    scene = Scene([(8, 1), (8, 1)], dtype=torch.float32, seed=fresh_seed())
    plan = AttentionPlan.build(scene.batch(), scene.cache, sliding_window=None, dtype=torch.float32)
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
