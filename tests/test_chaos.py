"""Five nodes on bad days keep what actors are promised; and the checker that says so finds what is planted."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from sllm_actor.runtime import SocketNetwork, SystemClock
from sllm_actor.runtime.calls import Inflow
from sllm_actor.runtime.hearing import Hearing
from sllm_actor.runtime.link import Link
from sllm_actor.runtime.peer import Peer
from sllm_actor.runtime.transfers import Incoming, Outgoing
from sllm_actor.runtime.values import Blob
from sllm_actor.testing.chaos import LIMITS, NODES, ChaosFailed, Cluster, Outcome, check_seed, run_seed
from sllm_actor.testing.chaos_drivers import Plan
from sllm_actor.testing.chaos_witness import Witness
from sllm_actor.testing.trace import TraceRecorder

SEEDS = 60
# A planted bug is found well before this many seeds.
PATIENCE_SEEDS = 30
REAL_LIMIT_S = 60.0


@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_promises_hold_whatever_breaks(first: int) -> None:
    for seed in range(first, first + 10):
        check_seed(seed)


def test_a_seed_does_the_same_each_time_and_another_does_something_else() -> None:
    runs = [run_seed(seed) for seed in (3, 4, 5)]
    again = [run_seed(seed) for seed in (3, 4, 5)]
    assert [run.digest for run in runs] == [run.digest for run in again]
    assert [run.counts for run in runs] == [run.counts for run in again]
    assert len({run.digest for run in runs}) == 3


def test_a_seed_does_the_same_in_another_process_that_hashes_otherwise() -> None:
    code = "from sllm_actor.testing.chaos import run_seed; print(run_seed(7).digest)"
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == run_seed(7).digest


def test_the_seeds_do_everything_there_is() -> None:
    counts: dict[str, int] = {}
    for seed in range(20):
        for what, count in run_seed(seed).counts.items():
            counts[what] = counts.get(what, 0) + count
    often = ("handled", "answered", "streamed", "through", "watched", "cancelled", "heard_stopped", "deadline_exceeded")
    assert {what: counts.get(what, 0) for what in often if counts.get(what, 0) <= 50} == {}
    now_and_then = ("heard_node_down", "node_unreachable", "actor_died")
    assert {what for what in now_and_then if what not in counts} == set()


def found_by_seeds() -> Outcome:
    """Give the first outcome with a problem."""
    outcomes = (run_seed(seed) for seed in range(PATIENCE_SEEDS))
    return next((outcome for outcome in outcomes if outcome.problems), Outcome(0, (), "", {}))


def sometimes(every: int) -> Callable[[], bool]:
    """Tell once in `every` calls that it is time, the same ones in each run."""
    calls = 0

    def due() -> bool:
        nonlocal calls
        calls += 1
        return calls % every == 0

    return due


def plant_swapped_letters(patch: pytest.MonkeyPatch) -> None:
    whole, due = Link._flush_letters, sometimes(20)

    def swap(link: Link) -> None:
        if due():
            link._letters.reverse()
        whole(link)

    patch.setattr(Link, "_flush_letters", swap)


def plant_overtaken_parcels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Outgoing, "hold", lambda *_: False)


def plant_doubled_tells(patch: pytest.MonkeyPatch) -> None:
    whole, due = Hearing._hear_tell, sometimes(50)

    def double(hearing: Hearing, letter: Any) -> None:
        whole(hearing, letter)
        if due():
            whole(hearing, letter)

    patch.setattr(Hearing, "_hear_tell", double)


def plant_lost_tells(patch: pytest.MonkeyPatch) -> None:
    whole, due = Hearing._hear_tell, sometimes(50)

    def lose(hearing: Hearing, letter: Any) -> None:
        if not due():
            whole(hearing, letter)

    patch.setattr(Hearing, "_hear_tell", lose)


def plant_lost_cancels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Hearing, "_hear_cancel", lambda *_: None)


def plant_calls_that_outlive_their_link(patch: pytest.MonkeyPatch) -> None:
    whole = Peer.fail_call

    def keep(peer: Peer, number: int, error: Any) -> bool:
        return number in peer.streams or whole(peer, number, error)

    patch.setattr(Peer, "fail_call", keep)


def plant_lost_items(patch: pytest.MonkeyPatch) -> None:
    whole, due = Inflow.push, sometimes(100)

    def lose(inflow: Inflow, item: Any) -> None:
        if not due():
            whole(inflow, item)

    patch.setattr(Inflow, "push", lose)


def plant_damaged_blobs(patch: pytest.MonkeyPatch) -> None:
    whole = Incoming.take

    def damage(incoming: Incoming, transfer: int, index: int) -> Blob:
        blob = whole(incoming, transfer, index)
        if len(blob) > 5_000:
            blob.data[4_000] ^= 1  # type: ignore[index]  # It is a bytearray where it comes.
        return blob

    patch.setattr(Incoming, "take", damage)


def plant_hasty_ends(patch: pytest.MonkeyPatch) -> None:
    def hasty(peer: Peer) -> None:
        if peer.link is None:
            peer.declare_down()

    patch.setattr(Peer, "_await_end", hasty)


def plant_silent_ends(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Peer, "_end_incarnation", lambda *_, **__: None)


def plant_swapped_answers(patch: pytest.MonkeyPatch) -> None:
    whole = Hearing.hear

    def swap(hearing: Hearing, letters: Any) -> None:
        """Exchange what the first two asks that wait get."""
        calls = hearing._peer.calls
        if len(calls) >= 2:
            (first, one), (second, other) = list(calls.items())[:2]
            calls[first] = (one[0], other[1], one[2], one[3])
            calls[second] = (other[0], one[1], other[2], other[3])
        whole(hearing, letters)

    patch.setattr(Hearing, "hear", swap)


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (plant_swapped_letters, "handles message"),
        (plant_overtaken_parcels, "handles message"),
        (plant_doubled_tells, "twice"),
        (plant_lost_tells, "of a connection that stood"),
        (plant_lost_cancels, "in quiet"),
        (plant_calls_that_outlive_their_link, "still running"),
        (plant_lost_items, "gives item"),
        (plant_damaged_blobs, "other bytes"),
        (plant_hasty_ends, "it did not"),
        (plant_silent_ends, "never hears"),
        (plant_swapped_answers, "is answered by"),
    ],
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    outcome = found_by_seeds()
    assert any(says in problem for problem in outcome.problems), outcome.problems


def test_a_failure_names_its_seed_and_how_to_run_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_lost_cancels(monkeypatch)
    seed = found_by_seeds().seed
    with pytest.raises(ChaosFailed, match=f"(?s)seed {seed} found .*scripts/chaos --first {seed} --seeds 1"):
        check_seed(seed)


async def real_scenario() -> Witness:
    """Run the same actors without faults, over sockets."""
    clock, dice = SystemClock(), random.Random(1)
    witness = Witness(clock, TraceRecorder(clock), slack_s=float("inf"), stream_credit=LIMITS.stream_credit)
    cluster = Cluster(witness, clock, dice, Plan(pace_s=0.0, steps=12), lambda _: SocketNetwork())
    for name in NODES:
        await cluster.start(name, "tcp://127.0.0.1:0")
    for name in NODES:
        cluster.drive(name)
    await cluster.settle()
    await cluster.end()
    return witness


def test_the_same_actors_keep_their_promises_over_real_connections() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        witness = runner.run(asyncio.wait_for(real_scenario(), REAL_LIMIT_S))
    assert not witness.problems
    assert witness.counts["handled"] > 500
    # The workers that crash as planned take their streams with them, and nothing else fails.
    assert "node_unreachable" not in witness.counts
