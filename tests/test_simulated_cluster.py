"""Production actors on virtual time keep their promises whatever breaks; and bugs that are planted are found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from sllm_actor.actors import going_on, router
from sllm_actor.actors.inference_worker import InferenceWorker
from sllm_actor.actors.model_manager import ModelManager
from sllm_actor.actors.slots import Slots
from sllm_actor.testing.cluster_simulation import Outcome, SimulationFoundProblems, check_seed, run_seed
from sllm_actor.testing.process_loop import ProcessLoop, context_of
from sllm_actor.testing.simulated_cluster import Plan
from sllm_actor.testing.virtual_loop import START_S, VirtualLoop, run_virtual

SEEDS = 40
# Planted bugs are found well before; the promise is 2,000.
PATIENCE_SEEDS = 50


@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_promises_to_clients_hold_whatever_breaks(first: int) -> None:
    for seed in range(first, first + 10):
        check_seed(seed)


@pytest.mark.parametrize("seed", [84, 94, 225])
def test_an_engine_that_dies_while_its_model_starts_costs_a_pause(seed: int) -> None:
    check_seed(seed)


@pytest.mark.parametrize("seed", [3, 11])
def test_nodes_that_have_given_each_other_up_are_members_still_and_find_each_other_again(seed: int) -> None:
    assert not run_seed(seed, Plan(down_after_s=1.5)).problems


def test_a_seed_does_the_same_in_another_process_that_hashes_otherwise() -> None:
    code = "from sllm_actor.testing.cluster_simulation import run_seed; print(run_seed(6).digest)"
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == run_seed(6).digest != run_seed(5).digest


def test_a_stopped_process_stands_still_and_then_goes_on_with_what_came_due() -> None:
    async def main() -> tuple[list[str], float]:
        loop, said = VirtualLoop.running(), list[str]()
        assert isinstance(loop, ProcessLoop)
        loop.call_later(1.0, said.append, "a timer of a", context=context_of("a"))
        loop.call_later(2.0, said.append, "a timer of b", context=context_of("b"))
        loop.stop_process("a")
        await loop.clock.sleep(3.0)
        assert said == ["a timer of b"]
        loop.continue_process("a")
        await loop.clock.sleep(0.0)
        return said, loop.now_s

    said, now_s = run_virtual(main, kind=ProcessLoop)
    assert (said, now_s) == (["a timer of b", "a timer of a"], START_S + 3.0)


def found_by_seeds(first: int = 0) -> Outcome:
    """Give the first outcome with a problem."""
    outcomes = (run_seed(seed) for seed in range(first, first + PATIENCE_SEEDS))
    return next((outcome for outcome in outcomes if outcome.problems), Outcome(0, (), "", {}, ()))


def plant_repeated_tokens(patch: pytest.MonkeyPatch) -> None:
    whole = going_on.rest_of
    patch.setattr(router, "rest_of", lambda request, _, *others: whole(request, (), *others))


def plant_forgotten_tokens(patch: pytest.MonkeyPatch) -> None:
    whole = going_on.rest_of
    patch.setattr(router, "rest_of", lambda request, tokens, *others: whole(request, tokens[:-1], *others))


def plant_a_kept_lease(patch: pytest.MonkeyPatch) -> None:
    async def keep(manager: ModelManager, started: Any) -> None:
        started.engine.kill()

    patch.setattr(ModelManager, "_discard", keep)


def plant_a_forgotten_unload(patch: pytest.MonkeyPatch) -> None:
    async def forget(manager: ModelManager, instance: Any) -> None:
        manager._tell_gone(instance)

    patch.setattr(ModelManager, "_retirement", forget)


def plant_a_kept_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Slots, "give", lambda _: None)


def plant_an_end_without_a_word(patch: pytest.MonkeyPatch) -> None:
    whole = InferenceWorker._compute

    async def cut_short(worker: InferenceWorker, *given: Any) -> AsyncGenerator[Any, None]:
        async for item in whole(worker, *given):
            if type(item).__name__ != "Finished":
                yield item

    patch.setattr(InferenceWorker, "_compute", cut_short)


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (plant_repeated_tokens, "repeats or leaves out no token"),
        (plant_forgotten_tokens, "repeats or leaves out no token"),
        (plant_a_kept_lease, "still has leases"),
        (plant_a_forgotten_unload, "in peace"),
        (plant_a_kept_slot, "does not end"),
        (plant_an_end_without_a_word, "ends without a word"),
    ],
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    outcome = found_by_seeds()
    assert any(says in problem for problem in outcome.problems), outcome.problems


def test_a_failure_names_its_seed_and_how_to_run_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_an_end_without_a_word(monkeypatch)
    with pytest.raises(SimulationFoundProblems, match=r"(?s)seed 0 found .*scripts/simulate_faults --seeds 0\.\.0"):
        check_seed(0)
