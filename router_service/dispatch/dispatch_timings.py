"""Where the time of layer calls goes, as sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class DispatchTimings:
    """Nanoseconds over `num_calls` layer calls; the parts of a call add up to its whole time.

    A call's time is that of its slowest frame: `pack_ns` until it is sent (plan, rounding,
    encoding), `wire_ns` on the way there and back (serialisation, gRPC, waits for a core, frames
    that had to be sent again), `queue_ns` waiting in the worker, `expert_ns` computing, and
    `combine_ns` from its answer to the layer's output. In process there is only `expert_ns`.
    """

    num_calls: int = 0
    pack_ns: int = 0
    wire_ns: int = 0
    queue_ns: int = 0
    expert_ns: int = 0
    combine_ns: int = 0

    def add_call(
        self,
        *,
        started_ns: int,
        sent_ns: int,
        received_ns: int,
        ended_ns: int,
        queue_us: int,
        compute_us: int,
    ) -> None:
        """Count one call by the times of its slowest frame, of `time.perf_counter_ns`."""
        # The worker's figures are its own clock's; they cannot take longer than the round trip.
        round_trip_ns = received_ns - sent_ns
        expert_ns = min(1000 * compute_us, round_trip_ns)
        queue_ns = min(1000 * queue_us, round_trip_ns - expert_ns)
        self.num_calls += 1
        self.pack_ns += sent_ns - started_ns
        self.wire_ns += round_trip_ns - expert_ns - queue_ns
        self.queue_ns += queue_ns
        self.expert_ns += expert_ns
        self.combine_ns += ended_ns - received_ns

    def add_calls(self, num_calls: int, times_ns: Sequence[int]) -> None:
        """Count so many calls by the sums of their parts, in the order of the fields."""
        pack_ns, wire_ns, queue_ns, expert_ns, combine_ns = times_ns
        self.num_calls += num_calls
        self.pack_ns += pack_ns
        self.wire_ns += wire_ns
        self.queue_ns += queue_ns
        self.expert_ns += expert_ns
        self.combine_ns += combine_ns

    def take(self) -> DispatchTimings:
        """A copy; then start from zero."""
        taken = dataclasses.replace(self)
        self.num_calls = self.pack_ns = self.wire_ns = 0
        self.queue_ns = self.expert_ns = self.combine_ns = 0
        return taken
