"""`@message(name)`: turn a plain class into frozen, keyword-only data with a name on the wire."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar, cast, dataclass_transform

import msgspec

T = TypeVar("T")
_NAMES: dict[str, str] = {}


@dataclass_transform(kw_only_default=True, frozen_default=True)
def message(name: str) -> Callable[[type[T]], type[T]]:
    """Declare a message; unknown fields are refused on decoding, and `name` can never be used twice."""

    def declare(cls: type[T]) -> type[T]:
        where = f"{cls.__module__}.{cls.__qualname__}"
        assert _NAMES.setdefault(name, where) == where, f"{name!r} is already the wire name of {_NAMES[name]}"
        body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
        options = {
            "frozen": True,
            "kw_only": True,
            "forbid_unknown_fields": True,
            "tag_field": "kind",
            "tag": name,
        }
        return types.new_class(cls.__name__, (msgspec.Struct,), options, lambda namespace: namespace.update(body))

    return declare


def changed(message: T, **changes: Any) -> T:
    """Give a message with other values in some of its fields. It is a struct, which a type checker does not see."""
    return cast(T, msgspec.structs.replace(cast(Any, message), **changes))
