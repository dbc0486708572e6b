"""Gateway and its grammar process: what an answer must look like, compiled for one model's vocabulary.

Over a Unix socket pair; `call` pairs an answer with its question.
"""

from __future__ import annotations

import enum

from sllm_actor.messages.declare import message


class GrammarForm(enum.StrEnum):
    """How a grammar's source is read: as JSON Schema, or as xgrammar's structural tag."""

    JSON_SCHEMA = "json_schema"
    STRUCTURAL_TAG = "structural_tag"


@message("grammar.compile")
class CompileGrammar:
    """Compile `source`, JSON text that `form` says how to read, for the model whose tokenizer lies in `path`.

    Answered by `GrammarCompiled` or `GrammarRefused`. The model has `vocabulary_tokens`, more than its tokenizer or as
    many; `stop_token_ids` end its answers.
    """

    call: int
    path: str
    vocabulary_tokens: int
    stop_token_ids: tuple[int, ...]
    form: GrammarForm
    source: str


@message("grammar.compiled")
class GrammarCompiled:
    """`grammar` is what `Generate.grammar` carries."""

    call: int
    grammar: str


@message("grammar.refused")
class GrammarRefused:
    """It can't be compiled; `code` and `text` are those of the typed error."""

    call: int
    code: str
    text: str


TO_GRAMMAR = (CompileGrammar,)
FROM_GRAMMAR = (GrammarCompiled, GrammarRefused)
