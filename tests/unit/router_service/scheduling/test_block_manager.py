from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router_service.scheduling.block_manager import BlockManager


def _name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def test_all_blocks_can_be_allocated_once() -> None:
    blocks = BlockManager(4)
    assert sorted(blocks.allocate() for _ in range(4)) == [0, 1, 2, 3]
    assert blocks.num_free == 0
    assert blocks.num_used == 4


def test_a_released_published_block_is_found_again() -> None:
    blocks = BlockManager(4)
    block = blocks.allocate()
    blocks.publish(block, _name(1))
    blocks.release([block])
    assert blocks.num_free == 4
    assert blocks.match([_name(1), _name(2)]) == [block]


def test_an_unpublished_block_is_not_found_again() -> None:
    blocks = BlockManager(4)
    blocks.release([blocks.allocate()])
    assert blocks.num_cached == 0


def test_a_match_stops_at_the_first_hash_that_is_missing() -> None:
    blocks = BlockManager(4)
    held = [blocks.allocate(), blocks.allocate()]
    blocks.publish(held[0], _name(1))
    blocks.publish(held[1], _name(3))
    assert blocks.match([_name(1), _name(2), _name(3)]) == held[:1]


def test_the_least_recently_released_cached_block_is_forgotten_first() -> None:
    blocks = BlockManager(2)
    first, second = blocks.allocate(), blocks.allocate()
    blocks.publish(first, _name(1))
    blocks.publish(second, _name(2))
    blocks.release([second])
    blocks.release([first])
    assert blocks.allocate() == second
    assert blocks.match([_name(2)]) == []
    assert blocks.match([_name(1)]) == [first]


def test_touching_a_cached_block_saves_it_from_being_forgotten_first() -> None:
    blocks = BlockManager(2)
    first, second = blocks.allocate(), blocks.allocate()
    blocks.publish(first, _name(1))
    blocks.publish(second, _name(2))
    blocks.release([first])
    blocks.release([second])
    blocks.touch([first])
    assert blocks.allocate() == second


def test_of_one_chain_the_tail_is_forgotten_before_the_head() -> None:
    blocks = BlockManager(3)
    chain = [blocks.allocate() for _ in range(3)]
    for number, block in enumerate(chain):
        blocks.publish(block, _name(number))
    blocks.release(chain)
    assert [blocks.allocate() for _ in range(3)] == chain[::-1]


def test_free_blocks_are_used_before_cached_ones_are_forgotten() -> None:
    blocks = BlockManager(2)
    block = blocks.allocate()
    blocks.publish(block, _name(1))
    blocks.release([block])
    blocks.allocate()
    assert blocks.match([_name(1)]) == [block]


def test_a_shared_block_is_free_only_when_all_have_released_it() -> None:
    blocks = BlockManager(2)
    block = blocks.allocate()
    blocks.publish(block, _name(1))
    blocks.hold(blocks.match([_name(1)]))
    blocks.release([block])
    assert blocks.ref_count(block) == 1
    assert blocks.num_used == 1
    blocks.release([block])
    assert blocks.num_used == 0


def test_of_two_blocks_with_one_hash_the_first_published_is_found() -> None:
    blocks = BlockManager(2)
    first, second = blocks.allocate(), blocks.allocate()
    blocks.publish(first, _name(1))
    blocks.publish(second, _name(1))
    assert blocks.match([_name(1)]) == [first]
    blocks.release([second])
    assert blocks.num_cached == 0


def test_an_unpublished_held_block_is_not_found_and_not_cached() -> None:
    blocks = BlockManager(2)
    block = blocks.allocate()
    blocks.publish(block, _name(1))
    blocks.unpublish([block])
    assert blocks.match([_name(1)]) == []
    blocks.release([block])
    assert blocks.num_cached == 0
    assert blocks.num_free == 2


def test_releasing_a_block_twice_is_caught() -> None:
    blocks = BlockManager(2)
    block = blocks.allocate()
    blocks.release([block])
    with pytest.raises(AssertionError, match="twice"):
        blocks.release([block])


class BlockManagerMachine(RuleBasedStateMachine):
    """Against a model: who holds which block, and which names were published last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(6)
        self.tables: list[list[int]] = []
        self.names: dict[int, bytes] = {}
        """What a block was published as, until it is allocated again or unpublished."""
        self.next_name = 0

    @precondition(lambda self: self.blocks.num_free > 0)
    @rule()
    def allocate(self) -> None:
        block = self.blocks.allocate()
        assert all(block not in table for table in self.tables), "a held block was given away"
        self.names.pop(block, None)
        self.tables.append([block])

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), fresh=st.booleans())
    def publish(self, data: st.DataObject, fresh: bool) -> None:
        block = data.draw(st.sampled_from(self.tables))[0]
        names = sorted(self.names.values())
        if fresh or not names:
            self.next_name += 1
            name = _name(self.next_name)
        else:
            name = data.draw(st.sampled_from(names))
        self.blocks.publish(block, name)
        if block not in self.names and name not in self.names.values():
            self.names[block] = name

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def unpublish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.tables))[0]
        self.blocks.unpublish([block])
        self.names.pop(block, None)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def take_up(self, data: st.DataObject) -> None:
        block, name = data.draw(st.sampled_from(sorted(self.names.items())))
        assert self.blocks.match([name]) == [block]
        self.blocks.hold([block])
        self.tables.append([block])

    @precondition(lambda self: len(self.tables) > 1)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        """One sequence holds what two held."""
        index = data.draw(st.integers(1, len(self.tables) - 1))
        self.tables[0] += self.tables.pop(index)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.blocks.touch(data.draw(st.lists(st.sampled_from(sorted(self.names)), unique=True)))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.blocks.release(self.tables.pop(index))

    @invariant()
    def reference_counts_equal_the_tables(self) -> None:
        held = [block for table in self.tables for block in table]
        for block in range(6):
            assert self.blocks.ref_count(block) == held.count(block)
        assert self.blocks.num_used == len(set(held))
        assert self.blocks.num_cached == len(set(self.names) - set(held))

    @invariant()
    def published_names_are_found(self) -> None:
        for block, name in self.names.items():
            assert self.blocks.match([name]) == [block]

    def teardown(self) -> None:
        """Nothing has leaked and nothing is there twice: every block can be had, once."""
        for table in self.tables:
            self.blocks.release(table)
        assert self.blocks.num_free == 6
        assert sorted(self.blocks.allocate() for _ in range(6)) == list(range(6))
        assert self.blocks.num_free == 0


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, deadline=None)
