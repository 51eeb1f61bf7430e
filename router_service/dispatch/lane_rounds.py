"""Layer calls that native code carries whole: plan, frames, answers and their sum in one call.

Between two layers the experts' weights pass through all caches, so that every function run for a
call starts cold; what counts is how few of them there are. Calls that are not of the common kind,
and what a round could not bring, go the way of `LayerDispatch`.

Shapes: T tokens, K experts per token, E experts, W workers, H hidden_size.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router_service.dispatch.lane_hub import LaneHub
from router_service.dispatch.lane_transport import LaneWorkerLink
from router_service.dispatch.replica_choice import Share
from router_service.dispatch.transport import WorkerLink
from services.core.lane.client import DTYPES, MAX_TOP_K, RoundPart, RoundRequest, RoundState
from services.core.lane.layers import LayersRequest

BLOCKING_WAIT_S = 0.02
"""How long the loop may stand still for a call that is alone in flight. Going back to the loop and
being woken by it costs a decode call more than anything else that is left."""

_NO_SHARES = array("q")


class LaneRounds:
    """Used on one event loop."""

    def __init__(self, hub: LaneHub, *, blocking_wait_s: float = BLOCKING_WAIT_S) -> None:
        self._hub = hub
        self._blocking_wait_s = blocking_wait_s
        self._num_in_flight = 0
        self._connections: dict[int, tuple[Sequence[WorkerLink], array[int]]] = {}

    def start(
        self,
        *,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        worker_of_expert: NDArray[np.int64],
        links: Sequence[WorkerLink],
        max_rows: array[int],
        shares: Sequence[Share],
        stream: int,
        may_block: bool,
        traceparents: bytes | None = None,
    ) -> LaneRound | None:
        """Send a call's frames, `worker_of_expert` int64 [E] to `links` [W] with at most
        `max_rows` int64 [W] rows each. Experts in `shares` go to several. `traceparents`: as
        `RoundRequest` has them.

        None, with nothing sent, where a token is not finite, a worker has no lane, or shapes and
        dtypes are not those of `RoundRequest`. With `may_block` the round is likely over when this
        returns, unless others are in flight.
        """
        if (
            hidden_states.dtype not in DTYPES
            or topk_ids.dtype != torch.int64
            or topk_ids.shape[1] > MAX_TOP_K
            or not hidden_states.is_cpu
            or not hidden_states.is_contiguous()
            or not topk_ids.is_contiguous()
            or not topk_weights.is_contiguous()
        ):
            return None
        request = RoundRequest(
            layer=layer,
            hidden_states=hidden_states,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            worker_of_expert=worker_of_expert,
            connections=self.connections_of(links, stream),
            max_rows=max_rows,
            shares=_share_words(shares) if shares else _NO_SHARES,
            traceparents=traceparents,
        )
        round_ = LaneRound(self._hub, request)
        is_alone = may_block and self._num_in_flight == 0
        if not round_.run(self._blocking_wait_s if is_alone else 0.0):
            return None
        return round_

    def run_layers(
        self, layers: LayersRequest, request_of: Callable[[int], RoundRequest]
    ) -> LaneRound | None:
        """Run them, while `can_run_layers`. The round of the first that is not whole, whose
        request is `request_of(layers.num_whole)`; None where nothing was sent for that one, or
        where there is none."""
        round_id = self._hub.run_layers(layers, wait_s=self._blocking_wait_s)
        if round_id <= 0:
            return None
        return LaneRound(self._hub, request_of(layers.num_whole), round_id)

    @property
    def can_run_layers(self) -> bool:
        """Whether there are lanes, and no other call is in flight on them."""
        return self._num_in_flight == 0 and self._hub.has_connections

    async def wait(self, round_: LaneRound, timeout_s: float) -> bool:
        """Whether the round became whole in time. If not, it is over, and `parts` of it are as they
        were then."""
        self._num_in_flight += 1
        try:
            await round_.wait(timeout_s)
        except BaseException:
            round_.release()
            raise
        finally:
            self._num_in_flight -= 1
        if not round_.is_whole:
            self._hub.catch_up()  # the loop itself may have been held up
        if not round_.is_whole:
            round_.give_up()
        return round_.is_whole

    def connections_of(self, links: Sequence[WorkerLink], stream: int) -> array[int]:
        """[W]; made when they are first needed, and again for other links."""
        known = self._connections.get(stream)
        if known is not None and known[0] is links:
            return known[1]
        made = array("q", [_connection(link, stream) for link in links])
        self._connections[stream] = links, made
        return made


class LaneRound:
    """One call's frames. It ends by itself when it is whole, else it must be ended."""

    __slots__ = ("_hub", "_id", "_settled", "parts", "request")

    def __init__(self, hub: LaneHub, request: RoundRequest, round_id: int = 0) -> None:
        """With a `round_id` it was sent already."""
        self._hub = hub
        self._id = round_id
        self._settled: asyncio.Future[None] | None = None
        self.request = request
        self.parts: list[RoundPart] = []
        hub.follow_round(round_id, request, self._settle)

    def run(self, wait_s: float) -> bool:
        """Send, and wait where the caller stands. False if nothing was sent."""
        self._id = self._hub.run_round(self.request, self._settle, wait_s=wait_s)
        return self._id > 0

    @property
    def is_whole(self) -> bool:
        """Whether the output is there."""
        return self.request.state == RoundState.WHOLE

    async def wait(self, timeout_s: float) -> None:
        """Return when the round is whole or faulty, or when it is too late."""
        if self.request.state == RoundState.WAITING:
            loop = asyncio.get_running_loop()
            self._settled = loop.create_future()
            timer = loop.call_later(timeout_s, self._settle)
            try:
                await self._settled
            finally:
                timer.cancel()

    def give_up(self) -> None:
        """End it with its `parts`. Answers that still come go to who adopts their calls
        (`LaneWorkerLink.adopt`) before the loop runs again."""
        self.parts = self.request.parts()
        self.release()

    def release(self) -> None:
        """End it: the request may be dropped."""
        self._hub.release_round(self._id)

    def _settle(self) -> None:
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(None)


def _share_words(shares: Sequence[Share]) -> array[int]:
    """As `RoundRequest` has them."""
    words = array("q")
    for share in sorted(shares):
        for worker, num_rows in zip(share.workers, share.rows, strict=True):
            words.extend((share.expert, worker, num_rows))
    return words


def _connection(link: WorkerLink, stream: int) -> int:
    """Negative where there is no lane."""
    if not isinstance(link, LaneWorkerLink):
        return -1
    connection = link.lane_connection(stream)
    return -1 if connection is None else connection
