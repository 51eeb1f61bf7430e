"""From scheduled sequences to the tensors of a forward pass, with few calls and one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from router_service.model.batch import ForwardBatch
from router_service.scheduling.step_plan import ScheduledSequence


def build_batch(
    entries: Sequence[ScheduledSequence], block_size: int, device: torch.device
) -> ForwardBatch:
    """The batch of one micro-batch; each entry has at least one token.

    All tensors are views of one int64 buffer, so that a GPU gets them in a single copy.
    """
    num_seqs = len(entries)
    num_tokens = sum(entry.num_tokens for entry in entries)
    num_rows = sum(1 for entry in entries if entry.samples)
    width = max(len(entry.sequence.block_table) for entry in entries)
    packed = np.zeros(3 * num_tokens + num_rows + num_seqs * width, dtype=np.int64)
    token_ids, positions, slot_mapping = packed[: 3 * num_tokens].reshape(3, num_tokens)
    sample_rows = packed[3 * num_tokens : 3 * num_tokens + num_rows]
    block_tables = packed[3 * num_tokens + num_rows :].reshape(num_seqs, width)

    query_start = [0]
    context_lens = []
    sampled = []
    first = 0
    for row, entry in enumerate(entries):
        sequence, start, last = entry.sequence, entry.start, first + entry.num_tokens
        end = start + entry.num_tokens
        if entry.num_tokens == 1:
            token_ids[first] = sequence.token_ids[start]
            positions[first] = start
        else:
            token_ids[first:last] = np.frombuffer(sequence.token_ids, dtype=np.int64)[start:end]
            positions[first:last] = np.arange(start, end)
        table = sequence.block_table
        block_tables[row, : len(table)] = np.frombuffer(table, dtype=np.int64)
        if entry.samples:
            sampled.append(last - 1)
        query_start.append(last)
        context_lens.append(end)
        first = last
    rows = np.repeat(np.arange(num_seqs), np.diff(query_start))
    slot_mapping[:] = block_tables[rows, positions // block_size] * block_size
    slot_mapping += positions % block_size
    sample_rows[:] = sampled

    buffer = torch.from_numpy(packed).to(device)
    per_token = buffer[: 3 * num_tokens].view(3, num_tokens)
    return ForwardBatch(
        token_ids=per_token[0],
        positions=per_token[1],
        slot_mapping=per_token[2],
        query_start=tuple(query_start),
        context_lens=tuple(context_lens),
        block_tables=buffer[3 * num_tokens + num_rows :].view(num_seqs, width),
        sample_rows=buffer[3 * num_tokens : 3 * num_tokens + num_rows],
    )


def split_micro_batches(
    entries: Sequence[ScheduledSequence], num_micro_batches: int
) -> list[list[ScheduledSequence]]:
    """Disjoint groups of about equal numbers of tokens; none is empty, so there may be fewer.

    The largest chunk goes to the emptiest group, and so on down, so that a long prefill chunk is
    alone and decodes are together. The groups with the least prefill come first: their frames are
    on the way before the long attention of the others begins. Within a group the order of the step
    is kept.
    """
    count = min(num_micro_batches, len(entries))
    if count <= 1:
        return [list(entries)] if entries else []
    loads = [0] * count
    group_of = [0] * len(entries)
    for position in sorted(range(len(entries)), key=lambda i: -entries[i].num_tokens):
        group = loads.index(min(loads))
        group_of[position] = group
        loads[group] += entries[position].num_tokens
    groups: list[list[ScheduledSequence]] = [[] for _ in range(count)]
    for position, entry in enumerate(entries):
        groups[group_of[position]].append(entry)
    groups.sort(key=_num_prefill_tokens)
    return groups


def _num_prefill_tokens(entries: Sequence[ScheduledSequence]) -> int:
    return sum(entry.num_tokens for entry in entries if entry.is_prefill)
