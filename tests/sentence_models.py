"""Builders of checkpoints in the layout of sentence-transformers: a tiny encoder, its tokenizer, its modules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_models import VOCABULARY_TOKENS, save_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = ("the", "cat", "dog", "sleeps", "runs", "a", "car", "is", "red", "slow")
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def save_layout(
    folder: Path,
    pooling: dict[str, Any],
    *,
    modules: Sequence[dict[str, Any]] = (TRANSFORMER, POOLING, NORMALIZE),
    lengths: dict[str, Any] | None = None,
) -> Path:
    """Write modules.json and what it names."""
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(list(modules)))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if lengths is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps(lengths))
    return folder


def save_tokenizer(folder: Path) -> Path:
    """Write a tokenizer that knows a few small words, and puts [CLS] before a text and [SEP] behind it."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    vocabulary = {name: number for number, name in enumerate(names)}
    assert len(vocabulary) <= VOCABULARY_TOKENS
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return folder


def save_sentence_model(folder: Path, **changes: Any) -> Path:
    """Save a tiny BERT that pools by the mean, normalizes, knows lower case alone, and takes texts of 16 tokens."""
    save_model(folder, "BertModel", **changes)
    save_layout(folder, {"pooling_mode_mean_tokens": True}, lengths={"max_seq_length": 16, "do_lower_case": True})
    return save_tokenizer(folder)
