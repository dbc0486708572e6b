"""Which files make a checkpoint, as its own sllm.json or index tell, for places whose listing can't be believed.

Checks every name and count; asks nobody.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from sllm_actor.domain.sentence_modules import MODULES_NAME, wrong_below
from sllm_actor.errors import SourceInvalid
from sllm_actor.sources.source import MAX_FILES, MAX_SIZE_BYTES, belongs

MANIFEST_NAME = "sllm.json"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
MAX_MANIFEST_BYTES = 128_000_000
MAX_INDEX_BYTES = 100_000_000

# What a stock checkpoint may have beside its weights, where it can only be asked for by name.
SMALL_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt",
    MODULES_NAME,
    "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
PICKLED_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin")

_Kind = TypeVar("_Kind")


class _Listed(msgspec.Struct, frozen=True):
    name: str
    size_bytes: int


class _Manifest(msgspec.Struct, frozen=True):
    files: tuple[_Listed, ...]
    others: tuple[_Listed, ...]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def sizes_in_manifest(raw: bytes, place: str) -> dict[str, int]:
    """Return the names in an sllm.json and their sizes in bytes; `place` is for messages. Slow where it is long.

    Raises:
        SourceInvalid: it is no sllm.json, or lists what can't be part of a checkpoint.
    """
    manifest = _decoded(raw, _Manifest, place)
    listed = (*manifest.files, *manifest.others)
    names = [file.name for file in listed]
    wrong = wrong_below(names)
    _check_names([name for name in names if "/" not in name or name == wrong], place)
    if any("/" in file.name for file in manifest.files):
        raise SourceInvalid(f"{place} lists weights below the folder", param="source")
    if len(set(names)) < len(names):
        raise SourceInvalid(f"{place} lists a file twice", param="source")
    for file in listed:
        if not 0 <= file.size_bytes <= MAX_SIZE_BYTES:
            raise SourceInvalid(f"{place} lists {file.name} with {file.size_bytes} bytes", param="source")
    if MANIFEST_NAME in names or not any(_is_weights(file.name) for file in manifest.files):
        raise SourceInvalid(f"{place} lists itself, or no weights", param="source")
    return {file.name: file.size_bytes for file in listed}


def shards_in_index(raw: bytes, place: str) -> tuple[str, ...]:
    """Return the weight files that an index names, by name; `place` is for messages. Slow where it is long.

    Raises:
        SourceInvalid: it is no index, or names what can't be a weight file.
    """
    names = sorted(set(_decoded(raw, _Index, place).weight_map.values()))
    _check_names(names, place)
    for name in names:
        if not _is_weights(name):
            raise SourceInvalid(f"{place} names {name} as a weight file", param="source")
    if not names:
        raise SourceInvalid(f"{place} names no weight file", param="source")
    return tuple(names)


def how_to_convert(place: str, pickled: str) -> SourceInvalid:
    """Return the refusal of a place that has pickled weights alone."""
    return SourceInvalid(
        f"{place} has pickled weights only ({pickled}), which are never loaded from elsewhere: download it, and "
        "convert the folder with `sllm-node convert`",
        param="source",
    )


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _check_names(names: list[str], place: str) -> None:
    if len(names) > MAX_FILES:
        raise SourceInvalid(f"{place} lists {len(names)} files, and {MAX_FILES} may be", param="source")
    for name in names:
        if not belongs(name):
            raise SourceInvalid(f"{place} lists {name[:80]!a}, which can't be part of a checkpoint", param="source")


def _decoded(raw: bytes, kind: type[_Kind], place: str) -> _Kind:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as wrong:
        raise SourceInvalid(f"{place} can't be read: {str(wrong)[:200]}", param="source") from None
