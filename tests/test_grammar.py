"""Answers held to a grammar: whatever is drawn from what it allows, comes out as the schema says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_answers import DEMO, END, VOCABULARY_TOKENS, allowed, compiled, decode, draw_answer, encode, grammars

from sllm_actor.engine.grammar import Grammars
from sllm_actor.engine.vocabulary import read_vocabulary
from sllm_actor.errors import GenerationFailed, InvalidRequest, TokenizerInvalid
from sllm_actor.frontend.grammar_process import compile_grammar
from sllm_actor.frontend.response_format import check_schema
from sllm_actor.messages.grammar import GrammarForm

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def scalars() -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.tuples(st.integers(-50, 50), st.integers(0, 40))
    return st.one_of(
        st.sampled_from([{"type": "string"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}]),
        bounds.map(lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}),
        st.tuples(st.integers(0, 3), st.integers(0, 5)).map(
            lambda pair: {"type": "string", "minLength": pair[0], "maxLength": sum(pair)}
        ),
        st.sampled_from([{"type": "string", "pattern": r"^[^a\"\\]{1,4}-[0-9]+$"}, {"const": {"a": [1, "x"]}}]),
        st.lists(
            st.one_of(st.integers(-5, 5), st.text(max_size=3), st.none()), min_size=1, max_size=4, unique=True
        ).map(lambda values: {"enum": values}),
        st.just({"type": ["string", "null"]}),
    )


def compound(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b", "long name", 'quo"te', "日本", "c\\d"])
    return st.one_of(
        st.tuples(inner, st.integers(0, 2), st.integers(0, 3)).map(
            lambda parts: {"type": "array", "items": parts[0], "minItems": parts[1], "maxItems": parts[1] + parts[2]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        st.tuples(st.dictionaries(names, inner, min_size=1, max_size=3), st.integers(0, 3)).map(
            lambda parts: {
                "type": "object",
                "properties": parts[0],
                "required": sorted(parts[0])[: parts[1]],
                "additionalProperties": False,
            }
        ),
    )


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.recursive(scalars(), compound, max_leaves=6), st.integers(0, 2**32))
def test_whatever_a_grammar_allows_is_json_that_its_schema_describes(schema: dict[str, Any], seed: int) -> None:
    grammar = compiled(check_schema(schema, strict=True, param="schema"))
    value = json.loads(decode(draw_answer(grammar, seed)))
    jsonschema.validate(value, schema)


@pytest.mark.parametrize("seed", range(5))
def test_any_object_is_an_object(seed: int) -> None:
    assert isinstance(json.loads(decode(draw_answer(compiled('{"type":"object"}'), seed))), dict)


def test_only_an_end_is_left_when_the_form_is_complete() -> None:
    constraint = grammars().constrain(compiled(json.dumps(PERSON)))
    assert END not in allowed(constraint)
    for token in encode('{"name": "Ada", "age": 36}'):
        assert not constraint.ended
        constraint.accept(token)
    assert allowed(constraint) == [END]
    constraint.accept(END)
    assert constraint.ended


def test_a_token_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    constraint = grammars().constrain(compiled(json.dumps(PERSON)))
    before = allowed(constraint)
    with pytest.raises(GenerationFailed, match="does not fit"):
        constraint.accept(END)
    assert allowed(constraint) == before


def test_a_grammar_taken_up_in_the_middle_allows_what_it_allowed_there() -> None:
    grammar = compiled(json.dumps(PERSON))
    tokens = draw_answer(grammar, 3)
    onward = grammars().constrain(grammar)
    for at, token in enumerate(tokens):
        assert allowed(grammars().constrain(grammar, tokens[:at])) == allowed(onward)
        onward.accept(token)
    with pytest.raises(InvalidRequest, match="token 0 of the answer so far"):
        grammars().constrain(grammar, [END])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_mask_is_the_same_in_every_type(dtype: torch.dtype) -> None:
    constraint = grammars().constrain(compiled(json.dumps(PERSON)))
    logits = torch.zeros(VOCABULARY_TOKENS, dtype=dtype)
    constraint.mask(logits)
    assert torch.nonzero(logits == 0).flatten().tolist() == allowed(constraint)


def test_a_token_that_writes_nothing_fits_nowhere() -> None:
    constraint = grammars().constrain(compiled('{"type":"string"}'), encode('"a'))
    choices = allowed(constraint)
    assert max(choices) < 512, "the tokenizer has 512 tokens, the model 600"
    assert not set(choices) & set(range(6)), "those are special"


@pytest.mark.parametrize("text", ["", "{}", "[]", "nonsense", '{"a": 1', "\x00"])
def test_what_is_no_grammar_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="no grammar for this model"):
        grammars().constrain(text)


def test_a_grammar_for_another_vocabulary_is_refused() -> None:
    other = compile_grammar(read_vocabulary(DEMO, 512, [END]), GrammarForm.JSON_SCHEMA, '{"type":"object"}', 10**6)
    with pytest.raises(InvalidRequest, match="Vocab size mismatch"):
        grammars().constrain(other)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"type":"banana"}', "Unsupported type"),
        ('{"$ref":"#/nowhere"}', "Cannot find field nowhere"),
        ('{"type":"integer","minimum":5,"maximum":1}', "minimum greater than maximum"),
        ('{"type":"string","pattern":"(("}', "parenthesis"),
        ("false", "cannot accept any value"),
        ('{"type":"string","maxLength":20000}', "more than 1000000"),
    ],
)
def test_a_schema_that_can_not_be_compiled_is_refused_with_the_reason(schema: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        compiled(schema, max_bytes=1_000_000)
    assert ".cc:" not in caught.value.message


@pytest.mark.parametrize(
    ("decoder", "token", "text"),
    [
        ({"type": "ByteLevel"}, "Ġa", b" a"),
        ({"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]}, "<0x41>", b"A"),
        ({"type": "Metaspace"}, "▁a", b" a"),
    ],
)
def test_tokens_are_read_as_their_decoder_writes_them(
    tmp_path: Path, decoder: dict[str, Any], token: str, text: bytes
) -> None:
    written = {
        "model": {"type": "BPE", "vocab": {token: 0, "b": 1, "Ċ": 4, "<0x0A>": 5}},
        "decoder": decoder,
        "added_tokens": [
            {"id": 2, "content": "<tool>", "special": False},
            {"id": 3, "content": "<s>", "special": True},
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    vocabulary = read_vocabulary(str(tmp_path), 7, [3])
    assert [bytes(token) for token in vocabulary.decoded_vocab][:4] == [text, b"b", b"<tool>", b""]
    control = 4 if decoder["type"] == "ByteLevel" else 5
    assert bytes(vocabulary.decoded_vocab[control]) == bytes(vocabulary.decoded_vocab[6]) == b""


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"model": {"vocab": 5}}', '{"model": {"vocab": {}}, "decoder": {"type": "WordPiece"}}', None],
)
def test_a_tokenizer_whose_tokens_can_not_be_read_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerInvalid, match="with a grammar"):
        Grammars(str(tmp_path), 5, [0]).constrain("{}")


def test_an_answer_is_utf_8_where_tokens_write_single_bytes() -> None:
    """The library lets leads go on with bytes that make no character: in 1 of 100 answers to this pattern."""
    pattern = r'^[^a"\\]{1,4}-[0-9]+$'
    grammar = compiled(json.dumps({"type": "array", "items": {"type": "string", "pattern": pattern}, "minItems": 40}))
    for seed in range(20):
        assert "\ufffd" not in decode(draw_answer(grammar, seed))
