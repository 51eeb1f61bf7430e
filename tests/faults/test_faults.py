"""The short set of the fault lab; `make faults` runs all, longer, and measures."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from tests.faults.catalogue import FAULTS
from tests.faults.lab import VOCAB_SIZE, Outcome, Pace, learn_answers, run_fault
from tests.faults.scene import Scene
from tests.support.load import Answers, Script, draw_scripts

SEED = 1
NUM_STREAMS = 16
PACE = Pace(before_s=2.0, after_s=1.5, max_hold_s=8.0)
NOTICEABLE_S = 6.0
"""Far above the 0.5 s that `make faults` looks for on a quiet machine, and below the hang."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    started = Scene(tmp_path_factory.mktemp("faults")).start()
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def scripts() -> Sequence[Script]:
    return draw_scripts(SEED, vocab_size=VOCAB_SIZE, num_single=12, num_sessions=3)


@pytest.fixture(scope="module")
def answers(scene: Scene, scripts: Sequence[Script]) -> Answers:
    return asyncio.run(learn_answers(scene, scripts))


async def _outcome(name: str, scene: Scene, scripts: Sequence[Script], answers: Answers) -> Outcome:
    outcome = await run_fault(
        scene, FAULTS[name], scripts, answers, seed=SEED, pace=PACE, num_streams=NUM_STREAMS
    )
    assert outcome.is_survived, outcome.explain()
    return outcome


@pytest.mark.timeout(600)
async def test_a_killed_worker_is_replaced_by_its_replica_and_nobody_notices(
    scene: Scene, scripts: Sequence[Script], answers: Answers
) -> None:
    outcome = await _outcome("worker-killed", scene, scripts, answers)
    assert outcome.verdict.longest_gap_s < NOTICEABLE_S, outcome.explain()


@pytest.mark.timeout(600)
async def test_a_worker_that_hangs_is_passed_by(
    scene: Scene, scripts: Sequence[Script], answers: Answers
) -> None:
    outcome = await _outcome("worker-stopped", scene, scripts, answers)
    assert outcome.verdict.longest_gap_s < NOTICEABLE_S, outcome.explain()


@pytest.mark.timeout(600)
async def test_streams_go_on_when_their_shard_is_killed(
    scene: Scene, scripts: Sequence[Script], answers: Answers
) -> None:
    outcome = await _outcome("shard-killed", scene, scripts, answers)
    assert outcome.counts["resubmissions"] >= 1, outcome.explain()


@pytest.mark.timeout(600)
async def test_nothing_is_lost_with_the_store(
    scene: Scene, scripts: Sequence[Script], answers: Answers
) -> None:
    outcome = await _outcome("store-killed", scene, scripts, answers)
    assert outcome.verdict.longest_gap_s < NOTICEABLE_S, outcome.explain()
