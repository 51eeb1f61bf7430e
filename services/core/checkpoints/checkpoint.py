"""A checkpoint's tensors by their canonical names, each read when it is asked for.

Shapes: H hidden, F intermediate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from services.core.checkpoints.hub import find_model
from services.core.checkpoints.model_files import ModelFiles, Progress
from services.core.checkpoints.quantized_tensors import (
    StoredQuantized,
    StoredQuantizedRows,
    locate_quantized,
    quantized_format,
)
from services.core.checkpoints.safetensors_files import StoredTensor, read_chunks, read_header
from services.core.checkpoints.tensor_names import (
    Order,
    TensorSource,
    dense_tensor_names,
    expert_tensor_names,
    non_expert_tensor_names,
    slot_tensor_names,
    tensor_sources,
)
from services.core.checkpoints.weight_map import WeightMap, read_weight_map
from services.core.errors import CheckpointError
from services.core.model_config import DTYPES, ModelConfig, load_model_config
from services.core.quantization.formats import QuantizedFormat
from services.core.registry import Slot
from services.core.row_source import LazyRows, RowSource
from services.core.tensor_codec import tensor_to_bytes, torch_dtype

DIGEST_BYTES = 16
_SAMPLE_BYTES = 4096
_PART_DTYPES = {"I8": torch.int8, "I32": torch.int32}
"""Of the integers of quantised weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One FFN: w2(act(w1 x) * w3 x)."""

    w1: torch.Tensor
    """[F, H], the gate projection."""
    w2: torch.Tensor
    """[H, F], the down projection."""
    w3: torch.Tensor
    """[F, H], the up projection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRows:
    """`ExpertWeights` of which rows are read as they are taken; quantised ones are
    `QuantizedSource`s too."""

    w1: RowSource
    w2: RowSource
    w3: RowSource


class Checkpoint:
    """An opened checkpoint. Only the shards of tensors that are asked for are opened.

    Every tensor returned is in the dtype it is stored in (a quantised weight, multiplied out, in
    the config's dtype), owns its memory, has the shape that the config implies, and is finite.
    Reading one takes no more memory than the tensor (for Mistral's
    layout, q and k take it twice for a moment). All methods raise `CheckpointError` naming file
    and tensor. Not for concurrent use from several threads.
    """

    def __init__(
        self,
        model: ModelFiles,
        *,
        name: str,
        config: ModelConfig,
        weight_map: WeightMap,
        progress: Progress | None = None,
    ) -> None:
        self.name = name
        self.folder: Path = model.folder
        self.config = config
        self.bytes_read = 0
        self._model = model
        self._weight_map = weight_map
        self._progress = progress
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._required: dict[str, int] = {}

    @classmethod
    def open(
        cls, model: str, *, cache_dir: Path | None = None, progress: Progress | None = None
    ) -> Checkpoint:
        """Open a folder or a hub id. Reads config and index; with an index, no shard.

        `name` becomes the last part of the path or id.
        """
        files = find_model(model, cache_dir=cache_dir, progress=progress)
        return cls(
            files,
            name=Path(model).expanduser().absolute().name,
            config=load_model_config(files.folder),
            weight_map=read_weight_map(files),
            progress=progress,
        )

    @property
    def opened_files(self) -> frozenset[str]:
        """Names of the weight files of which at least a header was read for their tensors."""
        return frozenset(self._headers)

    def require(self, *, slots: Iterable[Slot] = (), non_expert: bool = False) -> None:
        """Make sure that all tensors of the slots, or of the rest of the model, can be read.

        Downloads the shards that hold them, and checks their headers; no tensor is read. What is
        required is the total that progress is told of.
        """
        names = slot_tensor_names(frozenset(slots))
        if non_expert:
            names += non_expert_tensor_names(self.config)
        for name in names:
            if quantized := self._locate_quantized(name):
                self._required[name] = quantized.num_bytes
                continue
            source, stored = self._locate(name)
            self._required[name] = _run_range(source, stored)[1]

    def quantized_format(self, name: str) -> QuantizedFormat | None:
        """How the weight of that canonical name is quantised; None where it is stored as floats."""
        return quantized_format(name, self._weight_map.files)

    def stored_dtype(self, name: str) -> str:
        """torch's name of the dtype that a tensor which is not quantised is stored in."""
        return self._locate(name)[1].dtype

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read one tensor by its canonical name (`tensor_names`); `shape` is checked."""
        if quantized := self._locate_quantized(name):
            return self._quantized_rows(name, shape, quantized)[:]
        source, stored = self._locate(name)
        run = torch.empty(source.shape, dtype=torch_dtype(stored.dtype))
        self._read(name, stored, source, run)
        tensor = _in_canonical_order(run, source.order, self.config.head_dim)
        _check_shape(tensor.shape, shape, stored)
        return tensor

    def rows_of(self, name: str, shape: tuple[int, int]) -> RowSource:
        """The tensor as `tensor` gives it, but each slice of rows is read when it is taken.

        A tensor that is stored in another order is read at once. A quantised one is a
        `QuantizedSource` too.
        """
        if quantized := self._locate_quantized(name):
            return self._quantized_rows(name, shape, quantized)
        source, stored = self._locate(name)
        if source.order != "as_is":
            return self.tensor(name, shape)
        _check_shape(source.shape, shape, stored)
        self._required.setdefault(name, _run_range(source, stored)[1])
        return LazyRows(shape, partial(self._read_rows, name, stored, source))

    def expert_rows(self, layer: int, expert: int) -> ExpertRows:
        """The weights of one slot, read as their rows are taken."""
        return self._ffn_rows(expert_tensor_names(layer, expert))

    def dense_mlp(self, layer: int) -> ExpertRows:
        """The FFN of a layer of a dense model, read as its rows are taken."""
        return self._ffn_rows(dense_tensor_names(layer))

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """The weights of one (layer, expert) slot."""
        return self._ffn(expert_tensor_names(layer, expert))

    def digest(self, names: Iterable[str]) -> bytes:
        """16 bytes that tell apart tensors that differ; no guard against forgery.

        Of each tensor the dtype, the shape and the first and last 4 KiB as stored are hashed: a
        few reads instead of gigabytes. The classic and the fused layout of the same weights have
        the same digest, and so has Mistral's, save for tensors that it stores in another order.
        The order of `names` does not matter; bytes sampled are not counted in `bytes_read`.
        """
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for name in sorted(set(names)):
            if quantized := self._locate_quantized(name):
                for stored in quantized.parts:
                    digest.update(f"{stored.name} {stored.dtype} {stored.shape}\n".encode())
                    _add_samples(digest, stored, 0, stored.num_bytes)
                continue
            source, stored = self._locate(name)
            digest.update(f"{name} {stored.dtype} {source.shape} {source.order}\n".encode())
            _add_samples(digest, stored, *_run_range(source, stored))
        return digest.digest()

    def slot_digest(self, layer: int, expert: int) -> bytes:
        """Digest of one expert's weights."""
        return self.digest(expert_tensor_names(layer, expert))

    def non_expert_digest(self) -> bytes:
        """Digest of all that an attention shard computes with: weights and config."""
        config = self.config
        digest = hashlib.blake2b(self.digest(non_expert_tensor_names(config)), digest_size=16)
        computed_with = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.num_experts_per_tok,
            config.rms_norm_eps,
            config.rope_theta,
            config.sliding_window,
            config.hidden_act,
        )
        digest.update(repr(computed_with).encode())
        return digest.digest()

    def _ffn(self, names: tuple[str, str, str]) -> ExpertWeights:
        hidden, intermediate = self.config.hidden_size, self.config.intermediate_size
        w1, w2, w3 = names
        return ExpertWeights(
            w1=self.tensor(w1, (intermediate, hidden)),
            w2=self.tensor(w2, (hidden, intermediate)),
            w3=self.tensor(w3, (intermediate, hidden)),
        )

    def _ffn_rows(self, names: tuple[str, str, str]) -> ExpertRows:
        hidden, intermediate = self.config.hidden_size, self.config.intermediate_size
        w1, w2, w3 = names
        return ExpertRows(
            w1=self.rows_of(w1, (intermediate, hidden)),
            w2=self.rows_of(w2, (hidden, intermediate)),
            w3=self.rows_of(w3, (intermediate, hidden)),
        )

    def _locate(self, name: str) -> tuple[TensorSource, StoredTensor]:
        for source in tensor_sources(name, self.config):
            if source.name in self._weight_map.files:
                stored = self._stored(source.name)
                _check_stored(stored, source)
                return source, stored
        raise self._lacks(name)

    def _locate_quantized(self, name: str) -> StoredQuantized | None:
        """Quantised weights have the canonical names, and the canonical order."""
        weight_format = quantized_format(name, self._weight_map.files)
        if weight_format is None:
            return None
        num_outputs, num_inputs = tensor_sources(name, self.config)[0].shape
        return locate_quantized(name, (num_outputs, num_inputs), weight_format, self._stored)

    def _quantized_rows(
        self, name: str, shape: tuple[int, ...], quantized: StoredQuantized
    ) -> StoredQuantizedRows:
        _check_shape(quantized.shape, shape, quantized.values)
        self._required.setdefault(name, quantized.num_bytes)
        return StoredQuantizedRows(
            quantized,
            dtype=torch_dtype(self.config.dtype),
            read=self._read_part_rows,
        )

    def _stored(self, stored_name: str) -> StoredTensor:
        file = self._weight_map.files.get(stored_name)
        if file is None:
            raise self._lacks(stored_name)
        stored = self._header(file, stored_name).get(stored_name)
        if stored is None:
            raise CheckpointError(
                f"{self.folder / file} lacks tensor {stored_name}, "
                f"which {self._weight_map.origin} says it holds",
                file=str(self.folder / file),
                tensor=stored_name,
            )
        return stored

    def _lacks(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self._weight_map.origin} lacks tensor {name}; the checkpoint is incomplete, "
            "or its config.json belongs to another",
            file=str(self._weight_map.origin),
            tensor=name,
        )

    def _header(self, file: str, tensor: str) -> dict[str, StoredTensor]:
        if file not in self._headers:
            try:
                self._headers[file] = read_header(self._model.fetch(file))
            except CheckpointError as error:
                error.details.setdefault("tensor", tensor)
                raise
        return self._headers[file]

    def _read_rows(
        self, name: str, stored: StoredTensor, source: TensorSource, first: int, count: int
    ) -> torch.Tensor:
        shape = (count, *source.shape[1:])
        start = source.start + first * math.prod(source.shape[1:])
        run = torch.empty(shape, dtype=torch_dtype(stored.dtype))
        self._read(name, stored, replace(source, shape=shape, start=start), run)
        return run

    def _read_part_rows(self, stored: StoredTensor, first: int, count: int) -> torch.Tensor:
        """Rows of a part of a quantised weight."""
        dtype = _PART_DTYPES.get(stored.dtype) or torch_dtype(stored.dtype)
        row = stored.shape[1:]
        run = torch.empty((count, *row), dtype=dtype)
        self._fill(stored, first * math.prod(row), run)
        return run

    def _read(
        self, name: str, stored: StoredTensor, source: TensorSource, run: torch.Tensor
    ) -> None:
        self._required.setdefault(name, _run_range(source, stored)[1])
        self._fill(stored, source.start, run)

    def _fill(self, stored: StoredTensor, start: int, run: torch.Tensor) -> None:
        """Read `run` from its element `start` of the stored tensor on."""
        flat, done = run.view(-1), 0
        for part in read_chunks(stored, start * run.itemsize, tensor_to_bytes(run)):
            values = flat[done : done + len(part) // run.itemsize]
            if run.is_floating_point():
                _check_finite(values, stored, start + done)
            done += len(values)
            self.bytes_read += len(part)
            if self._progress:
                total_bytes = max(sum(self._required.values()), self.bytes_read)
                self._progress(self.bytes_read, total_bytes, "reading weights")


def _add_samples(digest: hashlib.blake2b, stored: StoredTensor, start: int, num_bytes: int) -> None:
    sample = bytearray(min(_SAMPLE_BYTES, num_bytes))
    for offset in (start, start + num_bytes - len(sample)):
        for part in read_chunks(stored, offset, memoryview(sample)):
            digest.update(part)


def _run_range(source: TensorSource, stored: StoredTensor) -> tuple[int, int]:
    """First byte within the stored tensor, and number of bytes, of a source's run."""
    item_bytes = torch_dtype(stored.dtype).itemsize
    return source.start * item_bytes, math.prod(source.shape) * item_bytes


def _in_canonical_order(run: torch.Tensor, order: Order, head_dim: int) -> torch.Tensor:
    """The canonical tensor of a run as it was stored; contiguous."""
    if order == "transposed":
        return run.t().contiguous()
    if order == "rotary_pairs":
        pairs = run.view(-1, head_dim // 2, 2, run.shape[1])
        return pairs.transpose(1, 2).reshape(run.shape)
    return run


def _check_stored(stored: StoredTensor, source: TensorSource) -> None:
    if stored.dtype not in DTYPES:
        raise _tensor_error(stored, f"has dtype {stored.dtype}; served are {', '.join(DTYPES)}")
    if stored.shape != source.stored_shape:
        raise _tensor_error(
            stored,
            f"has shape {list(stored.shape)}, but the config implies {list(source.stored_shape)}",
        )


def _check_finite(values: torch.Tensor, stored: StoredTensor, start: int) -> None:
    """One vectorised pass: a NaN spreads to both extremes, an infinity is one of them."""
    least, most = values.aminmax()
    if math.isfinite(least.item()) and math.isfinite(most.item()):
        return
    at = int(torch.isfinite(values).logical_not_().nonzero()[0, 0])
    raise _tensor_error(stored, f"has the value {values[at].item()} at element {start + at}")


def _check_shape(shape: Sequence[int], wanted: Sequence[int], stored: StoredTensor) -> None:
    if tuple(shape) != tuple(wanted):
        raise _tensor_error(stored, f"has shape {list(shape)}, but {list(wanted)} was asked for")


def _tensor_error(stored: StoredTensor, what: str) -> CheckpointError:
    return CheckpointError(
        f"{stored.file}: tensor {stored.name} {what}", file=str(stored.file), tensor=stored.name
    )
