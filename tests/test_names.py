"""Names from outside: matched whole against a narrow alphabet."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_actor.domain import check_model_name, check_node_id
from sllm_actor.domain.names import is_request_id
from sllm_actor.errors import InvalidName

LONGEST = "a" * 96


@pytest.mark.parametrize(
    "name", ["a", "A9", "demo", "opt-125m", "facebook/opt-125m", "a.b_c-d/e.f", LONGEST, f"{LONGEST}/{LONGEST}"]
)
def test_a_model_name_has_one_part_or_two(name: str) -> None:
    assert check_model_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "a ", " a", "a\n", "\na", "a/b/c", "/a", "a/", "a//b", "/", ".", "..", "../a", "a/..", "a..b",
        ".hidden",
        "-flag", "_x", "x_", "x-", "x.", "a/-b", "a\0", "ä", "\uff41", "a b", "a\\b", "a%2fb", "a:b", "~", "$HOME",
        LONGEST + "a", f"{LONGEST}a/b", "a" * 10**6,
    ],
)  # fmt: skip
def test_no_other_model_name_is_accepted(name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        check_model_name(name)
    assert len(str(caught.value)) < 1000


def test_a_node_id_is_one_part() -> None:
    assert check_node_id("node-1.rack_2") == "node-1.rack_2"
    for name in ("", "a/b", "a..b", "-a", "a\n", LONGEST + "a"):
        with pytest.raises(InvalidName) as caught:
            check_node_id(name)
        assert caught.value.param == "node"


def test_a_request_id_fits_into_a_header() -> None:
    for good in ("a", "req-1:2.3_4", "x" * 128):
        assert is_request_id(good)
    for bad in ("", "x" * 129, "a b", "a\n", "a\r\nX: y", "ä", "a/b", "\0"):
        assert not is_request_id(bad)


@given(st.text(max_size=40) | st.from_regex(r"[A-Za-z0-9._/-]{0,20}", fullmatch=True))
def test_an_accepted_model_name_is_safe_as_a_path_below_a_folder(name: str) -> None:
    try:
        check_model_name(name)
    except InvalidName:
        return
    parts = name.split("/")
    assert 1 <= len(parts) <= 2
    for part in parts:
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,96}", part)
        assert part[0].isalnum()
        assert part[-1].isalnum()
        assert ".." not in part
