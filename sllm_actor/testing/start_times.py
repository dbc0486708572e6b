"""How long starts took, and the least that each could have: from the decisions that a Scheduler remembers. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import NamedTuple

from sllm_actor.messages.explanation import Explanation
from sllm_actor.policy.estimator import SOURCE, SSD
from sllm_actor.testing.world import World


class StartTimes(NamedTuple):
    """Means in seconds: from the request that had to begin a start until its instance runs, and the least for it."""

    mean_s: float = float("nan")
    least_mean_s: float = float("nan")


def start_times(decisions: Iterable[Explanation], world: World) -> StartTimes:
    """Look at the starts that have succeeded.

    Who has what is asked for started at once takes no less than its bytes need from the fastest tier that had them on
    any node with a place for it, or from an SSD where each model is on one, beside a disk and a device that do nothing
    else. What a start waits for beyond that is devices, disks and decisions.
    """
    started = [one for one in decisions if one.outcome == "started" and one.chosen is not None]
    if not started:
        return StartTimes()
    everywhere = SSD if world.is_on_ssd else SOURCE
    least_s = [min(world.least_start_s(one.model, tier) for tier in {everywhere} | _tiers(one)) for one in started]
    return StartTimes(fmean(one.waited_s + one.observed_s for one in started), fmean(least_s))


def _tiers(decision: Explanation) -> set[str]:
    """Name the tiers that had the bytes when they were asked for: what was fetched for the start was not there."""
    chosen = decision.chosen
    assert chosen is not None, "it has started"
    tiers = {one.tier for one in decision.candidates if one.node != chosen.node}
    return tiers if decision.fetched_s else {chosen.tier} | tiers
