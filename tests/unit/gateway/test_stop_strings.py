from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.stop_strings import StopStrings

LETTERS = st.text("ab", min_size=1, max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """Texts shown piece by piece, and whether a stop string was found."""
    matcher = StopStrings(stops)
    shown: list[str] = []
    for piece in pieces:
        text, is_stopped = matcher.push(piece)
        shown.append(text)
        if is_stopped:
            return shown, True
    return [*shown, matcher.finish()], False


def reference(stops: list[str], text: str) -> tuple[str, bool]:
    """The definition: the shortest beginning of `text` that ends in a stop string, without it."""
    for end in range(len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))], True
    return text, False


@settings(max_examples=150, deadline=None)
@given(stops=st.lists(LETTERS, max_size=3), pieces=st.lists(st.text("ab", max_size=4), max_size=12))
def test_however_the_text_is_cut_the_first_stop_string_to_complete_ends_it(
    stops: list[str], pieces: list[str]
) -> None:
    shown, is_stopped = run(stops, pieces)
    assert ("".join(shown), is_stopped) == reference(stops, "".join(pieces))


@settings(max_examples=150, deadline=None)
@given(stops=st.lists(LETTERS, min_size=1, max_size=3), text=st.text("abc", max_size=20))
def test_only_what_may_still_become_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    matcher = StopStrings(stops)
    shown = ""
    for position, character in enumerate(text):
        released, is_stopped = matcher.push(character)
        shown += released
        if is_stopped:
            return
        held = text[len(shown) : position + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_over_several_pieces_is_not_shown_in_part() -> None:
    assert run(["\nUser:"], ["Yes.", "\n", "Us", "er", ":", " more"]) == (
        ["Yes.", "", "", "", ""],
        True,
    )


def test_text_held_back_comes_at_the_end_when_no_stop_string_completes() -> None:
    assert run(["END"], ["the E", "N"]) == (["the ", "", "EN"], False)


def test_without_stop_strings_text_passes_through() -> None:
    assert run([], ["a", "b"]) == (["a", "b", ""], False)
