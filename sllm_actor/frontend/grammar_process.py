"""A process that compiles grammars. Its sources come from clients, and may explode: it has a bound on memory, and can
be killed.
"""

from __future__ import annotations

import re
import resource
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import xgrammar

from sllm_actor.engine.vocabulary import read_vocabulary
from sllm_actor.errors import InvalidRequest, SllmError
from sllm_actor.messages.grammar import CompileGrammar, GrammarCompiled, GrammarForm, GrammarRefused
from sllm_actor.runtime.blocking import BlockingChannel

MAX_VOCABULARIES = 8
# Where in xgrammar's source a check stands tells a client nothing.
_ORIGIN = re.compile(r"^\[[\d:]+\] \S+?:\d+: |Check failed: \([^)]*\) is false: ")


class _Key(NamedTuple):
    path: str
    vocabulary_tokens: int
    stop_token_ids: tuple[int, ...]
    # A model that is deployed again may have another tokenizer in the same place.
    modified_ns: int


class GrammarProcess:
    """Owns the vocabularies of this process, the most recently used of them."""

    def __init__(self, channel: BlockingChannel, memory_bytes: int, grammar_bytes: int) -> None:
        self._channel = channel
        self._memory_bytes = memory_bytes
        self._grammar_bytes = grammar_bytes
        self._vocabularies: OrderedDict[_Key, xgrammar.TokenizerInfo] = OrderedDict()

    def run(self) -> int:
        """Answer questions until left alone; the result is the exit status."""
        _bound_memory(self._memory_bytes)
        try:
            while True:
                question = self._channel.receive(wait=True)
                assert isinstance(question, CompileGrammar)
                try:
                    answer: object = GrammarCompiled(call=question.call, grammar=self._compiled(question))
                except SllmError as error:
                    answer = GrammarRefused(call=question.call, code=error.code, text=error.message)
                self._channel.send(answer)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return 0

    def _compiled(self, question: CompileGrammar) -> str:
        return compile_grammar(self._vocabulary(question), question.form, question.source, self._grammar_bytes)

    def _vocabulary(self, question: CompileGrammar) -> xgrammar.TokenizerInfo:
        try:
            modified_ns = (Path(question.path) / "tokenizer.json").stat().st_mtime_ns
        except OSError:
            modified_ns = 0
        key = _Key(question.path, question.vocabulary_tokens, question.stop_token_ids, modified_ns)
        if key not in self._vocabularies:
            self._vocabularies[key] = read_vocabulary(*key[:3])
            while len(self._vocabularies) > MAX_VOCABULARIES:
                self._vocabularies.popitem(last=False)
        self._vocabularies.move_to_end(key)
        return self._vocabularies[key]


def compile_grammar(vocabulary: xgrammar.TokenizerInfo, form: GrammarForm, source: str, max_bytes: int) -> str:
    """Compile a source for a vocabulary and write it as `Generate.grammar` carries it.

    Raises:
        InvalidRequest: it can't be compiled, or takes more than `max_bytes`; the message says why.
    """
    # One thread and no cache: whoever asks has one, and what a source costs is to be its own.
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
    try:
        if form is GrammarForm.JSON_SCHEMA:
            compiled = compiler.compile_json_schema(source, any_whitespace=False)
        else:
            compiled = compiler.compile_structural_tag(source)
        # Written out, it is never shorter than in memory.
        size_bytes = compiled.memory_size_bytes
        grammar: str = "" if size_bytes > max_bytes else compiled.serialize_json()
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise InvalidRequest(_reason(error)) from error
    size_bytes = max(size_bytes, len(grammar))
    if size_bytes > max_bytes:
        raise InvalidRequest(f"its grammar takes {size_bytes} bytes, more than {max_bytes}")
    return grammar


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError) or "bad_alloc" in str(error):
        return "it takes too much memory to be compiled"
    text = _ORIGIN.sub("", str(error)) if str(error) else type(error).__name__
    return _ORIGIN.sub("", text).strip()[:500]


def _bound_memory(memory_bytes: int) -> None:
    """Let the process grow by `memory_bytes` over what it has been forked with, and no further."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
