from __future__ import annotations

import pytest
import torch

from router_service.engine.batch_builder import build_batch, split_micro_batches
from router_service.scheduling.sequence import Sequence
from router_service.scheduling.step_plan import ScheduledSequence
from services.core.generation import SamplingParams

CPU = torch.device("cpu")


def _entry(tokens: list[int], table: list[int], start: int, count: int) -> ScheduledSequence:
    sequence = Sequence(
        order=0,
        index=0,
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=1),
        seed=0,
        root=b"",
    )
    sequence.block_table.extend(table)
    return ScheduledSequence(
        sequence=sequence,
        start=start,
        num_tokens=count,
        is_prefill=count > 1,
        samples=start + count == len(tokens),
    )


def test_a_mixed_batch_lays_out_decode_and_prefill_tokens() -> None:
    decode = _entry([10, 11, 12, 13, 14], [7, 2], start=4, count=1)
    chunk = _entry(list(range(20, 29)), [5, 0, 3], start=2, count=4)
    last = _entry([30, 31], [9], start=0, count=2)
    batch = build_batch([decode, chunk, last], block_size=4, device=CPU)
    assert batch.token_ids.tolist() == [14, 22, 23, 24, 25, 30, 31]
    assert batch.positions.tolist() == [4, 2, 3, 4, 5, 0, 1]
    assert batch.slot_mapping.tolist() == [8, 22, 23, 0, 1, 36, 37]
    assert batch.query_start == (0, 1, 5, 7)
    assert batch.context_lens == (5, 6, 2)
    assert batch.block_tables.tolist() == [[7, 2, 0], [5, 0, 3], [9, 0, 0]]
    assert batch.sample_rows.tolist() == [0, 6]
    assert (batch.num_tokens, batch.num_seqs) == (7, 3)


def test_all_tensors_are_int64_and_share_one_buffer() -> None:
    batch = build_batch([_entry([1, 2, 3], [0], 0, 3)], block_size=4, device=CPU)
    tensors = (
        batch.token_ids,
        batch.positions,
        batch.slot_mapping,
        batch.block_tables,
        batch.sample_rows,
    )
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_the_sequence_can_grow_after_its_batch_was_built() -> None:
    entry = _entry([1, 2, 3], [0], 0, 3)
    batch = build_batch([entry], block_size=4, device=CPU)
    entry.sequence.append(4)
    entry.sequence.block_table.append(1)
    assert batch.token_ids.tolist() == [1, 2, 3]


def test_a_chunk_that_does_not_sample_gives_no_row() -> None:
    batch = build_batch([_entry([1, 2, 3], [0], 0, 2)], block_size=4, device=CPU)
    assert batch.sample_rows.shape == (0,)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_micro_batches_are_disjoint_complete_and_balanced(count: int) -> None:
    sizes = [1, 1, 1, 40, 1, 1, 20, 20, 1]
    entries = [_entry(list(range(size)), [0] * 10, 0, size) for size in sizes]
    groups = split_micro_batches(entries, count)
    assert len(groups) == count
    assert sorted(id(entry) for group in groups for entry in group) == sorted(map(id, entries))
    loads = [sum(entry.num_tokens for entry in group) for group in groups]
    assert max(loads) <= max(40, -(-sum(sizes) // count) + 1)


def test_the_order_of_the_step_is_kept_within_a_micro_batch() -> None:
    entries = [_entry([1] * size, [0] * 3, 0, size) for size in (1, 5, 2, 4, 3)]
    for group in split_micro_batches(entries, 2):
        positions = [entries.index(entry) for entry in group]
        assert positions == sorted(positions)


def test_a_long_prefill_chunk_is_apart_from_the_decodes_and_comes_after_them() -> None:
    chunk = _entry([1] * 40, [0] * 10, 0, 40)
    decodes = [_entry([1], [0], 0, 1) for _ in range(6)]
    assert split_micro_batches([*decodes, chunk], 2) == [decodes, [chunk]]
    assert split_micro_batches([chunk, *decodes], 3)[-1] == [chunk]


def test_there_are_no_more_micro_batches_than_sequences() -> None:
    entries = [_entry([1], [0], 0, 1)] * 2
    assert len(split_micro_batches(entries, 4)) == 2
    assert split_micro_batches([], 4) == []
