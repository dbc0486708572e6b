"""Answers that nobody chose: drawn at random from what a grammar allows, so that it alone makes them what they are."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sllm_actor.engine.grammar import GrammarConstraint, Grammars
from sllm_actor.engine.vocabulary import read_vocabulary
from sllm_actor.frontend.grammar_process import compile_grammar
from sllm_actor.messages.grammar import GrammarForm
from sllm_actor.sources.builtin import BUILTIN

DEMO = str(BUILTIN["demo"])
# More than the tokenizer has: models round their vocabulary up.
VOCABULARY_TOKENS = 600
END = 2
MAX_TOKENS = 4000


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    return loaded


@functools.cache
def grammars() -> Grammars:
    return Grammars(DEMO, VOCABULARY_TOKENS, [END])


def compiled(source: str, form: GrammarForm = GrammarForm.JSON_SCHEMA, max_bytes: int = 8_000_000) -> str:
    return compile_grammar(read_vocabulary(DEMO, VOCABULARY_TOKENS, [END]), form, source, max_bytes)


def encode(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


def decode(tokens: Sequence[int]) -> str:
    text = tokenizer().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def allowed(constraint: GrammarConstraint) -> list[int]:
    logits = torch.zeros(VOCABULARY_TOKENS)
    constraint.mask(logits)
    return list(torch.nonzero(logits == 0).flatten().tolist())


@functools.cache
def _closers() -> frozenset[int]:
    return frozenset({END, *(token for text in '",:}]' for token in encode(text))})


def draw_answer(grammar: str, seed: int) -> list[int]:
    """Draw an answer token by token, at every second one what ends something, so that it comes to an end."""
    dice = random.Random(seed)
    constraint = grammars().constrain(grammar)
    tokens: list[int] = []
    while not constraint.ended:
        assert len(tokens) < MAX_TOKENS, decode(tokens)
        choices = allowed(constraint)
        closing = [token for token in choices if token in _closers()]
        token = dice.choice(closing if closing and dice.random() < 0.5 else choices)
        constraint.accept(token)
        tokens.append(token)
    assert tokens.pop() == END
    return tokens
