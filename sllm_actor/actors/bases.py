"""Which registered model an adapter is for. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sllm_actor.checkpoint.adapter import LoraConfig
from sllm_actor.domain import Model
from sllm_actor.errors import AdapterInvalid, Conflict, InvalidRequest, ModelNotFound


def base_of(models: Iterable[Model], named: str, config: LoraConfig) -> Model:
    """Find the base: the model that is `named`, or else the one that the adapter's own description means.

    Raises:
        ModelNotFound, InvalidRequest: the named one is not registered, or is an adapter itself.
        AdapterInvalid: nothing is named, and the description means none of the registered ones, or several.
    """
    bases = {model.name: model for model in models if not model.base}
    if named:
        for model in models:
            if model.name == named and model.base:
                raise InvalidRequest(f"{named} is an adapter itself, of {model.base}", param="base")
        for name, model in bases.items():
            if name == named:
                return model
        raise ModelNotFound(f"the base model {named!r} does not exist; deploy it first", param="base")
    found = [model for model in bases.values() if _means(config.base, model)]
    if len(found) == 1:
        return found[0]
    meant = f"it names {config.base!r} as its base" if config.base else "it names no base"
    known = (
        f"{len(found)} models are registered from there: {', '.join(model.name for model in found)}"
        if found
        else ("no model is registered under that name or from there")
    )
    raise AdapterInvalid(f"{meant}, and {known}; say which model it is for (--base NAME)", param="base")


def _means(named: str, model: Model) -> bool:
    """Tell whether PEFT's `base_model_name_or_path` means a model: by name, as a folder, or as a repository."""
    if not named:
        return False
    source = model.source or model.path
    return (
        named in (model.name, source)
        or source == f"hf://{named}"
        or source.startswith(f"hf://{named}@")
        or (Path(named).is_absolute() and Path(named) == Path(model.path))
    )


def check_unused(name: str, models: Iterable[Model], doing: str) -> None:
    """Let a base be `doing` (removed, replaced) only while it has no adapters.

    Raises:
        Conflict: it has; the message names them.
    """
    adapters = sorted(model.name for model in models if model.base == name)
    if adapters:
        raise Conflict(
            f"{name} can't be {doing}: it is the base of {', '.join(adapters)}, to be removed first", param="name"
        )
