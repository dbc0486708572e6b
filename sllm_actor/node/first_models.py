"""The models that a configuration has registered at the start: `NAME=SOURCE`, with commas between."""

from __future__ import annotations

from sllm_actor.domain import ModelName, check_model_name
from sllm_actor.errors import ConfigInvalid, InvalidName


def first_models(text: str) -> dict[ModelName, str]:
    """Give the source of each name, in the order in which they stand there.

    Raises:
        ConfigInvalid: one has no source or no name of a model, or a name stands there twice.
    """
    found: dict[ModelName, str] = {}
    for one in filter(None, map(str.strip, text.split(","))):
        name, equals, source = map(str.strip, one.partition("="))
        if not equals or not source:
            raise ConfigInvalid(f"models: {one[:120]!r} is not NAME=SOURCE", param="models")
        try:
            known = check_model_name(name)
        except InvalidName as error:
            raise ConfigInvalid(f"models: {error.message}", param="models") from None
        if known in found:
            raise ConfigInvalid(f"models: {known} stands there twice", param="models")
        found[known] = source
    return found
