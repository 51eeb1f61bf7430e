from __future__ import annotations

from array import array

from router_service.scheduling.block_hash import HASH_BYTES, block_hash, root_hash
from router_service.scheduling.sequence import Sequence, completion_seed
from services.core.generation import SamplingParams


def _root(tenant: str = "a", fingerprint: bytes = b"weights", block_size: int = 4) -> bytes:
    return root_hash(tenant=tenant, model_fingerprint=fingerprint, block_size=block_size)


def _sequence(tokens: list[int], root: bytes) -> Sequence:
    return Sequence(
        order=0,
        index=0,
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=1),
        seed=0,
        root=root,
    )


def test_the_root_depends_on_tenant_weights_and_block_size() -> None:
    roots = {_root(), _root(tenant="b"), _root(fingerprint=b"others"), _root(block_size=8)}
    assert len(roots) == 4
    assert all(len(root) == HASH_BYTES for root in roots)


def test_moving_a_byte_from_one_field_to_the_next_changes_the_root() -> None:
    assert _root(tenant="ab", fingerprint=b"c") != _root(tenant="b", fingerprint=b"ca")


def test_equal_blocks_after_different_tokens_have_different_hashes() -> None:
    first = _sequence([1, 2, 3, 4, 9, 9, 9, 9], _root()).block_hashes(2, 4)
    second = _sequence([1, 2, 3, 5, 9, 9, 9, 9], _root()).block_hashes(2, 4)
    assert first[1] != second[1]


def test_the_hashes_of_a_prefix_do_not_depend_on_what_follows() -> None:
    long, short = _sequence(list(range(12)), _root()), _sequence(list(range(8)), _root())
    assert long.block_hashes(3, 4)[:2] == short.block_hashes(2, 4)


def test_hashes_are_stable_across_processes_and_versions() -> None:
    tokens = array("q", [1, 2, 3, 4]).tobytes()
    assert block_hash(_root(), tokens).hex() == "d63d046407d151f2c24f701780ec2c99"


def test_output_tokens_are_hashed_like_prompt_tokens() -> None:
    sequence = _sequence([1, 2, 3], _root())
    for token in (4, 5, 6, 7, 8):
        sequence.append(token)
    assert sequence.block_hashes(2, 4) == _sequence(list(range(1, 9)), _root()).block_hashes(2, 4)


def test_the_first_completion_draws_with_the_request_s_own_seed() -> None:
    assert completion_seed(7, 0) == 7
    assert completion_seed(-1, 0) == 2**64 - 1


def test_completions_of_a_request_draw_with_different_reproducible_seeds() -> None:
    seeds = [completion_seed(7, index) for index in range(50)]
    assert len(set(seeds)) == 50
    assert seeds == [completion_seed(7, index) for index in range(50)]
    assert all(0 <= seed < 2**64 for seed in seeds)
