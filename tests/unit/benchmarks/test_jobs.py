from __future__ import annotations

import pytest

from benchmarks.jobs import result_of


def test_decoding_is_counted_while_all_requests_decode() -> None:
    times = [[1.0, 2.0, 3.0, 4.0], [2.5, 3.5, 4.5, 5.5]]

    result = result_of(0.5, times, [[1, 2, 3, 4], [5, 6, 7, 8]])

    assert result["ttft_s"] == pytest.approx(2.0)
    assert result["decode_s"] == pytest.approx(1.5)
    # 3.0 and 4.0 of the first request, 3.5 of the second.
    assert result["decode_tokens"] == 3
    assert result["total_s"] == pytest.approx(5.0)
    assert "timings" not in result


def test_there_is_no_decoding_when_requests_did_not_overlap() -> None:
    result = result_of(0.0, [[1.0, 2.0], [3.0, 4.0]], [[1, 2], [3, 4]])

    assert (result["decode_s"], result["decode_tokens"]) == (0.0, 0)
