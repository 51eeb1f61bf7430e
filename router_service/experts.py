"""The seam between the decoder and its experts: in process, or dispatched over the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from opentelemetry.trace import Span

from services.core.errors import ExpertUnavailableError
from services.core.kernels.attention import NativeAttention
from services.core.kernels.attention_part import LayerAttention
from services.core.tracing import span_context


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What travels with one micro-batch of one step through the layers.

    `micro_batch` picks the stream to each worker; `num_micro_batches` are in flight.
    `trace` is there when this step is sampled.
    With `incidents`, rows whose experts are away for longer than a moment are left behind and
    noted there; without, the call waits.
    """

    step: int = 0
    micro_batch: int = 0
    num_micro_batches: int = 1
    trace: StepTrace | None = None
    incidents: StepIncidents | None = None


class StepTrace:
    """The span of a sampled step, and what is to be recorded under it."""

    __slots__ = ("_late", "parent", "span")

    def __init__(self, span: Span) -> None:
        self.span = span
        self.parent = span_context(span)
        """The context of spans under it."""
        self._late: list[Callable[[], object]] = []

    @property
    def trace_id(self) -> int:
        return self.span.get_span_context().trace_id

    def later(self, record: Callable[[], object]) -> None:
        """Call `record` when the step's tokens are out: a span made between two layers would hold
        them up."""
        self._late.append(record)

    def end(self, end_ns: int) -> None:
        """Record it all; the step ended at `end_ns`, Unix time."""
        for record in self._late:
            record()
        self.span.end(end_time=end_ns)


class Resend(NamedTuple):
    """A frame of this micro-batch was sent again, for `reason`."""

    layer: int
    worker_id: str
    reason: str


class MissingExperts(NamedTuple):
    """Experts of a layer that had no usable replica, and rows [t] of the batch that needed them."""

    layer: int
    experts: tuple[int, ...]
    rows: NDArray[np.int64]


class StepIncidents:
    """What befell a micro-batch on its way through the layers; written by its experts.

    A row that was left behind has passed through a layer without all of its experts. What was
    computed for its sequence from then on must neither be sampled nor kept.
    """

    __slots__ = ("_is_left_behind", "missing", "resends")

    def __init__(self) -> None:
        self.missing: list[MissingExperts] = []
        self.resends: list[Resend] = []
        self._is_left_behind: NDArray[np.bool_] | None = None

    def leave_behind(self, missing: MissingExperts, num_rows: int) -> None:
        """Note it for a batch of `num_rows`. Raises `NothingLeftError` when no row is left."""
        if self._is_left_behind is None:
            self._is_left_behind = np.zeros(num_rows, dtype=np.bool_)
        self.missing.append(missing)
        self._is_left_behind[missing.rows] = True
        if self._is_left_behind.all():
            raise NothingLeftError

    def missing_of(self, first: int, stop: int) -> MissingExperts | None:
        """What was missed first by the rows of one sequence."""
        for missing in self.missing:
            if ((missing.rows >= first) & (missing.rows < stop)).any():
                return missing
        return None


class NothingLeftError(Exception):
    """Every row of a micro-batch was left behind: going on would compute nothing of use."""


@runtime_checkable
class ExpertAvailability(Protocol):
    """Experts that can be away for a while, and say when that changes. Used on their loop."""

    @property
    def expert_wait_s(self) -> float:
        """How long a request may wait for them."""
        ...

    def is_available(self, slots: Iterable[tuple[int, int]]) -> bool: ...

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back, on the loop, whenever experts came or went."""
        ...

    def count_wait(self, seconds: float) -> None:
        """A sequence waited so long for experts that were away."""
        ...


def expert_unavailable(
    layer: int, experts: Iterable[int], wait_s: float, last_fault: str = ""
) -> ExpertUnavailableError:
    """The error of a request whose experts stayed away."""
    missing = sorted(experts)
    listed = ",".join(map(str, missing))
    fault = f" (last fault: {last_fault})" if last_fault else ""
    return ExpertUnavailableError(
        f"layer {layer}: no worker computed experts {listed} within {wait_s:g} s{fault}; start a "
        f"worker with `expertfleet expert --experts {listed} --layers {layer}`, or see its log",
        layer=layer,
        expert=missing[0],
        experts=missing,
    )


class StepLayers(NamedTuple):
    """What native code needs for what comes before the experts of each layer, in one step.

    `layers` is the same object in every step of a decoder with the same cache.
    """

    layers: Sequence[LayerAttention]
    attention: NativeAttention


class LayersDone(NamedTuple):
    """Layers before `next_layer` are over; `update` [T, H] is what the last one's experts gave, and
    `attention_s` the seconds that went into what comes before experts."""

    next_layer: int
    update: torch.Tensor
    attention_s: float


@runtime_checkable
class RunsLayers(Protocol):
    """Experts that can go on from layer to layer by themselves."""

    async def forward_layers(
        self,
        first: int,
        layers: StepLayers,
        x: torch.Tensor,
        update: torch.Tensor,
        context: StepContext,
    ) -> LayersDone | None:
        """Compute `first` and layers after it, each as `NativeAttentionPart` and
        `ExpertBackend.forward` do, with the same bits; `update` [T, H], the output of the layer
        before, is added to x [T, H] first. At least one, or None where this is not for them.

        `LayersDone.update` may be overwritten by the next call. Raises as `ExpertBackend.forward`.
        """
        ...


class ExpertBackend(Protocol):
    """Computes the experts' part of a MoE layer.

    `hidden_states` [T, H] in the activation dtype, `topk_ids` int64 [T, K] distinct within a
    row, `topk_weights` float32 [T, K]. Returns [T, H] in the activation dtype: per token the sum
    over its experts of weight * FFN(row), each weighted row rounded to the activation dtype first;
    for K > 2 rows are summed in ascending expert id. The input is not written to.

    Raises `ExpertUnavailableError` when an expert has no replica for longer than `expert_wait_s`,
    `NothingLeftError` where `context.incidents` has every row. An expert is never skipped, save
    for rows noted there.
    """

    async def forward(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        context: StepContext,
    ) -> torch.Tensor: ...

    async def wait_ready(self) -> None:
        """Return when every slot of the model has a replica; raise `UnavailableError` if not
        within `expert_wait_s`, naming the missing slots."""
        ...

    def check_ready(self) -> None:
        """Raise `UnavailableError` naming missing slots; return at once otherwise."""
        ...

    def slot_digests(self) -> Mapping[tuple[int, int], bytes]:
        """Digest of every (layer, expert) slot's weights, for the model fingerprint."""
        ...

    async def close(self) -> None: ...
