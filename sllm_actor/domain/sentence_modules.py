"""The `modules.json` of sentence-transformers, and the one file of a checkpoint that lies in a folder below it.

That file says how a model pools. Its name is the only one with a slash in it that any checkpoint may have, and only as
the modules name it. Opens nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated

import msgspec
from msgspec import Meta

MODULES_NAME = "modules.json"
# Of modules.json, and of each file that it names.
MAX_MODULES_BYTES = 100_000
MAX_MODULES = 16
# The file's name tells the family; which one it is makes no difference.
LENGTH_NAMES = tuple(
    f"sentence_{family}_config.json" for family in ("bert", "roberta", "distilbert", "mpnet", "xlm-roberta")
)
_FOLDER = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}"
_POOLING_NAME = re.compile(rf"{_FOLDER}/config\.json")


class Module(msgspec.Struct, frozen=True):
    """One step of how a text becomes a vector; `path` is the folder of its own files."""

    type: str
    path: str = ""

    @property
    def kind(self) -> str:
        """The class's own name: packages have moved, and classes have not."""
        return self.type.rpartition(".")[2]


Modules = Annotated[list[Module], Meta(max_length=MAX_MODULES)]


def are_computed(modules: Modules) -> bool:
    """Tell whether a text goes through these modules alone: Transformer, Pooling and perhaps Normalize."""
    return [module.kind for module in modules] in (
        ["Transformer", "Pooling"],
        ["Transformer", "Pooling", "Normalize"],
    )


def pooling_name_of(modules: Modules) -> str | None:
    """Give the name of the pooling's file; None where a module lies where it may not."""
    name = f"{modules[1].path}/config.json"
    return name if not modules[0].path and is_pooling_name(name) else None


def pooling_name_in(raw: bytes) -> str | None:
    """Give the name of the pooling's file out of the content of a modules.json; None where it rightly names none."""
    if len(raw) > MAX_MODULES_BYTES:
        return None
    try:
        modules = msgspec.json.decode(raw, type=Modules)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return pooling_name_of(modules) if are_computed(modules) else None


def is_pooling_name(name: str) -> bool:
    """Tell whether a file of this name can be a pooling's: one folder of a narrow alphabet, and config.json in it."""
    return bool(_POOLING_NAME.fullmatch(name))


def wrong_below(names: Collection[str]) -> str | None:
    """Name a file below the folder that can't be beside the others, None where all can.

    There is at most one, beside the modules.json that names it, and its folder is no other file's name.
    """
    below = sorted(name for name in names if "/" in name)
    if not below:
        return None
    right = len(below) == 1 and is_pooling_name(below[0]) and MODULES_NAME in names
    return None if right and below[0].partition("/")[0] not in names else below[-1]
