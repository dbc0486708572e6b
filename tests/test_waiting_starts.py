"""Who waits for a start that has begun is not asked again until something may have become of it."""

from __future__ import annotations

import random

import pytest

from sllm_actor.actors.rooms import Waiting
from sllm_actor.actors.waiting_starts import WaitingStarts
from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.messages.placement import Placement, PlaceModel, RunsAlready
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.placement import QUIET

MODELS = [ModelName(name) for name in "abc"]


def waiting(model: ModelName, number: int) -> Waiting:
    question = PlaceModel(
        request_id=RequestId(str(number)), model=model, fingerprint=model, size_bytes=1, host_bytes=1, timeout_s=1.0
    )
    return Waiting(question, 0.0, QUIET)


async def test_those_who_wait_are_those_that_nodes_tell_of_with_who_has_asked_and_who_was_answered() -> None:
    starts, (a, b, c) = WaitingStarts(), MODELS
    first, second, third = waiting(a, 1), waiting(a, 2), waiting(b, 3)
    for one in (first, second, third):
        starts.add(one)
    assert starts.asking({}) == {a: 2, b: 1}
    assert starts.asking({a: 3, c: 1}) == {a: 5, b: 1, c: 1}
    starts.answer(third, granted("placement-1"))
    assert starts.asking({b: 1}) == {a: 2, b: 2}
    starts.answer(second, granted("placement-2"))
    starts.ended("placement-1")
    starts.ended("placement-1")
    assert starts.asking({c: 1}) == {a: 2, c: 1}
    starts.ended("placement-2")
    starts.leave(second)
    starts.leave(third)
    assert starts.asking({}) == {a: 1}
    starts.leave(first)
    assert starts.asking({}) == {}


def granted(placement_id: str) -> Placement:
    return Placement(
        placement_id=placement_id, node=NodeId("n"), manager="manager", estimate_s=0.0, lease_s=1.0, reason=""
    )


@pytest.mark.parametrize("seed", range(20))
async def test_those_that_are_to_be_asked_are_found_whatever_has_come_and_gone(seed: int) -> None:
    dice, starts = random.Random(seed), WaitingStarts()
    answer = RunsAlready(model=MODELS[0], instance_id="a-1", node="n", worker="w", address="")  # type: ignore[arg-type]
    for number in range(200):
        one = dice.choice([*starts, None, None, None])
        if one is None:
            starts.add(waiting(dice.choice(MODELS), number))
        else:
            does = dice.choice(["settle", "settle", "settle", "unsettle", "answer", "leave"])
            if does in ("settle", "unsettle"):
                starts.settle(one, does == "settle")
            elif does == "answer":
                starts.answer(one, answer)
            else:
                starts.leave(one)
        starts.refuse(ClusterView(), set(), set())
        begun, running = (set(dice.sample(MODELS, dice.randint(0, 3))) for _ in range(2))
        assert starts.unsettled(begun, running) == [
            one
            for one in starts
            if not (one.is_settled and one.question.model in begun) or one.question.model in running
        ]
