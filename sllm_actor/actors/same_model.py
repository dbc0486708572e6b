"""Whether two registrations are of one model, and in what they differ. Pure."""

from __future__ import annotations

import msgspec

from sllm_actor.domain import Model


def source_of(known: Model) -> str:
    """Give a registration's source; those of earlier versions have a path alone."""
    return known.source or known.path


def same_but_time(known: Model, model: Model) -> bool:
    """Tell whether two registrations differ in nothing but their time."""
    renewed = msgspec.structs.replace(known, source=source_of(known), registered_wall_s=model.registered_wall_s)
    return renewed == model


def runs_alike(known: Model, model: Model) -> bool:
    """Tell whether two registrations differ in nothing but how many instances there are to be."""
    return same_but_time(msgspec.structs.replace(known, scaling=model.scaling), model)
