"""`expertfleet bench` against the started product."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.product import Product


def _bench(product: Product, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", "bench", "--url", product.url, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_load_of_sessions_is_measured_and_written_down(product: Product, tmp_path: Path) -> None:
    arguments = ["--requests", "6", "--turns", "2", "--rate", "20", "--warmup", "1"]
    arguments += ["--prompt-tokens", "8-24", "--output-tokens", "6", "--ttft-ms", "60000"]
    done = _bench(product, *arguments, "--out", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["num_requests"], figures["num_failed"]) == (12, 0)
    assert figures["output_tokens"] == 12 * 6
    assert figures["good_share"] == 1.0
    assert 0 < figures["latencies_ms"]["ttft"]["p50"] <= figures["latencies_ms"]["e2e"]["max"]
    assert len(figures["ttft_by_turn_ms"]) == 2
    assert "goodput" in done.stdout


def test_a_load_that_is_refused_ends_with_the_gateways_words(product: Product) -> None:
    done = _bench(product, "--requests", "2", "--warmup", "0", "--prompt-tokens", "9000")
    assert done.returncode == 2
    assert "every request failed" in done.stderr
    assert "HTTP 400" in done.stderr
