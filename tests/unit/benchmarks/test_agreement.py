from __future__ import annotations

import pytest

from benchmarks.agreement import DisagreementError, check_agreement, compare
from benchmarks.sides import SideSpec

OURS = SideSpec(name="inprocess", command=(), is_ours=True, exactly_as="inprocess")
WORKERS = SideSpec(name="workers4", command=(), is_ours=True, exactly_as="inprocess")
PEER = SideSpec(name="peer", command=())
QUANTISED = SideSpec(name="peer-q8", command=(), is_quantised=True)
ANSWERS = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


def test_tokens_count_until_the_first_that_differs() -> None:
    agreement = compare(ANSWERS, [[1, 2, 0, 4], [0, 6, 7, 8], [9, 10, 11, 12]])

    assert agreement.first_share == pytest.approx(2 / 3)
    assert agreement.prefix_share == pytest.approx((0.5 + 0 + 1) / 3)


def test_our_sides_may_not_differ_by_a_token() -> None:
    other = [*ANSWERS[:2], [9, 10, 11, 13]]

    with pytest.raises(DisagreementError, match="workers4 and inprocess"):
        check_agreement([OURS, WORKERS], {"inprocess": ANSWERS, "workers4": other})


def test_a_peer_may_round_otherwise_but_not_compute_another_model() -> None:
    flipped = [[1, 2, 0, 0], [0, 0, 0, 0], [9, 10, 11, 12]]
    found = check_agreement([PEER, OURS], {"peer": flipped, "inprocess": ANSWERS})
    assert found["peer"].first_share == pytest.approx(2 / 3)
    assert found["inprocess"].prefix_share == 1

    other_model = [[0, 0, 0, 0], [0, 0, 0, 0], [9, 10, 11, 12]]
    with pytest.raises(DisagreementError, match="peer begins only 33%"):
        check_agreement([PEER, OURS], {"peer": other_model, "inprocess": ANSWERS})


def test_a_quantised_side_must_share_at_least_a_beginning() -> None:
    answers = {"inprocess": ANSWERS, "peer-q8": [[0, 0, 0, 0], [5, 0, 0, 0], [0, 0, 0, 0]]}
    check_agreement([OURS, QUANTISED], answers)

    answers["peer-q8"][1][0] = 0
    with pytest.raises(DisagreementError, match="another model"):
        check_agreement([OURS, QUANTISED], answers)
