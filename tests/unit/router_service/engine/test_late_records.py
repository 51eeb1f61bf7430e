"""Records that wait until tokens are out."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from router_service.engine.late_records import LateRecords
from tests.support.eventually import eventually


async def test_calls_are_made_soon_and_in_order_but_not_at_once() -> None:
    records, made = LateRecords(), list[int]()
    for number in range(3):
        records.add(partial(made.append, number))
    records.settle_soon()
    await asyncio.sleep(0)
    assert made == []
    await eventually(lambda: len(made) == 3)
    assert made == [0, 1, 2]
    records.add(lambda: made.append(3))
    records.settle()
    assert made == [0, 1, 2, 3]


def test_a_call_that_fails_is_logged_and_keeps_no_other_from_being_made(
    caplog: pytest.LogCaptureFixture,
) -> None:
    records, made = LateRecords(), list[int]()
    records.add(lambda: 1 / 0)
    records.add(lambda: made.append(1))
    records.settle()
    assert made == [1]
    assert "ZeroDivisionError" in caplog.text
