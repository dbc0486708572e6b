"""What each token of a model writes, as xgrammar wants it: from tokenizer.json, without making a tokenizer of it.

That takes a tenth of a second where a tokenizer of 50,000 tokens takes more than one, so an engine can do it between
two steps. Two processes that read the same folder come to the same result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import xgrammar
from transformers import AutoTokenizer

from sllm_actor.errors import TokenizerInvalid

MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
# The decoders of which it is known what a token of theirs writes, whatever stands around it.
_KINDS = {
    "ByteLevel": xgrammar.VocabType.BYTE_LEVEL,
    "ByteFallback": xgrammar.VocabType.BYTE_FALLBACK,
    "Metaspace": xgrammar.VocabType.BYTE_FALLBACK,
}

# Special tokens that a grammar may name (by their id, as it names no other): models begin tool calls with them.
TOOL_MARKERS = frozenset({"<tool_call>", "[TOOL_CALLS]", "<|tool_call|>"})
# xgrammar takes a token without text for one that can't come at all. This text fits nowhere in JSON on one line.
_UNWRITABLE = "\r\r\r\r"
# Characters below the space, as either kind writes them in its vocabulary.
_CONTROL = {
    xgrammar.VocabType.BYTE_LEVEL: re.compile("[\x00-\x1f\u0100-\u011f]"),
    xgrammar.VocabType.BYTE_FALLBACK: re.compile("[\x00-\x1f]|<0x[01][0-9A-F]>"),
}


class _Decoder(msgspec.Struct):
    type: str
    decoders: list[Any] = []


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _Tokenizer(msgspec.Struct):
    model: _Model
    decoder: _Decoder | None = None
    added_tokens: list[_Added] = []


def read_vocabulary(path: str, vocabulary_tokens: int, stop_token_ids: Sequence[int]) -> xgrammar.TokenizerInfo:
    """Say what the tokens write of the tokenizer in the folder `path`.

    A token that writes nothing fits no grammar: special ones, those of the model that the tokenizer lacks, and those
    with control characters, which JSON must escape, and which xgrammar lets into strings of a bounded length.

    Raises:
        TokenizerInvalid: its files can't be read, or are of a kind whose tokens have no text of their own.
    """
    try:
        tokenizer = msgspec.json.decode(_read(Path(path)), type=_Tokenizer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TokenizerInvalid(f"the tokenizer of {path} can't be used with a grammar: {error}") from error
    kind = _kind([] if tokenizer.decoder is None else [tokenizer.decoder])
    if kind is None:
        raise TokenizerInvalid(f"the tokenizer of {path} is of a kind that can't be used with a grammar")
    written = [""] * vocabulary_tokens
    vocabulary = tokenizer.model.vocab
    pairs: Iterable[tuple[str, int]] = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((text, at) for at, (text, _) in enumerate(vocabulary))
    )
    for text, token in pairs:
        if 0 <= token < vocabulary_tokens:
            written[token] = text
    for added in tokenizer.added_tokens:
        if 0 <= added.id < vocabulary_tokens:
            written[added.id] = "" if added.special else added.content
    written = ["" if _CONTROL[kind].search(text) else text for text in written]
    for added in tokenizer.added_tokens:
        if added.special and added.content in TOOL_MARKERS and 0 <= added.id < vocabulary_tokens:
            written[added.id] = _UNWRITABLE
    return xgrammar.TokenizerInfo(
        written, vocab_type=kind, vocab_size=vocabulary_tokens, stop_token_ids=list(stop_token_ids)
    )


def _read(folder: Path) -> bytes:
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise TokenizerInvalid(f"{path} is longer than {MAX_TOKENIZER_BYTES} bytes")
            return path.read_bytes()
        # An older folder: transformers knows what to make of its files.
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text: str = tokenizer.backend_tokenizer.to_str()
        return text.encode()
    except TokenizerInvalid:
        raise
    except Exception as error:  # Whatever a tokenizer's files make the library raise, they are at fault.
        raise TokenizerInvalid(f"{folder} has no tokenizer that can be used with a grammar: {error}") from error


def _kind(decoders: Sequence[_Decoder]) -> xgrammar.VocabType | None:
    for decoder in decoders:
        if decoder.type in _KINDS:
            return _KINDS[decoder.type]
        nested = _kind(msgspec.convert(decoder.decoders, list[_Decoder]))
        if nested is not None:
            return nested
    return None
