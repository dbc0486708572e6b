"""What a cluster is asked in a simulation: when, which model, how long a prompt, how long an answer. Seeded and pure.

Arrivals are drawn as ServerlessLLM's evaluation does it (OSDI '24, section 7.1): for each model a Gamma process of its
own whose coefficient of variation is 8, so that bursts of one model meet silences of others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import log
from typing import NamedTuple

CV = 8.0
# Context of OPT and LLaMA-2: no prompt and answer together are longer.
MAX_TOKENS = 2_048


class Arrival(NamedTuple):
    """One request: when it comes, in seconds from the beginning, for the how many-th model, and its tokens."""

    at_s: float
    model: int
    prompt_tokens: int
    new_tokens: int


class Length(NamedTuple):
    """How many tokens a prompt and its answer have."""

    prompt_tokens: int
    new_tokens: int


DrawLength = Callable[[random.Random], Length]


def log_normal(prompt_median: float, prompt_sigma: float, new_median: float, new_sigma: float) -> DrawLength:
    """Give lengths whose logarithms are normal, by their medians and the deviations of their logarithms."""

    def draw(dice: random.Random) -> Length:
        prompt = dice.lognormvariate(log(prompt_median), prompt_sigma)
        new = dice.lognormvariate(log(new_median), new_sigma)
        return bounded(round(prompt), round(new))

    return draw


def bounded(prompt_tokens: int, new_tokens: int) -> Length:
    """Give lengths that fit the context together: what is too much of a prompt is cut, as the paper does it."""
    prompt = min(max(1, prompt_tokens), MAX_TOKENS // 2)
    return Length(prompt, min(max(1, new_tokens), MAX_TOKENS - prompt))


def one_of(lengths: Sequence[Length]) -> DrawLength:
    """Give lengths that were seen, each as likely."""
    return lambda dice: dice.choice(lengths)


# GSM8K: fitted to the questions and answers of its test set, 1,319 of them, in OPT's tokens (medians 53 and 91).
# ShareGPT: the means that vLLM's authors give (SOSP '23, section 6.1: 161.31 and 337.99 tokens), with the wide spread
# that their figure 11 shows.
LENGTHS: dict[str, DrawLength] = {
    "gsm8k": log_normal(53, 0.362, 91, 0.426),
    "sharegpt": log_normal(98, 1.0, 205, 1.0),
}


def zipf(models: int, exponent: float = 1.0) -> list[float]:
    """Give the part of all requests that each model has, where the n-th is asked 1/n^exponent as often as the first."""
    return as_parts([1 / rank**exponent for rank in range(1, models + 1)])


def as_parts(weights: Sequence[float]) -> list[float]:
    """Give weights as parts of their sum."""
    whole = sum(weights)
    return [weight / whole for weight in weights]


def spread(counts: Sequence[float], models: int) -> list[float]:
    """Deal functions to models, the i-th to model i mod n, and give the part of all invocations that each model has.

    A model that nobody asks has none.
    """
    weights = [0.0] * models
    for number, count in enumerate(counts):
        weights[number % models] += count
    return as_parts(weights)


def gamma_arrivals(
    dice: random.Random, *, seconds: float, per_s: float, parts: Sequence[float], lengths: DrawLength, cv: float = CV
) -> list[Arrival]:
    """Draw all requests of so many seconds, in order: `per_s` of them on average, and of each model its part."""
    shape, found = 1 / cv**2, list[Arrival]()
    for model, part in enumerate(parts):
        if part <= 0:
            continue
        mean_s = 1 / (per_s * part)
        # From somewhere within a usual gap, so that not all of them begin at once.
        at_s = dice.uniform(0, mean_s)
        while at_s < seconds:
            found.append(Arrival(at_s, model, *lengths(dice)))
            at_s += dice.gammavariate(shape, mean_s / shape)
    return sorted(found)


def rate_scaled(arrivals: Sequence[Arrival], per_s: float) -> list[Arrival]:
    """Give the same requests closer together, or further apart, so that `per_s` come on average."""
    if not arrivals or arrivals[-1].at_s <= 0:
        return list(arrivals)
    factor = len(arrivals) / arrivals[-1].at_s / per_s
    return [arrival._replace(at_s=arrival.at_s * factor) for arrival in arrivals]
