"""What simulations that a seed fixes have in common: how one is run, and how it tells what it has found."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SHOWN_PROBLEMS = 10


@contextmanager
def alone_with_log(level: int, note: str) -> Iterator[logging.Logger]:
    """Have the package's log from a level on for one run, which nobody else hears; a bug of the run's own gets a note.

    Handlers that the block adds are its own to remove.
    """
    logger = logging.getLogger("sllm_actor")
    before = logger.level, logger.propagate
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield logger
    except BaseException as error:
        error.add_note(note)
        raise
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextmanager
def heard_by(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    """Let a handler hear of what is logged in a block."""
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def broke_off(error: Exception) -> str:
    """Say what ended a run that nothing may end."""
    cause = f" {error.__cause__!r}" if error.__cause__ is not None else ""
    return f"{type(error).__name__}: {error}{cause}"


def findings(seed: int, problems: Sequence[str], again: str) -> str:
    """Say what a seed has found, and how to see it again."""
    lines = [f"seed {seed} found {len(problems)} problems:", *problems[:SHOWN_PROBLEMS]]
    return "\n  ".join([*lines, again])
