"""What every place that a model comes from can do: list the files of a checkpoint, and read a range of one.

A source knows nothing of checkpoints, chunks or retries: it reads what it is told to read, once, exactly, or raises.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import msgspec

from sllm_actor.domain.sentence_modules import is_pooling_name

MAX_FILES = 12_000
MAX_SIZE_BYTES = 2**50
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")


class SourceFile(msgspec.Struct, frozen=True):
    """One file as the source listed it.

    `name` is one path component of a narrow alphabet, or that of the one file below a folder, as its modules.json names
    it (`sllm_actor/domain/sentence_modules.py`). `validator` tells this version of the file from any other
    (an ETag, a commit and a digest, an inode and a time); it is empty where the source has nothing to tell it by.
    `sha256` is what the source says that the whole file has, in hexadecimal; empty where it does not say.
    """

    name: str
    size_bytes: int
    validator: str = ""
    sha256: str = ""


class SourceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator allows and grants to sources that are reached through a network.

    `parallel_reads` is how many requests are under way at once; `redirect_hosts` has `host` or `host:port`.
    """

    connect_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0
    parallel_reads: int = 8
    allow_private_redirects: bool = False
    redirect_hosts: Sequence[str] = ()


class Source(Protocol):
    """A place that holds one checkpoint. Safe for concurrent reads from one event loop."""

    @property
    def url(self) -> str:
        """The canonical name of it, without credentials; equal for equal places."""

    @property
    def parallel(self) -> int:
        """How many reads at once are of use; 1 where it can only be read from front to back."""

    async def files(self) -> tuple[SourceFile, ...]:
        """List the files that belong to a checkpoint, by name; neither code nor pickles are among them.

        Raises:
            SourceMissing: nothing is there.
            SourceInvalid: what is there is no checkpoint, or a name or a size in it is out of bounds.
            SourceRefused: credentials are missing or wrong.
            SourceUnreachable: no answer, or a broken one; trying again may help.
        """

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `file` from `offset` on. A failed read may have written part of it.

        Raises:
            SourceChanged: the file is no longer the one that was listed.
            SourceViolation: the answer was not what was asked for: too short, too long, another range.
            SourceMissing, SourceRefused, SourceUnreachable: as `files` does.
        """

    async def close(self) -> None:
        """Give back connections and descriptors; reads that are under way fail."""


def is_file_name(name: str) -> bool:
    """Tell whether a source may list a file of this name."""
    return bool(_FILE_NAME.fullmatch(name)) and ".." not in name


def belongs(name: str) -> bool:
    """Tell whether a file of this name can be part of a checkpoint: weights, JSON, or what a tokenizer needs.

    Whatever an sllm.json may list is among it; neither code nor pickles are.
    """
    return is_file_name(name) and bool(_BELONGS.fullmatch(name)) and not _CODE_AND_PICKLES.fullmatch(name.lower())


def belongs_below(name: str) -> bool:
    """Tell whether a file of this name can be part of a checkpoint, as `belongs`, or as the pooling that it names."""
    return belongs(name) or is_pooling_name(name)


_BELONGS = re.compile(
    r".*\.safetensors|.*\.safetensors\.index\.json|sllm\.json|(?:adapter_)?config\.json|generation_config\.json"
    r"|(?:pre)?processor_config\.json|special_tokens_map\.json|added_tokens\.json|tokenizer.*|chat_template.*|vocab.*"
    r"|modules\.json|sentence_.*_config\.json|config_sentence_transformers\.json|merges.*|.*\.model|.*\.tiktoken"
)
_CODE_AND_PICKLES = re.compile(r".*\.(?:py|pyc|so|bin|pt|pth|ckpt|pkl|pickle|dill|joblib|npy|npz|h5|msgpack|onnx|gguf)")
