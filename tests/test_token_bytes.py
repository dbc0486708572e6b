"""The bytes of single tokens, of each way in which tokenizers write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import sllm_actor
from sllm_actor.frontend.token_bytes import TokenBytes

DEMO = Path(sllm_actor.__file__).parent / "models" / "demo"
TEXTS = ["What is 47 + 35?", "naïve façade", "日本語 🚀", "a\tb\n\n  c", "<|end|>", "e\u0301"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_byte_level_tokenizers_tokens_are_those_of_the_text(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    pieces = [TokenBytes(tokenizer).of(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False)]
    assert b"".join(pieces) == text.encode()
    assert len(pieces) > 1 or text == "<|end|>"


def test_every_byte_is_a_token_of_a_byte_level_tokenizer() -> None:
    token_bytes = TokenBytes(AutoTokenizer.from_pretrained(DEMO))
    assert {bytes([byte]) for byte in range(256)} <= {token_bytes.of(token_id) for token_id in range(512)}


def test_a_token_that_there_is_not_has_no_bytes() -> None:
    token_bytes = TokenBytes(AutoTokenizer.from_pretrained(DEMO))
    assert [token_bytes.of(token_id) for token_id in (512, 2**31, 2**32 - 1)] == [b""] * 3


def test_sentencepieces_marks_are_blanks_and_its_bytes_are_bytes() -> None:
    vocabulary = {"<unk>": 0, "<0xE2>": 1, "\u2581the": 2, "e": 3, "\u2581": 4, "<0x0A>": 5, "<0xZZ>": 6}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    token_bytes = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    wanted = [b"<unk>", b"\xe2", b" the", b"e", b" ", b"\n", b"<0xZZ>"]
    assert [token_bytes.of(token_id) for token_id in range(7)] == wanted


def test_pieces_of_other_kinds_are_the_text_that_they_are() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    words = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
    assert [words.of(token_id) for token_id in (0, 1)] == [b"[UNK]", b"play"]
    assert b"ing" in words.of(2)
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581a", -1.0), ("b", -2.0)], unk_id=0))
    backend.decoder = decoders.Metaspace()
    pieces = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [pieces.of(token_id) for token_id in (1, 2)] == [b" a", b"b"]
    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
    assert TokenBytes(PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")).of(1) == b"word"


def test_a_piece_that_was_put_into_a_byte_level_vocabulary_by_hand_is_its_text() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["aa bb"], trainers.BpeTrainer(initial_alphabet=[*alphabet, "語"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    by_hand = tokenizer.convert_tokens_to_ids("語")
    assert isinstance(by_hand, int)
    assert TokenBytes(tokenizer).of(by_hand) == "語".encode()
