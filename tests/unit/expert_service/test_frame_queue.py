from __future__ import annotations

from expert_service.frame_queue import FrameQueue


def test_frames_of_one_layer_are_taken_together_oldest_layer_first() -> None:
    queue: FrameQueue[str] = FrameQueue()
    for layer, frame in ((3, "a"), (1, "b"), (3, "c"), (1, "d"), (2, "e")):
        queue.add(layer, frame)
    assert len(queue) == 5
    assert [queue.take(), queue.take(), queue.take()] == [["a", "c"], ["b", "d"], ["e"]]
    assert len(queue) == 0


def test_an_empty_queue_gives_nothing() -> None:
    assert FrameQueue[str]().take() == []


def test_a_layer_that_was_taken_goes_to_the_end_when_it_comes_again() -> None:
    queue: FrameQueue[str] = FrameQueue()
    queue.add(1, "a")
    queue.add(2, "b")
    assert queue.take() == ["a"]
    queue.add(1, "c")
    assert queue.take() == ["b"]
