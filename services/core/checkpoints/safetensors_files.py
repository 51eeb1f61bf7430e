"""Headers of safetensors files, and plain reads of tensor bytes.

The library's own reader maps the file, so the pages it touched count against the process until
the file is closed, and a truncated file ends in a bus error. The format is an 8-byte little-endian
length, that many bytes of JSON, then the data; reading the header here makes the truncation check
and the count of bytes read exact, and plain reads go straight into the tensor's own buffer.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.core.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The bound that the safetensors library sets."""

READ_BYTES = 16 << 20
"""Bytes of one read; small enough that a check of what was read finds it in the cache."""

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies. `dtype` is torch's name where expertfleet reads it, else the file's.

    `offset` counts from the start of the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name. No tensor data is read.

    Raises `CheckpointError` when the file does not exist, the header is corrupt, or the file is
    shorter than its header says, naming the first tensor that is cut.
    """
    try:
        with file.open("rb") as stream:
            file_bytes = stream.seek(0, 2)
            stream.seek(0)
            header_bytes = int.from_bytes(stream.read(8), "little")
            if file_bytes < 8 or not 2 <= header_bytes <= MAX_HEADER_BYTES:
                raise _corrupt(file, f"no header in {file_bytes} bytes; is it a safetensors file?")
            if file_bytes < 8 + header_bytes:
                raise _corrupt(file, "truncated within its header")
            entries = json.loads(stream.read(header_bytes))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}", file=str(file)) from error
    except ValueError as error:
        raise _corrupt(file, f"corrupt header: {error}") from error
    if not isinstance(entries, dict):
        raise _corrupt(file, "corrupt header: not a JSON object")
    entries.pop("__metadata__", None)
    tensors = {
        name: _stored_tensor(file, name, entry, 8 + header_bytes) for name, entry in entries.items()
    }
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset + tensor.num_bytes > file_bytes:
            raise CheckpointError(
                f"{file} is truncated: it has {file_bytes} bytes, but tensor {tensor.name} ends at "
                f"{tensor.offset + tensor.num_bytes}; copy or download it again",
                file=str(file),
                tensor=tensor.name,
            )
    return tensors


def read_chunks(tensor: StoredTensor, start: int, buffer: memoryview) -> Iterator[memoryview]:
    """Fill `buffer` with the tensor's bytes from `start` on; yields each part once it
    is filled, all but the last of `READ_BYTES`.

    Raises `CheckpointError` when the file ends early or cannot be read.
    """
    assert start + len(buffer) <= tensor.num_bytes
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.offset + start)
            for begin in range(0, len(buffer), READ_BYTES):
                part = buffer[begin : begin + READ_BYTES]
                done = 0
                while done < len(part):
                    num_read = stream.readinto(part[done:])
                    if not num_read:
                        raise CheckpointError(
                            f"{tensor.file} ended while tensor {tensor.name} was read; "
                            "was it changed meanwhile?",
                            file=str(tensor.file),
                            tensor=tensor.name,
                        )
                    done += num_read
                yield part
    except OSError as error:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} cannot be read: {error}",
            file=str(tensor.file),
            tensor=tensor.name,
        ) from error


def _stored_tensor(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype = str(entry["dtype"])
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(file, f"corrupt header entry: {error!r}", tensor=name) from error
    expected = math.prod(shape) * _ITEM_BYTES.get(dtype, 0)
    if not 0 <= begin <= end or min(shape, default=0) < 0 or (expected and end - begin != expected):
        raise _corrupt(
            file, f"corrupt header entry: {dtype} {list(shape)} at {begin}:{end}", tensor=name
        )
    return StoredTensor(
        file=file,
        name=name,
        dtype=_DTYPE_NAMES.get(dtype, dtype),
        shape=shape,
        offset=data_start + begin,
        num_bytes=end - begin,
    )


def _corrupt(file: Path, what: str, *, tensor: str | None = None) -> CheckpointError:
    at = f", tensor {tensor}" if tensor else ""
    details = {"tensor": tensor} if tensor else {}
    return CheckpointError(f"{file}{at}: {what}", file=str(file), **details)
