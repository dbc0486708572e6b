"""The bytes of single tokens: what a log-probability's entry shows, also where they are half a character.

A tokenizer's decoder says how its pieces are written: byte-level ones (GPT-2: a printable character for each byte),
SentencePiece's (a mark for a blank, `<0xAB>` for a byte), or as the text that they are.
"""

from __future__ import annotations

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

_BLANK = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """List GPT-2's characters for bytes: printable ones stand for themselves, the rest follows from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class TokenBytes:
    """Gives the bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._kinds = _decoder_kinds(tokenizer)

    def of(self, token_id: int) -> bytes:
        """Give a token's bytes; one that the tokenizer does not have has none."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return b""
        if "ByteLevel" in self._kinds:
            # A piece with a character outside of the alphabet was put into the vocabulary by hand, as it is.
            return bytes(_BYTES[char] for char in piece) if _BYTES.keys() >= set(piece) else piece.encode()
        if "ByteFallback" in self._kinds and (byte := _BYTE.fullmatch(piece)):
            return bytes.fromhex(byte.group(1))
        if self._kinds & {"ByteFallback", "Metaspace"}:
            return piece.replace(_BLANK, " ").encode()
        text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text).encode()


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    # The one way in which the library tells what a decoder is made of: its JSON.
    described: dict[str, Any] = json.loads(decoder.__getstate__())
    return {str(part["type"]) for part in (described, *described.get("decoders", ()))}
