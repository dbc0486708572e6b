"""What no system in a world can better: a bound from below on the mean time from a request to its first token.

Who knows all that comes, and decides in no time, has the same devices and disks all the same: `least_mean_wait_s` says
why each part of the bound holds. Pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from sllm_actor.testing.workloads import Arrival
from sllm_actor.testing.world import World


class Job(NamedTuple):
    """A request as an oracle sees it: when it can begin, what it computes for its first token, and behind that."""

    release_s: float
    prefill_s: float
    decode_s: float


def least_mean_wait_s(world: World, arrivals: Sequence[Arrival]) -> float:
    """Give a time that the mean wait for a first token can't be below, whoever serves; 0 where nothing is asked.

    1. No model runs before it is first asked for. Its first start reads its bytes from an SSD at full bandwidth, or
       from its source where no SSD has it, and fills a device; no request for it begins before that start has ended.
    2. A prompt is computed at the speed of a device that does nothing else, and a token comes a step after another.
    3. An answer that has begun takes a slot until its end, wherever it moves. All slots together are at most as good as
       one that is so many times as fast and may change between requests at any moment. There, to work at what has the
       least left gives the least sum of ends (Schrage, 1968); an end less the shortest decoding is the soonest first
       token. This does not hold for `preempt`, which ends answers that have begun.
    """
    jobs = _jobs(world, arrivals)
    if not jobs:
        return 0.0
    slots = len(world.names) * world.instances * world.description.concurrency
    ends_s = least_ends_s([(job.release_s, job.prefill_s + job.decode_s) for job in jobs], slots)
    arrived_s = sum(arrival.at_s for arrival in arrivals)
    by_slots_s = ends_s - sum(job.decode_s for job in jobs) - arrived_s
    by_starts_s = sum(job.release_s + job.prefill_s for job in jobs) - arrived_s
    return max(by_slots_s, by_starts_s) / len(jobs)


def _jobs(world: World, arrivals: Sequence[Arrival]) -> list[Job]:
    """Give the requests, of which none begins before the first start of its model can have ended."""
    begins_s: dict[int, float] = {}
    jobs = []
    for arrival in sorted(arrivals):
        speed = world.speed(arrival.model)
        if arrival.model not in begins_s:
            moved_s = world.models[arrival.model].size_bytes / world.best_bytes_per_s
            begins_s[arrival.model] = arrival.at_s + max(moved_s, speed.copy_s) + speed.attach_s
        release_s = max(arrival.at_s, begins_s[arrival.model])
        prefill_s = speed.prefill_s_per_token * arrival.prompt_tokens
        # The first token comes with the prompt.
        jobs.append(Job(release_s, prefill_s, (speed.step_s + speed.row_s) * (arrival.new_tokens - 1)))
    return jobs


def least_ends_s(work: Sequence[tuple[float, float]], slots: int) -> float:
    """Give the least sum of the moments at which work ends, each given by its release and its length.

    It is done by one slot that is `slots` times as fast, which has the shortest rest first.
    """
    now_s, whole_s = 0.0, 0.0
    left: list[float] = []
    coming = sorted((release_s, length_s / slots) for release_s, length_s in work)
    place = 0
    while place < len(coming) or left:
        if not left:
            now_s = max(now_s, coming[place][0])
        while place < len(coming) and coming[place][0] <= now_s:
            heapq.heappush(left, coming[place][1])
            place += 1
        next_s = coming[place][0] if place < len(coming) else float("inf")
        if now_s + left[0] <= next_s:
            now_s += heapq.heappop(left)
            whole_s += now_s
        else:
            heapq.heapreplace(left, left[0] - (next_s - now_s))
            now_s = next_s
    return whole_s
