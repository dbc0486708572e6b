"""Bugs for the simulation of a cluster to find: `PYTHONPATH=tests .venv/bin/python tests/planted_bugs.py [NAME]`.

Prints, for each bug, the first seed that finds it and what that says; a bug that 2,000 seeds do not find fails the run.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from sllm_actor.actors import going_on, router
from sllm_actor.actors.going_on import Given
from sllm_actor.actors.inference_worker import InferenceWorker
from sllm_actor.actors.model_manager import ModelManager
from sllm_actor.actors.prepared import PreparedRequest, PreparedRequests
from sllm_actor.actors.slots import Slots
from sllm_actor.messages.generation import Tokens
from sllm_actor.testing.cluster_simulation import Outcome, run_seed

PROMISED_SEEDS = 2000
Plant = Callable[[pytest.MonkeyPatch], None]


def repeated_tokens(patch: pytest.MonkeyPatch) -> None:
    whole = going_on.rest_of
    patch.setattr(router, "rest_of", lambda request, _, *others: whole(request, (), *others))


def forgotten_tokens(patch: pytest.MonkeyPatch) -> None:
    whole = going_on.rest_of
    patch.setattr(router, "rest_of", lambda request, tokens, *others: whole(request, tokens[:-1], *others))


def no_epoch_check(patch: pytest.MonkeyPatch) -> None:
    """The Router takes tokens of every epoch."""
    whole = Given.is_new
    patch.setattr(Given, "is_new", lambda given, item, epoch: isinstance(item, Tokens) or whole(given, item, epoch))


def prepared_never_ends(patch: pytest.MonkeyPatch) -> None:
    """What is prepared stays when its source leaves."""
    patch.setattr(PreparedRequest, "end", lambda _: None)


def prepared_keeps_its_slot(patch: pytest.MonkeyPatch) -> None:
    def over(requests: PreparedRequests, migration_id: str) -> None:
        if requests._prepared.pop(migration_id, None) is not None:
            requests._end(migration_id)

    patch.setattr(PreparedRequests, "_over", over)


def waits_for_its_router_for_ever(patch: pytest.MonkeyPatch) -> None:
    async def wait(requests: PreparedRequests, one: PreparedRequest) -> None:
        return None

    patch.setattr(PreparedRequests, "_await_router", wait)


def two_owners(patch: pytest.MonkeyPatch) -> None:
    """The Router begins its next attempt in the epoch of the one before."""
    whole = going_on.rest_of
    patch.setattr(
        router, "rest_of", lambda request, tokens, epoch, *others: whole(request, tokens, max(0, epoch - 1), *others)
    )


def kept_lease(patch: pytest.MonkeyPatch) -> None:
    async def keep(manager: ModelManager, started: Any) -> None:
        started.engine.kill()

    patch.setattr(ModelManager, "_discard", keep)


def forgotten_unload(patch: pytest.MonkeyPatch) -> None:
    async def forget(manager: ModelManager, instance: Any, was_idle: bool) -> None:
        manager._tell_gone(instance)

    patch.setattr(ModelManager, "_retirement", forget)


def kept_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Slots, "give", lambda _: None)


def end_without_a_word(patch: pytest.MonkeyPatch) -> None:
    whole = InferenceWorker._compute

    async def cut_short(worker: InferenceWorker, *given: Any) -> AsyncGenerator[Any, None]:
        async for item in whole(worker, *given):
            if type(item).__name__ != "Finished":
                yield item

    patch.setattr(InferenceWorker, "_compute", cut_short)


PLANTS: tuple[Plant, ...] = (
    no_epoch_check, prepared_never_ends, prepared_keeps_its_slot, waits_for_its_router_for_ever, two_owners,
    repeated_tokens, forgotten_tokens, kept_lease, forgotten_unload, kept_slot, end_without_a_word,
)  # fmt: skip


def with_bug(plant: Plant, seed: int) -> Outcome:
    """Run a seed with a bug in it."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        return run_seed(seed)


def main() -> None:
    """Look for every bug, or those that are named."""
    missed = 0
    for plant in PLANTS:
        if sys.argv[1:] and plant.__name__ not in sys.argv[1:]:
            continue
        outcomes = (with_bug(plant, seed) for seed in range(PROMISED_SEEDS))
        found = next((outcome for outcome in outcomes if outcome.problems), None)
        missed += found is None
        said = f"seed {found.seed}: {found.problems[0]}" if found else f"not within {PROMISED_SEEDS} seeds"
        print(f"{plant.__name__}: {said}", flush=True)
    sys.exit(min(missed, 1))


if __name__ == "__main__":
    main()
