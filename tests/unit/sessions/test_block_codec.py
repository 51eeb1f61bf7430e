from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sessions.block_codec import (
    HEADER_BYTES,
    BlockRefusedError,
    decode_block,
    encode_block,
)
from services.sessions.store import BlockLayout
from tests.support.session_blocks import LAYOUT, OTHER_MODEL, OTHER_SHAPE

HASH = bytes(range(100, 132))
PAYLOAD = os.urandom(LAYOUT.payload_bytes)
VALUE = encode_block(LAYOUT, HASH, PAYLOAD)


def refusal(value: bytes, layout: BlockLayout = LAYOUT, block_hash: bytes = HASH) -> str:
    with pytest.raises(BlockRefusedError) as caught:
        decode_block(layout, block_hash, value)
    return caught.value.reason


def test_a_block_comes_back_without_a_copy() -> None:
    payload = decode_block(LAYOUT, HASH, VALUE)
    assert payload == PAYLOAD
    assert payload.obj is VALUE
    assert payload.readonly
    assert len(VALUE) == HEADER_BYTES + LAYOUT.payload_bytes


def test_a_payload_of_any_element_type_is_taken_as_bytes() -> None:
    halves = memoryview(PAYLOAD).cast("H")
    assert encode_block(LAYOUT, HASH, halves) == VALUE


def test_every_single_flipped_bit_of_the_header_is_refused() -> None:
    expected = {range(4): "foreign", range(4, 8): "version", range(96, 104): "torn"}
    for position in range(HEADER_BYTES):
        for bit in range(8):
            flipped = bytearray(VALUE)
            flipped[position] ^= 1 << bit
            reason = next((r for span, r in expected.items() if position in span), "tampered")
            assert refusal(bytes(flipped)) == reason, (position, bit)


@given(st.integers(HEADER_BYTES, len(VALUE) - 1), st.integers(1, 255))
def test_every_changed_byte_of_the_payload_is_refused(position: int, change: int) -> None:
    changed = bytearray(VALUE)
    changed[position] ^= change
    assert refusal(bytes(changed)) == "tampered"


@given(st.integers(0, len(VALUE) - 1))
def test_every_truncation_is_refused(length: int) -> None:
    assert refusal(VALUE[:length]) == ("torn" if length >= 4 else "foreign")


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_garbage_is_refused_whatever_it_is(garbage: bytes) -> None:
    assert refusal(garbage) in ("foreign", "version", "torn", "tampered")
    assert refusal(VALUE[:8] + garbage) in ("torn", "tampered")


@pytest.mark.parametrize(
    "other",
    [
        OTHER_MODEL,
        OTHER_SHAPE,
        replace(LAYOUT, model_fingerprint=LAYOUT.model_fingerprint + b"\1"),
        replace(LAYOUT, first_layer=2),
        replace(LAYOUT, dtype="float16"),
        replace(LAYOUT, num_kv_heads=1, head_dim=16),
        replace(LAYOUT, dtype="float32", head_dim=4),
    ],
)
def test_a_sound_block_of_another_model_or_layout_is_foreign(other: BlockLayout) -> None:
    value = encode_block(other, HASH, os.urandom(other.payload_bytes))
    assert refusal(value) == "foreign"
    assert refusal(VALUE, layout=other) == "foreign"


def test_a_sound_block_under_another_key_is_refused() -> None:
    assert refusal(VALUE, block_hash=HASH[::-1]) == "tampered"


def test_layouts_that_make_no_sense_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="8 to 32"):
        replace(LAYOUT, model_fingerprint=b"short")
    with pytest.raises(ValueError, match="bfloat16"):
        replace(LAYOUT, dtype="int8")
