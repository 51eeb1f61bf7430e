from __future__ import annotations

import pytest
from typer.testing import CliRunner

from services.cli.fleet import FleetPlan
from services.cli.main import app
from services.cli.up import _autoscaling, _parse_shards
from services.core.errors import ConfigurationError


@pytest.mark.parametrize(("text", "expected"), [("1", (1, 1)), ("3", (3, 3)), ("1-4", (1, 4))])
def test_shards_are_a_count_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert _parse_shards(text) == expected


@pytest.mark.parametrize("text", ["", "0", "4-1", "two", "1-", "-1", "1-4-5"])
def test_other_shards_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="1-4"):
        _parse_shards(text)


def test_autoscaling_keeps_to_the_workers_asked_for_unless_more_are_allowed() -> None:
    assert _autoscaling(False, 4, None) is None
    fixed = _autoscaling(True, 4, None)
    assert fixed is not None
    assert (fixed.min_workers, fixed.max_workers, fixed.scale_workers) == (4, 4, False)
    growing = _autoscaling(True, 4, 6)
    assert growing is not None
    assert (growing.min_workers, growing.max_workers, growing.scale_workers) == (4, 6, True)


@pytest.mark.parametrize(("wanted", "num_workers"), [(False, 4), (True, 0)])
def test_autoscaling_needs_workers_and_to_be_asked_for(wanted: bool, num_workers: int) -> None:
    with pytest.raises(ConfigurationError, match="--autoscale"):
        _autoscaling(wanted, num_workers, 8)


@pytest.mark.parametrize("also", [(), ("--no-workers",), ("--autoscale",)])
def test_workers_elsewhere_need_a_store_and_exclude_workers_of_ones_own(
    also: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.delenv("EXPERTFLEET_REDIS_URL", raising=False)
    if also:
        monkeypatch.setenv("EXPERTFLEET_REDIS_URL", "redis://127.0.0.1:1/0")
    result = CliRunner().invoke(app, ["up", "--external-workers", *also])
    assert isinstance(result.exception, ConfigurationError)
    assert "--external-workers needs EXPERTFLEET_REDIS_URL" in result.exception.message


def test_workers_elsewhere_are_neither_started_nor_in_process() -> None:
    plan = FleetPlan(
        num_workers=0,
        min_shards=1,
        max_shards=1,
        use_ray=False,
        store_bytes=1 << 20,
        external_workers=True,
    )
    assert plan.num_processes == 0
    assert not plan.in_process_experts
