from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import ConfigurationError
from services.core.memory_registry import MemoryRegistry
from services.core.registry import Slot, WorkerRecord
from services.core.registry_json import (
    RecordError,
    decode_record,
    encode_record,
    format_ranges,
    parse_ranges,
)
from services.core.static_registry import parse_endpoints
from tests.support.records import shard_record, worker_record

slots = st.tuples(st.integers(0, 63), st.integers(0, 15))


@given(held=st.frozensets(slots), tokens=st.dictionaries(slots, st.integers(0, 1 << 60)))
def test_a_worker_record_comes_back_from_json_as_it_was(
    held: frozenset[Slot], tokens: dict[Slot, int]
) -> None:
    record = worker_record(slots=held, tokens=tokens, queue_ms=0.25, metrics_endpoint="h:9")
    assert decode_record(encode_record(record)) == record


def test_a_shard_record_comes_back_from_json_as_it_was() -> None:
    record = shard_record(expert_load={(0, 1): 7, (3, 1): 9, (4, 2): 0})
    assert decode_record(encode_record(record)) == record


def test_a_record_of_every_slot_of_8x22b_with_counts_is_a_few_kilobytes() -> None:
    held = frozenset((layer, expert) for layer in range(56) for expert in range(8))
    record = worker_record(slots=held, tokens=dict.fromkeys(held, 1_000_000))
    assert len(encode_record(record)) < 5000


def test_a_record_written_before_memory_and_busy_time_were_told_is_read() -> None:
    record = worker_record(slot_bytes=5, memory_limit_bytes=6, busy_s=1.5, num_threads=2)
    assert decode_record(encode_record(record)) == record
    fields = json.loads(encode_record(record))
    for name in ("slot_bytes", "memory_limit_bytes", "busy_s", "num_threads"):
        del fields[name]
    assert decode_record(json.dumps(fields).encode()) == worker_record()


def test_fields_of_a_newer_version_are_skipped_and_missing_optional_ones_take_defaults() -> None:
    fields = json.loads(encode_record(worker_record()))
    del fields["metrics_endpoint"], fields["tokens"]
    decoded = decode_record(json.dumps(fields | {"colour": "blue"}).encode())
    assert decoded == worker_record()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "cat"},
        {"state": "sleepy"},
        {"slots": {"0": "3-1"}},
        {"slots": {"0": "0-99999999999"}},
        {"slots": {"x": "1"}},
        {"slots": [1]},
        {"tokens": {"0": ["0-3", [1]]}},
        {"pid": "many"},
        {"pid": float("inf")},
        {"endpoint": 7},
        {"endpoint": None},
    ],
)
def test_a_wrong_field_is_refused_as_a_record_error(change: dict[str, Any]) -> None:
    fields = json.loads(encode_record(worker_record())) | change
    with pytest.raises(RecordError, match="not a lease record"):
        decode_record(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xff\x00", b"[]", b"{}", b"null", b'{"kind":"worker"}', b"[" * 100_000],
    ids=range(7),
)
def test_bytes_that_are_no_record_are_refused_as_a_record_error(payload: bytes) -> None:
    with pytest.raises(RecordError):
        decode_record(payload)


@given(st.frozensets(st.integers(0, 200), min_size=1))
def test_ranges_are_parsed_to_the_numbers_they_were_formatted_from(numbers: frozenset[int]) -> None:
    assert parse_ranges(format_ranges(numbers)) == sorted(numbers)


def test_consecutive_numbers_are_written_as_a_range() -> None:
    assert format_ranges([4, 0, 2, 1, 9]) == "0-2,4,9"


async def test_a_lease_in_memory_is_gone_when_it_ran_out_and_back_when_renewed() -> None:
    now = 0.0
    registry = MemoryRegistry(clock=lambda: now)
    await registry.publish(worker_record("a"), 5.0)
    await registry.publish(shard_record("s"), 50.0)
    now = 4.9
    assert [w.worker_id for w in (await registry.snapshot()).workers] == ["a"]
    now = 5.0
    snapshot = await registry.snapshot()
    assert snapshot.workers == ()
    assert [s.shard_id for s in snapshot.shards] == ["s"]
    await registry.publish(worker_record("a"), 5.0)
    assert len((await registry.snapshot()).workers) == 1


async def test_a_removed_lease_is_gone_at_once_and_removing_it_again_is_no_error() -> None:
    registry = MemoryRegistry()
    await registry.publish(worker_record("b"), 5.0)
    await registry.publish(worker_record("a"), 5.0)
    assert [w.worker_id for w in (await registry.snapshot()).workers] == ["a", "b"]
    await registry.remove("a")
    await registry.remove("a")
    workers = (await registry.snapshot()).workers
    assert [w.worker_id for w in workers] == ["b"]
    assert isinstance(workers[0], WorkerRecord)


def test_a_static_list_is_split_into_addresses() -> None:
    assert parse_endpoints(" a:1, [::1]:2 ,c.d:65535,") == ("a:1", "[::1]:2", "c.d:65535")
    assert parse_endpoints("") == ()


@pytest.mark.parametrize("text", ["a", "a:", ":5", "a:b", "a:0", "a:65536", "a:1,b", "a:1,a:1"])
def test_a_bad_address_in_a_static_list_is_named(text: str) -> None:
    with pytest.raises(ConfigurationError, match="EXPERTFLEET_WORKERS"):
        parse_endpoints(text)
