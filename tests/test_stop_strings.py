"""Stop strings in text that arrives in pieces, against looking at the whole text."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sllm_actor.frontend.stop_strings import StopScanner


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Find, letter by letter, the first moment at which a stop string is whole; the longest then counts."""
    for end in range(len(text) + 1):
        whole = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if whole:
            return text[: end - max(map(len, whole))], True
    return text, False


def scan(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    shown = "".join(scanner.push(piece) for piece in pieces)
    return shown + scanner.flush(), scanner.stopped


# Two letters, so that stop strings overlap with themselves, each other and the text all the time.
letters = st.text(alphabet="ab", max_size=24)
stop_lists = st.lists(st.text(alphabet="ab", max_size=5), max_size=4)


@given(letters, stop_lists, st.data())
def test_any_split_into_pieces_shows_the_same_text(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert scan(pieces, stops) == cut(text, stops)


@given(letters, stop_lists)
def test_what_has_been_shown_is_never_taken_back_and_nothing_is_held_that_could_be_shown(
    text: str, stops: list[str]
) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for at, letter in enumerate(text, start=1):
        shown += scanner.push(letter)
        seen, stopped = cut(text[:at], stops)
        assert scanner.stopped == stopped
        assert seen.startswith(shown)
        held = seen[len(shown) :]
        assert stopped or not held or any(stop.startswith(held) for stop in stops)


def test_the_stop_string_that_is_whole_first_counts_however_the_text_is_cut() -> None:
    for pieces in (["abc"], ["ab", "c"], ["a", "b", "c"], ["a", "bc"]):
        assert scan(pieces, ["abc", "b"]) == ("a", True)


def test_of_stop_strings_that_end_together_the_longest_is_cut() -> None:
    for pieces in (["xyz"], ["x", "y", "z"]):
        assert scan(pieces, ["z", "yz"]) == ("x", True)


def test_nothing_is_shown_after_a_stop() -> None:
    scanner = StopScanner(["\n"])
    assert scanner.push("one\ntwo") == "one"
    assert scanner.push("three") == ""
    assert scanner.flush() == ""


def test_a_beginning_that_comes_to_nothing_is_shown_at_the_end() -> None:
    scanner = StopScanner(["STOP"])
    assert scanner.push("go STO") == "go "
    assert scanner.flush() == "STO"
    assert not scanner.stopped


def test_without_stop_strings_everything_passes_at_once() -> None:
    scanner = StopScanner(["", ""])
    assert scanner.push("anything") == "anything"
    assert not scanner.stopped
