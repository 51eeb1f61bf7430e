from __future__ import annotations

import warnings

import pytest
import torch

from protos import experts_pb2
from services.core.errors import CheckpointError, ConfigurationError
from services.core.tensor_codec import (
    DTYPE_TO_PROTO,
    PROTO_TO_DTYPE,
    dtype_name,
    resolve_device,
    tensor_from_buffer,
    tensor_to_bytes,
    torch_dtype,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 3, 4), (0, 8), ()])
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    back = tensor_from_buffer(bytes(tensor_to_bytes(tensor)), dtype, shape)
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_bytes_are_row_major_and_little_endian() -> None:
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t()
    assert bytes(tensor_to_bytes(tensor)) == bytes.fromhex("0000803f 00004040 00000040 00008040")


def test_bytes_of_a_contiguous_tensor_share_its_memory() -> None:
    tensor = torch.zeros(4)
    view = tensor_to_bytes(tensor)
    tensor[0] = 1.0
    assert bytes(view[:4]) == bytes.fromhex("0000803f")


def test_a_tensor_shares_the_memory_of_its_buffer() -> None:
    buffer = bytearray(16)
    tensor = tensor_from_buffer(buffer, torch.float32, (2, 2))
    buffer[:4] = bytes.fromhex("0000803f")
    assert tensor[0, 0] == 1.0


def test_a_read_only_buffer_at_an_odd_offset_is_read_without_a_warning() -> None:
    tensor = torch.randn(6).to(torch.bfloat16)
    message = memoryview(b"\x01" + bytes(tensor_to_bytes(tensor)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tensor_from_buffer(message[1:], torch.bfloat16, (6,)), tensor)


def test_a_buffer_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"15 bytes do not hold torch.float32 \[4\]: 16 do"):
        tensor_from_buffer(bytes(15), torch.float32, (4,))


def test_names_and_proto_values_stand_for_the_same_dtypes() -> None:
    assert [dtype_name(dtype) for dtype in DTYPES] == ["float32", "float16", "bfloat16"]
    for dtype in DTYPES:
        assert torch_dtype(dtype_name(dtype)) == dtype
        assert PROTO_TO_DTYPE[DTYPE_TO_PROTO[dtype]] == dtype
        proto_name = experts_pb2.DType.Name(DTYPE_TO_PROTO[dtype])
        assert proto_name == f"DTYPE_{dtype_name(dtype).upper()}"


def test_other_dtypes_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="float64"):
        torch_dtype("float64")
    with pytest.raises(CheckpointError, match="int8"):
        dtype_name(torch.int8)


def test_a_device_is_resolved_or_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    for name in ("cuda:99", "tpu", "meta"):
        with pytest.raises(ConfigurationError, match=name) as caught:
            resolve_device(name)
        assert caught.value.details["setting"] == "device"
