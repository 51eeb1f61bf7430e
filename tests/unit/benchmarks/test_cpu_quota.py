from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cpu_quota
from benchmarks.cpu_quota import NoCpuQuotaError, cpu_quotas

BUSY = """
import sys, time
sys.stdin.readline()
end, before = time.monotonic() + 0.6, time.process_time()
while time.monotonic() < end:
    pass
print(time.process_time() - before)
"""


def test_a_process_gets_no_more_than_its_share_of_a_core() -> None:
    try:
        with cpu_quotas() as quotas:
            process = subprocess.Popen(
                [sys.executable, "-c", BUSY],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            quotas.limit(process.pid, 0.2)
            assert quotas.pids == {process.pid}
            used_s, _ = process.communicate("go\n", timeout=60)
    except NoCpuQuotaError as error:
        pytest.skip(str(error))
    assert float(used_s) < 0.3


def test_where_no_limits_can_be_set_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_quota, "_ROOT", tmp_path / "nothing")
    with pytest.raises(NoCpuQuotaError, match="no CPU limits"), cpu_quotas():
        pass
