"""What a side of a comparison answers to: jobs as JSON lines in, results as JSON lines out.

Peers run in environments of their own, so this file needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

Job = dict[str, Any]
"""{"prompts": [[ids]...], "max_tokens": n}, ours also "session_id"."""

Result = dict[str, Any]
"""What `result_of` makes, or a measured figure by name."""

Run = Callable[[Job], Result]


def claim_results() -> TextIO:
    """Where results go: what was standard output. Anything a library prints goes to the log.

    To be called before a library is imported that writes to standard output.
    """
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return results


def serve_jobs(run: Run, results: TextIO, versions: Mapping[str, str] | None = None) -> None:
    """Say that the side is ready, then answer jobs one by one until standard input ends."""
    _write(results, {"ready": True, "versions": dict(versions or {})})
    for line in sys.stdin:
        _write(results, run(json.loads(line)))


def result_of(
    started: float,
    token_times: Sequence[Sequence[float]],
    tokens: Sequence[Sequence[int]],
    timings: Mapping[str, float] | None = None,
) -> Result:
    """The figures of one job from the times in seconds at which each request's tokens came.

    `ttft_s` ends when every request has its first token. Decoding is counted from then until the
    first request is complete, while all of them are decoding: `decode_tokens` in `decode_s`, both
    0 when there is no such time. `total_s` is from the start to the last token. `timings` are
    milliseconds of a decode step by part.
    """
    first = max(times[0] for times in token_times)
    last = min(times[-1] for times in token_times)
    result: Result = {
        "ttft_s": first - started,
        "decode_s": max(0.0, last - first),
        "decode_tokens": sum(first < time <= last for times in token_times for time in times),
        "total_s": max(times[-1] for times in token_times) - started,
        "tokens": [list(ids) for ids in tokens],
    }
    return result | ({"timings": dict(timings)} if timings else {})


def _write(results: TextIO, value: Mapping[str, Any]) -> None:
    results.write(json.dumps(value) + "\n")
    results.flush()
