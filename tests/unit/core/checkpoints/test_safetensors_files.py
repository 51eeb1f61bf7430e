from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from services.core.checkpoints.safetensors_files import READ_BYTES, read_chunks, read_header
from services.core.errors import CheckpointError
from services.core.tensor_codec import tensor_from_buffer, torch_dtype


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 3, 4).to(torch.float16),
        "ids": torch.arange(6),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5),
    }


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def test_headers_and_bytes_agree_with_the_safetensors_library(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    with safe_open(path, framework="pt") as library:
        assert set(header) == set(library.keys())
        for name, stored in header.items():
            expected = library.get_tensor(name)
            assert stored.shape == tuple(expected.shape)
            buffer = bytearray(stored.num_bytes)
            for _ in read_chunks(stored, 0, memoryview(buffer)):
                pass
            if name != "ids":
                read = tensor_from_buffer(buffer, torch_dtype(stored.dtype), stored.shape)
                assert torch.equal(read, expected)
    assert header["ids"].dtype == "I64"


def test_a_run_within_a_tensor_is_read_in_bounded_parts(tmp_path: Path) -> None:
    values = torch.arange(READ_BYTES // 4 + 1000, dtype=torch.float32)
    path = tmp_path / "x.safetensors"
    save_file({"v": values}, path)
    stored = read_header(path)["v"]
    buffer = bytearray(READ_BYTES + 400)
    parts = [len(part) for part in read_chunks(stored, 40, memoryview(buffer))]
    assert parts == [READ_BYTES, 400]
    read = tensor_from_buffer(buffer, torch.float32, (len(buffer) // 4,))
    assert torch.equal(read, values[10 : 10 + len(read)])


def test_a_truncated_file_is_refused_naming_the_tensor_that_is_cut(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    last = max(read_header(path).values(), key=lambda tensor: (tensor.offset, tensor.num_bytes))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        read_header(path)
    assert caught.value.details == {"file": str(path), "tensor": last.name}


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"v": torch.ones(100)}, path)
    stored = read_header(path)["v"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="ended while tensor v was read"):
        list(read_chunks(stored, 0, memoryview(bytearray(400))))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (1 << 40).to_bytes(8, "little"),
        (100).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{{{",
        (4).to_bytes(8, "little") + b'"ab"',
        (2).to_bytes(8, "little") + b"\xff\xff",
    ],
)
def test_a_corrupt_header_is_refused_naming_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors") as caught:
        read_header(path)
    assert caught.value.details["file"] == str(path)


@pytest.mark.parametrize(
    "entry",
    [
        "no object",
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]},
    ],
)
def test_a_corrupt_entry_is_refused_naming_the_tensor(tmp_path: Path, entry: Any) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"w": entry}, bytes(64))
    with pytest.raises(CheckpointError, match="tensor w: corrupt") as caught:
        read_header(path)
    assert caught.value.details["tensor"] == "w"


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")
