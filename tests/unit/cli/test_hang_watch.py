from __future__ import annotations

from services.cli.hang_watch import LOADING_FACTOR, HangWatch


def _look_each_second(watch: HangWatch, pids: dict[str, int], start: int, stop: int) -> list[str]:
    found: list[str] = []
    for now in range(start, stop):
        found += watch.silent(pids, float(now))
    return found


def test_a_process_without_a_sign_for_longer_than_the_bound_hangs() -> None:
    watch = HangWatch(15.0)
    watch.seen("a", 1, 0.0)
    watch.seen("b", 2, 0.0)
    pids = {"a": 1, "b": 2}
    assert _look_each_second(watch, pids, 0, 15) == []
    watch.seen("b", 2, 15.0)
    assert watch.silent(pids, 15.5) == ["a"]


def test_a_process_that_was_never_seen_is_not_judged() -> None:
    assert _look_each_second(HangWatch(1.0), {"a": 1}, 0, 100) == []


def test_signs_of_an_earlier_process_do_not_count_against_its_successor() -> None:
    watch = HangWatch(15.0)
    watch.seen("a", 1, 0.0)
    assert _look_each_second(watch, {"a": 2}, 0, 60) == []


def test_loading_is_given_longer() -> None:
    watch = HangWatch(10.0)
    watch.seen("a", 1, 0.0, is_loading=True)
    bound = int(10 * LOADING_FACTOR)
    assert _look_each_second(watch, {"a": 1}, 0, bound) == []
    assert watch.silent({"a": 1}, bound + 1.0) == ["a"]


def test_a_watcher_that_was_stopped_itself_accuses_nobody() -> None:
    watch = HangWatch(15.0)
    watch.seen("a", 1, 0.0)
    assert _look_each_second(watch, {"a": 1}, 0, 3) == []
    assert watch.silent({"a": 1}, 1000.0) == []
    assert _look_each_second(watch, {"a": 1}, 1001, 1012) == []
    assert _look_each_second(watch, {"a": 1}, 1012, 1020) != []
