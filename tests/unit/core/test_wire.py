from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos import experts_pb2
from services.core.errors import FrameTooLargeError, MalformedFrameError
from services.core.expert_ffn import Assignments
from services.core.wire import (
    decode_request,
    decode_response,
    encode_error,
    encode_request,
    encode_response,
)
from services.core.wire_dtype import dequantize_rows, quantize_rows
from tests.support.checkpoints import fresh_seed
from tests.support.frames import random_assignments

MAX_BYTES = 1 << 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed())


def make_request(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "call_id": 2**63 + 5,
        "layer": 3,
        "hidden_states": torch.randn(5, 40, generator=generator).to(dtype),
        "assignments": random_assignments(generator, num_tokens=5, expert_ids=(1, 4, 70)),
        "combine": True,
        "traceparent": "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01",
    }


def stock_request(**changes: Any) -> experts_pb2.DispatchRequest:
    """A small valid message as any protobuf library would fill it, then changed."""
    fields: dict[str, Any] = {
        "hidden_states": torch.arange(6, dtype=torch.float32).numpy().tobytes(),
        "call_id": 7,
        "layer": 1,
        "dtype": experts_pb2.DTYPE_FLOAT32,
        "num_tokens": 2,
        "hidden_size": 3,
        "expert_ids": [0, 2],
        "rows_per_expert": [2, 1],
        "token_rows": np.array([0, 1, 1], dtype="<i4").tobytes(),
        "topk_weights": np.array([0.5, 0.25, 0.75], dtype="<f4").tobytes(),
        "combine": True,
    }
    return experts_pb2.DispatchRequest(**(fields | changes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_comes_back_as_it_was_sent(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    request = make_request(generator, dtype)
    frame = decode_request(encode_request(**request), max_frame_bytes=MAX_BYTES)
    for name in ("call_id", "layer", "combine", "traceparent"):
        assert getattr(frame, name) == request[name]
    assert frame.hidden_states.dtype == dtype
    assert torch.equal(frame.hidden_states, request["hidden_states"])
    assert_same_assignments(frame.assignments, request["assignments"])


@pytest.mark.parametrize("num_experts", [3, 300])
def test_our_request_is_what_protobuf_would_write(
    generator: torch.Generator, num_experts: int
) -> None:
    ids = tuple(range(7, 7 + num_experts))
    request = make_request(generator) | {
        "assignments": random_assignments(generator, num_tokens=5, expert_ids=ids),
        "answer_dtype": torch.bfloat16,
    }
    frame = encode_request(**request)
    message = experts_pb2.DispatchRequest.FromString(frame)
    assert tuple(message.expert_ids) == ids
    assert tuple(message.rows_per_expert) == request["assignments"].rows_per_expert
    # The same fields, whatever their order.
    assert len(message.SerializeToString()) == len(frame)
    assert message.answer_dtype == experts_pb2.DTYPE_BFLOAT16
    decoded = decode_request(frame, max_frame_bytes=MAX_BYTES)
    assert decoded.answer_dtype == torch.bfloat16
    assert_same_assignments(decoded.assignments, request["assignments"])


def test_rows_in_int8_come_back_with_their_scales(generator: torch.Generator) -> None:
    rows = torch.randn(5, 40, generator=generator).bfloat16()
    quantized, scales = quantize_rows(rows)
    request = make_request(generator) | {"hidden_states": quantized, "scales": scales}
    frame = decode_request(encode_request(**request), max_frame_bytes=MAX_BYTES)
    assert frame.scales is not None
    assert torch.equal(frame.scales, scales)
    expected = dequantize_rows(quantized, scales, torch.bfloat16)
    assert torch.equal(frame.rows(torch.bfloat16), expected)


@pytest.mark.parametrize(
    ("scales", "named"),
    [
        (b"", "scales has 0 bytes; 2 tokens take 8"),
        (np.array([1, np.nan], dtype="<f4").tobytes(), "NaN"),
        (np.array([1, -1], dtype="<f4").tobytes(), "negative"),
    ],
)
def test_rows_in_int8_need_a_sound_scale_each(scales: bytes, named: str) -> None:
    message = stock_request(dtype=experts_pb2.DTYPE_INT8, hidden_states=b"123456", scales=scales)
    with pytest.raises(MalformedFrameError, match=named):
        decode_request(message.SerializeToString(), max_frame_bytes=MAX_BYTES)


def test_scales_without_int8_are_refused() -> None:
    message = stock_request(scales=b"1234567\0")
    with pytest.raises(MalformedFrameError, match="INT8 only"):
        decode_request(message.SerializeToString(), max_frame_bytes=MAX_BYTES)


def test_a_stock_parser_reads_our_request(generator: torch.Generator) -> None:
    request = make_request(generator)
    message = experts_pb2.DispatchRequest.FromString(encode_request(**request))
    assert message.call_id == request["call_id"]
    assert message.hidden_states == request["hidden_states"].numpy().tobytes()
    assert list(message.expert_ids) == [1, 4, 70]
    assert (message.num_tokens, message.hidden_size) == (5, 40)
    rows = np.frombuffer(message.token_rows, dtype="<i4").tolist()
    assert rows == request["assignments"].token_rows.tolist()


def test_we_read_a_stock_request() -> None:
    frame = decode_request(stock_request().SerializeToString(), max_frame_bytes=MAX_BYTES)
    assert frame.call_id == 7
    assert frame.hidden_states.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert frame.assignments.expert_ids == (0, 2)
    assert frame.assignments.rows_per_expert == (2, 1)
    assert frame.assignments.token_rows.tolist() == [0, 1, 1]
    assert frame.assignments.token_rows.dtype == torch.int64
    assert frame.assignments.topk_weights.tolist() == [0.5, 0.25, 0.75]


def test_fields_in_another_order_are_parsed_the_ordinary_way() -> None:
    message = stock_request()
    payload = message.hidden_states
    message.ClearField("hidden_states")
    tail = experts_pb2.DispatchRequest(hidden_states=payload)
    frame = decode_request(
        message.SerializeToString() + tail.SerializeToString(), max_frame_bytes=MAX_BYTES
    )
    assert frame.hidden_states.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_of_a_repeated_tensor_the_last_counts_as_protobuf_has_it() -> None:
    first = experts_pb2.DispatchRequest(hidden_states=b"x" * 24).SerializeToString()
    frame = decode_request(first + stock_request().SerializeToString(), max_frame_bytes=MAX_BYTES)
    assert frame.hidden_states.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("num_values", [1, 31, 32, 4095, 4096, 2**19 - 1, 2**19])
def test_lengths_of_any_size_are_written_as_protobuf_writes_them(num_values: int) -> None:
    frame_bytes = encode_response(call_id=1, hidden_states=torch.zeros(1, num_values))
    message = experts_pb2.DispatchResponse.FromString(frame_bytes)
    assert len(message.hidden_states) == 4 * num_values
    assert frame_bytes == message.SerializeToString()


def test_the_tensor_of_a_frame_is_not_copied(generator: torch.Generator) -> None:
    frame_bytes = encode_request(**make_request(generator))
    address = np.frombuffer(frame_bytes, dtype=np.uint8).ctypes.data
    frame = decode_request(frame_bytes, max_frame_bytes=MAX_BYTES)
    assert address <= frame.hidden_states.data_ptr() < address + len(frame_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_response_comes_back_and_a_stock_parser_reads_it(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    rows = torch.randn(3, 8, generator=generator).to(dtype)
    frame_bytes = encode_response(call_id=9, hidden_states=rows, queue_us=12, compute_us=2**40)
    response = decode_response(frame_bytes)
    assert response.hidden_states is not None
    assert torch.equal(response.hidden_states, rows)
    assert (response.call_id, response.queue_us, response.compute_us) == (9, 12, 2**32 - 1)
    assert response.status == experts_pb2.DISPATCH_STATUS_OK
    message = experts_pb2.DispatchResponse.FromString(frame_bytes)
    assert (message.num_rows, len(message.hidden_states)) == (3, 3 * 8 * dtype.itemsize)


def test_an_error_carries_its_status_and_no_rows() -> None:
    response = decode_response(
        encode_error(call_id=4, status=experts_pb2.DISPATCH_STATUS_DRAINING, error="draining")
    )
    assert response.hidden_states is None
    assert (response.call_id, response.error) == (4, "draining")
    assert response.status == experts_pb2.DISPATCH_STATUS_DRAINING


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_tokens": 3}, "hidden_states has 24 bytes"),
        ({"hidden_size": 0}, "hidden_states"),
        ({"hidden_states": b""}, "hidden_states has 0 bytes"),
        ({"dtype": 0}, "dtype 0"),
        ({"dtype": 99}, "dtype 99"),
        ({"expert_ids": []}, "expert_ids"),
        ({"expert_ids": [0]}, "rows_per_expert"),
        ({"expert_ids": [2, 0]}, "ascend"),
        ({"expert_ids": [2, 2]}, "ascend"),
        ({"rows_per_expert": [3, 0]}, "1 or more"),
        ({"rows_per_expert": [2, 2]}, "token_rows has 12 bytes"),
        ({"topk_weights": b"1234"}, "topk_weights has 4 bytes"),
        ({"token_rows": np.array([0, 2, 1], dtype="<i4").tobytes()}, "rows are 0 to 1"),
        ({"token_rows": np.array([-1, 1, 1], dtype="<i4").tobytes()}, "rows are 0 to 1"),
        ({"token_rows": np.array([1, 1, 1], dtype="<i4").tobytes()}, "ascend strictly"),
        ({"topk_weights": np.array([1, np.nan, 1], dtype="<f4").tobytes()}, "NaN"),
        ({"topk_weights": np.array([1, np.inf, 1], dtype="<f4").tobytes()}, "infinity"),
    ],
)
def test_a_fault_in_a_request_is_named_with_its_call(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(MalformedFrameError, match=named) as raised:
        decode_request(stock_request(**changes).SerializeToString(), max_frame_bytes=MAX_BYTES)
    assert raised.value.details["call_id"] == 7


def test_a_row_that_descends_between_two_experts_is_fine() -> None:
    rows = np.array([0, 1, 0], dtype="<i4").tobytes()
    frame = decode_request(
        stock_request(token_rows=rows).SerializeToString(), max_frame_bytes=MAX_BYTES
    )
    assert frame.assignments.token_rows.tolist() == [0, 1, 0]


def test_rows_out_of_order_inside_a_longer_run_are_refused() -> None:
    request = stock_request(
        hidden_states=bytes(4 * 3 * 4),
        num_tokens=4,
        expert_ids=[5],
        rows_per_expert=[4],
        token_rows=np.array([0, 2, 1, 3], dtype="<i4").tobytes(),
        topk_weights=np.ones(4, dtype="<f4").tobytes(),
    )
    with pytest.raises(MalformedFrameError, match="ascend strictly"):
        decode_request(request.SerializeToString(), max_frame_bytes=MAX_BYTES)


def test_a_frame_over_the_bound_is_refused_with_its_call() -> None:
    frame_bytes = stock_request().SerializeToString()
    with pytest.raises(FrameTooLargeError, match=str(len(frame_bytes))) as raised:
        decode_request(frame_bytes, max_frame_bytes=len(frame_bytes) - 1)
    assert raised.value.details["call_id"] == 7
    assert decode_request(frame_bytes, max_frame_bytes=len(frame_bytes)).call_id == 7


@given(frame_bytes=st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_malformed_frames(frame_bytes: bytes) -> None:
    assert_only_malformed(
        lambda: decode_request(frame_bytes, max_frame_bytes=150),
        lambda: decode_response(frame_bytes),
    )


@given(data=st.data())
def test_truncated_and_flipped_frames_raise_nothing_but_malformed_frames(
    data: st.DataObject,
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    request = encode_request(**make_request(generator))
    response = encode_response(call_id=3, hidden_states=torch.ones(2, 3))
    broken = [bytearray(request), bytearray(response)]
    for frame_bytes in broken:
        for _ in range(data.draw(st.integers(0, 4))):
            frame_bytes[data.draw(st.integers(0, len(frame_bytes) - 1))] = data.draw(
                st.integers(0, 255)
            )
        del frame_bytes[data.draw(st.integers(0, len(frame_bytes))) :]
    assert_only_malformed(
        lambda: decode_request(bytes(broken[0]), max_frame_bytes=MAX_BYTES),
        lambda: decode_response(bytes(broken[1])),
    )


@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "hidden_states": st.binary(max_size=64),
            "num_tokens": st.integers(0, 2**32 - 1),
            "hidden_size": st.integers(0, 2**32 - 1),
            "dtype": st.integers(-(2**31), 2**31 - 1),
            "expert_ids": st.lists(st.integers(0, 2**32 - 1), max_size=4),
            "rows_per_expert": st.lists(st.integers(0, 2**32 - 1), max_size=4),
            "token_rows": st.binary(max_size=32),
            "topk_weights": st.binary(max_size=32),
        },
    )
)
def test_well_formed_protobuf_with_any_values_raises_nothing_but_malformed_frames(
    fields: dict[str, Any],
) -> None:
    frame_bytes = stock_request(**fields).SerializeToString()
    assert_only_malformed(lambda: decode_request(frame_bytes, max_frame_bytes=MAX_BYTES))


def assert_only_malformed(*decodes: Callable[[], object]) -> None:
    for decode in decodes:
        try:
            decode()
        except MalformedFrameError as error:
            assert isinstance(error.details["call_id"], int)


def assert_same_assignments(result: Assignments, expected: Assignments) -> None:
    assert result.expert_ids == expected.expert_ids
    assert result.rows_per_expert == expected.rows_per_expert
    assert torch.equal(result.token_rows, expected.token_rows)
    assert torch.equal(result.topk_weights, expected.topk_weights)
