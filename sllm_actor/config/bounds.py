"""Whether a knob's value is within what its annotation says."""

from __future__ import annotations

from typing import Any

import msgspec

from sllm_actor.errors import ConfigInvalid


def check(name: str, value: Any, annotation: Any) -> None:
    """Compare one knob's value with its type and bounds.

    Raises:
        ConfigInvalid: it is of another type, out of bounds, or no number.
    """
    try:
        msgspec.convert(value, annotation)
    except (msgspec.ValidationError, OverflowError) as error:
        raise ConfigInvalid(f"{name}: {error}, not {str(value)[:64]}", param=name) from error
    # Not-a-number is neither below nor above any bound.
    if value != value:
        raise ConfigInvalid(f"{name}: {value} is not a number", param=name)
