"""Log-probabilities in OpenAI's shapes, also of tokens that are no whole characters or have no probability."""

from __future__ import annotations

import math
from typing import Any

from sllm_actor.domain import FinishReason, Model, ModelName, RequestId, Sampling
from sllm_actor.frontend.answer import Choice, Piece, Wish
from sllm_actor.frontend.choices import Counts
from sllm_actor.frontend.shapes import ChatShape, CompletionShape, WholeChoice
from sllm_actor.frontend.wishes import of_choices
from sllm_actor.frontend.written import Entry

ENTRIES = [
    Entry("é".encode(), -0.5, (("é".encode(), -0.5), (b"x", -1.0))),
    Entry(b"\xf0\x9f", -2.0, ((b"a", -0.1), (b"\xf0", -3.0))),
    Entry(b"\x9a\x80!", -math.inf, ((b"b", 0.0), (b"b", -7.0))),
]


def wish(top_logprobs: int | None = 2, prompt_tokens: int = 3) -> Wish:
    sampling = Sampling(max_tokens=9, temperature=0, top_p=1, seed=5, top_logprobs=top_logprobs)
    model = Model(
        name=ModelName("m"), source="", path="", architecture="", dtype="F32", size_bytes=1, host_bytes=1,
        context_tokens=10, vocabulary_tokens=10, eos_token_ids=(), chat=True, default_temperature=1, default_top_p=1,
        keep_alive_s=1, fingerprint="", registered_wall_s=0,
    )  # fmt: skip
    return Wish(RequestId("r"), model, [0] * prompt_tokens, sampling, (), 0.0, ())


def test_a_chats_tokens_have_their_bytes_and_the_likeliest_beside_them() -> None:
    shown = ChatShape(wish(), 0, RequestId("r")).whole([WholeChoice(0, "é", "stop", ENTRIES)], {})["choices"][0][
        "logprobs"
    ]
    first, second, third = shown["content"]
    assert shown["refusal"] is None
    assert first == {
        "token": "é",
        "logprob": -0.5,
        "bytes": [0xC3, 0xA9],
        "top_logprobs": [
            {"token": "é", "logprob": -0.5, "bytes": [0xC3, 0xA9]},
            {"token": "x", "logprob": -1.0, "bytes": [0x78]},
        ],
    }
    assert (second["token"], second["bytes"]) == ("\\xf0\\x9f", [0xF0, 0x9F])
    assert third["logprob"] == -9999.0, "JSON has no infinity"


def completion(entries: list[Entry], shape: CompletionShape) -> Any:
    return shape.chunk(0, "", entries)["choices"][0]["logprobs"]


def test_a_completions_tokens_are_columns_and_offsets_go_on_from_chunk_to_chunk() -> None:
    shape = CompletionShape(wish(), 0, RequestId("r"), [""])
    assert completion(ENTRIES[:1], shape) == {
        "tokens": ["é"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"é": -0.5, "x": -1.0}],
        "text_offset": [0],
    }
    rest = completion(ENTRIES[1:], shape)
    assert rest["tokens"] == ["bytes:\\xf0\\x9f", "bytes:\\x9a\\x80\\x21"]
    assert rest["text_offset"] == [1, 2]
    assert rest["top_logprobs"][0] == {"a": -0.1, "bytes:\\xf0": -3.0, "bytes:\\xf0\\x9f": -2.0}
    assert rest["top_logprobs"][1] == {"b": 0.0, "bytes:\\x9a\\x80\\x21": -9999.0}, "of two of one text the likelier"


def test_where_none_are_asked_for_they_are_null() -> None:
    silent = wish(top_logprobs=None)
    for shape in (ChatShape(silent, 0, RequestId("r")), CompletionShape(silent, 0, RequestId("r"), [""])):
        chunk = shape.chunk(0, "x", ())
        assert chunk is not None
        assert chunk["choices"][0]["logprobs"] is None
        assert shape.last_chunk(0, "stop")["choices"][0]["logprobs"] is None
        assert shape.whole([WholeChoice(0, "x", "stop", ())], {})["choices"][0]["logprobs"] is None


def test_choices_have_ids_of_their_own_and_the_first_the_requests() -> None:
    wishes = of_choices([wish(), wish()], 2)
    assert [each.request_id for each in wishes] == ["r", "r-1", "r-2", "r-3"]
    assert [each.sampling.choice for each in wishes] == [0, 1, 0, 1]
    assert {each.sampling.seed for each in wishes} == {5}


def test_each_prompt_is_counted_once() -> None:
    counts = Counts(of_choices([wish(prompt_tokens=3), wish(prompt_tokens=4)], 2), 2)
    for number in range(4):
        counts.take(Choice(number, Piece("", None, 3, 1)))
        counts.take(Choice(number, Piece("", FinishReason.STOP, 3, 5, 2)))
    assert counts.usage() == {
        "prompt_tokens": 7,
        "completion_tokens": 20,
        "total_tokens": 27,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
