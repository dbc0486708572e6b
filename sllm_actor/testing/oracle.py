"""What no system in a world can better: a bound from below on the mean time from a request to its first token.

Who knows all that comes, and decides in no time, has the same devices and disks all the same: `mean_waits_s` says why
each part of the bound holds, and what of that is foresight of how long answers will be. Pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sllm_actor.testing.on_demand import on_demand_begins_s
from sllm_actor.testing.workloads import Arrival
from sllm_actor.testing.world import World


class Job(NamedTuple):
    """A request as an oracle sees it: when it can begin, what it computes for its first token, and behind that."""

    release_s: float
    prefill_s: float
    decode_s: float


class MeanWaits(NamedTuple):
    """Mean times from a request to its first token, in seconds.

    No less is possible; as they come, where everything is everywhere; as they come, where starts are on demand.
    """

    least_s: float
    first_come_s: float
    on_demand_s: float


def mean_waits_s(world: World, arrivals: Sequence[Arrival]) -> MeanWaits:
    """Give what requests would wait on average at least, whoever serves, and if they began as they come; 0 without any.

    Of both bounds:

    1. No model runs before it is first asked for. Its first start reads its bytes from an SSD at full bandwidth, or
       from its source where no SSD has it, and fills a device; no request for it begins before that start has ended.
    2. A prompt is computed at the speed of a device that does nothing else, and a token comes a step after another.

    Of the least:

    3. An answer that has begun takes a slot until its end, wherever it moves. All slots together are at most as good as
       one that is so many times as fast and may change between requests at any moment. An answer of length p that is
       spread over [begin, begin + p] has the middle of its work p / 2 behind its begin, and no order of work has a
       lesser sum of middles than the shortest answer first (Goemans, 1997; Schulz and Skutella, 2002, for machines
       side by side). This does not hold for `preempt`, which ends answers that have begun.

    Both hold for any part of the requests, too, since the others only stand in the way: of each time in which that
    fast slot has no pause the larger bound is taken.

    Of those who begin as they come: each model is, from its first start on, on every device for nothing, and whatever
    slot is free first takes whoever comes first. It is no bound: who knows which answers are short, or guesses it, can
    begin these sooner, and so can chance. Who knows nothing of them has no reason to be better on average. Of those who
    start on demand: `on_demand`, which is none either.
    """
    arrivals = sorted(arrivals, key=lambda arrival: arrival.at_s)
    jobs = _jobs(world, arrivals)
    if not jobs:
        return MeanWaits(0.0, 0.0, 0.0)
    work, slots = [(job.release_s, job.prefill_s + job.decode_s) for job in jobs], _slots(world)
    # From arrivals to first tokens, but for the begins between them.
    apart_s = sum(job.prefill_s for job in jobs) - sum(arrival.at_s for arrival in arrivals)
    return MeanWaits(
        (least_begins_s(work, slots) + apart_s) / len(jobs),
        (first_come_begins_s(work, slots) + apart_s) / len(jobs),
        (sum(on_demand_begins_s(world, arrivals)) + apart_s) / len(jobs),
    )


def _slots(world: World) -> int:
    return len(world.names) * world.instances * world.description.concurrency


def _jobs(world: World, arrivals: Sequence[Arrival]) -> list[Job]:
    """Give the requests, of which none begins before the first start of its model can have ended."""
    begins_s: dict[int, float] = {}
    jobs = []
    for arrival in arrivals:
        speed = world.speed(arrival.model)
        if arrival.model not in begins_s:
            moved_s = world.models[arrival.model].size_bytes / world.best_bytes_per_s
            begins_s[arrival.model] = arrival.at_s + max(moved_s, speed.copy_s) + speed.attach_s
        release_s = max(arrival.at_s, begins_s[arrival.model])
        prefill_s = speed.prompts_s(arrival.prompt_tokens)
        # The first token comes with the prompt.
        jobs.append(Job(release_s, prefill_s, (speed.step_s + speed.row_s) * (arrival.new_tokens - 1)))
    return jobs


def least_begins_s(work: Sequence[tuple[float, float]], slots: int) -> float:
    """Give a bound from below on the sum of the moments at which work begins, each given by its release and its length.

    One slot that is `slots` times as fast always does the shortest that there is.
    """
    whole_s = 0.0
    for busy in _busy_times(sorted(work), slots):
        middles_s = sum(_middles_s(busy, slots))
        lengths_s = sum(length_s for _, length_s in busy)
        whole_s += max(middles_s - lengths_s / 2, sum(release_s for release_s, _ in busy))
    return whole_s


def first_come_begins_s(work: Sequence[tuple[float, float]], slots: int) -> float:
    """Give the sum of the moments at which work begins, each on whatever slot is free first, by release alone."""
    ends_s: list[float] = []
    whole_s = 0.0
    for release_s, length_s in sorted(work, key=lambda one: one[0]):
        while ends_s and ends_s[0] <= release_s:
            heapq.heappop(ends_s)
        begin_s = release_s if len(ends_s) < slots else heapq.heappop(ends_s)
        whole_s += begin_s
        heapq.heappush(ends_s, begin_s + length_s)
    return whole_s


def _busy_times(work: Sequence[tuple[float, float]], slots: int) -> Iterator[list[tuple[float, float]]]:
    """Part what is done by a slot that is so fast where it has nothing left."""
    busy: list[tuple[float, float]] = []
    end_s = 0.0
    for release_s, length_s in work:
        if busy and release_s > end_s:
            yield busy
            busy = []
        end_s = (end_s if busy else release_s) + length_s / slots
        busy.append((release_s, length_s))
    if busy:
        yield busy


def _middles_s(work: Sequence[tuple[float, float]], slots: int) -> Iterator[float]:
    """Give the mean moment of each piece of work, in the order in which they end."""
    now_s, place = 0.0, 0
    # Their lengths, which rank them, places, what is left of them, and the sum of moments so far.
    left: list[tuple[float, int, float, float]] = []
    while place < len(work) or left:
        if not left:
            now_s = max(now_s, work[place][0])
        while place < len(work) and work[place][0] <= now_s:
            length_s = work[place][1] / slots
            heapq.heappush(left, (length_s, place, length_s, 0.0))
            place += 1
        next_s = work[place][0] if place < len(work) else float("inf")
        length_s, at, rest_s, moments = left[0]
        spent_s = min(rest_s, next_s - now_s)
        moments += spent_s * (now_s + spent_s / 2)
        now_s += spent_s
        if spent_s < rest_s:
            heapq.heapreplace(left, (length_s, at, rest_s - spent_s, moments))
        else:
            heapq.heappop(left)
            # Of what is all but nothing, the quotient is rounded to anywhere.
            yield min(moments / length_s, now_s) if length_s else now_s
