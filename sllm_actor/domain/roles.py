"""What a node of a cluster is there for."""

from __future__ import annotations

import enum


class Role(enum.StrEnum):
    """To answer clients, to lead when elected, to run instances."""

    GATEWAY = "gateway"
    CONTROLLER = "controller"
    WORKER = "worker"


Roles = frozenset[Role]


def roles_of(text: str) -> Roles:
    """Read roles with commas between them, each a known one."""
    return frozenset(map(Role, text.split(",")))
