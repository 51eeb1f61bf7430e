"""What a run shows: every token compared, every gap measured, throughput over time. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

from tests.support.load import Answers, Exchange

BIN_S = 0.25
RECOVERED_SHARE = 0.8
_SMOOTH_BINS = 8
_WARM_UP_SHARE = 0.35
_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """When things happened, in seconds of the clock of the records."""

    started_at: float
    injected_at: float
    undone_at: float
    """The fault's end; for a fault that has none (a death), when throughput is no longer read."""
    stopped_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongAnswer:
    """To turn `turn` of a conversation. It was asked `asked_s` after the start of the run, and is
    right up to token `first`."""

    conversation: int
    turn: int
    asked_s: float
    first: int
    num_wrong: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Times in seconds. `num_wrong_tokens` counts positions that differ from the right answer,
    and tokens past its end; `num_lost_tokens` those missing from answers that ended without an
    error. `recovery_s`: from the fault until the throughput of two seconds was back at 0.8 of what
    it was before, for good; None: not within the run. `throughput` is tokens per second in bins
    of `BIN_S` from the start on."""

    num_requests: int
    num_failed: int
    num_refused: int
    num_wrong_tokens: int
    num_lost_tokens: int
    longest_gap_s: float
    longest_gap_before_s: float
    longest_first_token_s: float
    tokens_per_s_before: float
    tokens_per_s_during: float
    recovery_s: float | None
    throughput: tuple[float, ...]
    errors: dict[str, int] = field(default_factory=dict)
    wrong_answers: tuple[WrongAnswer, ...] = ()

    @property
    def throughput_ratio(self) -> float:
        return self.tokens_per_s_during / max(self.tokens_per_s_before, 1e-9)

    @property
    def is_right(self) -> bool:
        """Nothing failed, no token is wrong, lost or repeated."""
        return not (self.num_failed or self.num_wrong_tokens or self.num_lost_tokens)


def judge(exchanges: Sequence[Exchange], answers: Answers, marks: Marks) -> Verdict:
    """`exchanges` are all that were sent in the run, failed ones included."""
    arrivals = sorted(at for each in exchanges for at in each.record.arrivals)
    throughput = _throughput(arrivals, marks.started_at, marks.stopped_at)
    # All streams begin at once, in step, which is faster than what follows.
    warm_up_s = _WARM_UP_SHARE * (marks.injected_at - marks.started_at)
    before = _mean_rate(arrivals, marks.started_at + warm_up_s, marks.injected_at)
    during = _mean_rate(arrivals, marks.injected_at + _SETTLE_S, marks.undone_at)
    failures = [each.record.error for each in exchanges if each.record.error is not None]
    return Verdict(
        num_requests=len(exchanges),
        num_failed=len(failures),
        num_refused=sum(each.num_refused for each in exchanges),
        num_wrong_tokens=sum(num_wrong_tokens(each, answers) for each in exchanges),
        num_lost_tokens=sum(num_lost_tokens(each, answers) for each in exchanges),
        longest_gap_s=_longest_gap(exchanges, marks.injected_at, float("inf")),
        longest_gap_before_s=_longest_gap(exchanges, 0.0, marks.injected_at),
        longest_first_token_s=max(
            (each.record.ttft_s for each in exchanges if each.record.arrivals), default=0.0
        ),
        tokens_per_s_before=before,
        tokens_per_s_during=during,
        recovery_s=_recovery(throughput, before, marks),
        throughput=throughput,
        errors=dict(Counter(failures)),
        wrong_answers=tuple(_wrong_answers(exchanges, answers, marks.started_at)),
    )


def _wrong_answers(
    exchanges: Sequence[Exchange], answers: Answers, started_at: float
) -> Iterator[WrongAnswer]:
    for exchange in exchanges:
        num_wrong = num_wrong_tokens(exchange, answers)
        if num_wrong:
            pairs = zip(exchange.record.token_ids, answers[exchange.key], strict=False)
            yield WrongAnswer(
                conversation=exchange.key[0],
                turn=exchange.key[1],
                asked_s=round(exchange.record.started_at - started_at, 2),
                first=sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)),
                num_wrong=num_wrong,
            )


def num_wrong_tokens(exchange: Exchange, answers: Answers) -> int:
    """Also of an answer that broke off: what came must be the beginning of the right one."""
    given, right = exchange.record.token_ids, answers[exchange.key]
    differing = sum(ours != theirs for ours, theirs in zip(given, right, strict=False))
    return differing + max(0, len(given) - len(right))


def num_lost_tokens(exchange: Exchange, answers: Answers) -> int:
    """Missing at the end of a stream that ended as if it were whole."""
    if _is_told(exchange.record.error):
        return 0
    return max(0, len(answers[exchange.key]) - exchange.record.num_tokens)


def _is_told(error: str | None) -> bool:
    """Whether the client was told that its request failed: a failure, but no loss in silence."""
    return error is not None and not error.startswith("the stream ended after")


def _longest_gap(exchanges: Sequence[Exchange], from_s: float, to_s: float) -> float:
    """Between two events of one stream, the second of them within the time given."""
    gaps = (
        later - earlier
        for each in exchanges
        for (earlier, _), (later, _) in pairwise(each.record.arrivals)
        if from_s <= later < to_s
    )
    return max(gaps, default=0.0)


def _mean_rate(arrivals: Sequence[tuple[float, int]], from_s: float, to_s: float) -> float:
    if to_s <= from_s:
        return 0.0
    return sum(count for at, count in arrivals if from_s <= at < to_s) / (to_s - from_s)


def _throughput(
    arrivals: Sequence[tuple[float, int]], from_s: float, to_s: float
) -> tuple[float, ...]:
    bins = [0.0] * max(1, int((to_s - from_s) / BIN_S))
    for at, count in arrivals:
        index = int((at - from_s) / BIN_S)
        if 0 <= index < len(bins):
            bins[index] += count / BIN_S
    return tuple(bins)


def _recovery(throughput: Sequence[float], before: float, marks: Marks) -> float | None:
    """Beginning of the first two seconds that, like all after them, are not below the share."""
    first = round((marks.injected_at - marks.started_at) / BIN_S)
    smooth = [
        sum(throughput[index : index + _SMOOTH_BINS]) / _SMOOTH_BINS
        for index in range(first, len(throughput) - _SMOOTH_BINS + 1)
    ]
    low = [index for index, rate in enumerate(smooth) if rate < RECOVERED_SHARE * before]
    if not low:
        return 0.0
    if low[-1] >= len(smooth) - 1:
        return None
    return (low[-1] + 1) * BIN_S
