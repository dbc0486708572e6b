"""Which of the models that lack instances gets the next one."""

from __future__ import annotations

from sllm_actor.domain import ModelName
from sllm_actor.policy.autoscaling import Short, by_need

A, B, C = map(ModelName, "abc")


def test_the_next_instance_is_for_the_model_whose_instances_have_the_most_to_do() -> None:
    short = {A: Short(active=4, there=1, want=4, least=0), B: Short(active=30, there=1, want=3, least=0)}
    # 30 and 15 requests each for B, and then 4, 2 and 1 for A: not all of A's because of its name.
    assert list(by_need(short)) == [(B, 1), (B, 2), (A, 1), (A, 2), (A, 3)]


def test_models_with_equally_much_to_do_take_turns() -> None:
    alike = Short(active=8, there=1, want=3, least=0)
    assert list(by_need({B: alike, A: alike})) == [(A, 1), (B, 1), (A, 2), (B, 2)]


def test_what_is_to_run_at_all_times_comes_before_all_help() -> None:
    short = {A: Short(active=90, there=1, want=2, least=0), B: Short(active=0, there=0, want=2, least=2)}
    assert list(by_need(short)) == [(B, 0), (B, 1), (A, 1)]


def test_a_model_that_lacks_nothing_gets_nothing() -> None:
    assert list(by_need({A: Short(3, 3, 3, 0), B: Short(9, 4, 3, 0), C: Short(0, 0, 0, 0)})) == []
