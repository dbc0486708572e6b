"""What a cluster is asked in a simulation: when, which model, how long a prompt, how long an answer. Seeded and pure.

Arrivals are drawn as ServerlessLLM's evaluation does it (OSDI '24, section 7.1): for each model a Gamma process of its
own whose coefficient of variation is 8, so that bursts of one model meet silences of others. It is one process for the
whole time (`gamma_arrivals`), or one for each interval of a trace (`binned_arrivals`), as AlpaServe's evaluation has it
(OSDI '23), whose recipe that is.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import exp, fsum, log
from typing import NamedTuple

from sllm_actor.errors import InvalidInput

CV = 8.0
# The logarithm of the seconds that gaps may be scaled with: beyond them are no floats.
LONGEST_GAP_LOG = 690.0
# So many terms of a sum at once, and the term behind which there is nothing more to be seen of it.
TERMS, LEAST_TERM = 512, 1e-12
# From so many gaps on, and so long a time in units of their scale, a Gamma process has forgotten that it has begun.
FORGOTTEN_GAPS, FORGOTTEN_SPAN = 250.0, 40.0
HALVINGS = 48
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

    prompt_log, new_log = log(prompt_median), log(new_median)

    def draw(dice: random.Random) -> Length:
        prompt = dice.lognormvariate(prompt_log, prompt_sigma)
        return bounded(round(prompt), round(dice.lognormvariate(new_log, new_sigma)))

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
    whole = fsum(weights)
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
    dice: random.Random, *, seconds: float, per_s: float, parts: Sequence[float], lengths: DrawLength, cv: float = CV,
    most: int | None = None,
) -> list[Arrival]:  # fmt: skip
    """Draw the requests of so many seconds, in order: `per_s` of them on average, and of each model its part.

    At `most` so many of them, the first. Their lengths are drawn when it is known which they are.
    """
    shape, found = 1 / cv**2, list[tuple[float, int]]()
    for model, part in enumerate(parts):
        if part <= 0:
            continue
        mean_s = 1 / (per_s * part)
        # From somewhere within a usual gap, so that not all of them begin at once.
        at_s = dice.uniform(0, mean_s)
        while at_s < seconds:
            found.append((at_s, model))
            at_s += dice.gammavariate(shape, mean_s / shape)
    found.sort()
    return [Arrival(at_s, model, *lengths(dice)) for at_s, model in found[:most]]


def binned(functions: Iterable[Sequence[float]], models: int, minutes: int) -> list[list[float]]:
    """Deal functions that are invoked at all to models in turn, and join their minutes to intervals of so many.

    Give how often each model is asked in each: [model][interval]. Every function has as many minutes as the others.
    """
    found: list[list[float]] = [[] for _ in range(models)]
    for number, by_minute in enumerate(filter(any, functions)):
        joined = [fsum(by_minute[begin : begin + minutes]) for begin in range(0, len(by_minute), minutes)]
        before = found[number % models] or [0.0] * len(joined)
        found[number % models] = [one + other for one, other in zip(before, joined, strict=True)]
    return found


def binned_arrivals(
    dice: random.Random, counts: Sequence[Sequence[float]], *, bin_s: float, seconds: float, per_s: float,
    lengths: DrawLength, cv: float = CV,
) -> list[Arrival]:  # fmt: skip
    """Draw all requests of so many seconds, in order, from how often each model is asked in each interval of `bin_s`.

    In each a Gamma process of its own begins, whose rate is the interval's count, all of them scaled alike so that
    `per_s` come on average, and it ends with it (AlpaServe, OSDI '23).

    Raises:
        InvalidInput: requests that are so bursty can't be so few.
    """
    scale = scale_for(counts, bin_s=bin_s, seconds=seconds, per_s=per_s, cv=cv)
    shape, found = 1 / cv**2, list[Arrival]()
    for model, row in enumerate(counts):
        for begin_s, end_s, count in _intervals(row, bin_s, seconds):
            gap_scale_s = bin_s / (count * scale) / shape
            at_s = begin_s + dice.gammavariate(shape, gap_scale_s)
            while at_s < end_s:
                found.append(Arrival(at_s, model, *lengths(dice)))
                at_s += dice.gammavariate(shape, gap_scale_s)
    # Many come in the very moment in which an interval begins: in the order in which they were drawn.
    return sorted(found, key=lambda one: one.at_s)


def scale_for(counts: Sequence[Sequence[float]], *, bin_s: float, seconds: float, per_s: float, cv: float) -> float:
    """Give what all counts have to be scaled with so that `per_s` requests come on average, by halving.

    It is far from the wanted number over the sum of counts: a bursty process that has just begun has most of its
    arrivals soon, whatever its rate.

    Raises:
        InvalidInput: requests that are so bursty can't be so few.
    """
    # How many intervals have so many requests and so many seconds, for many are alike.
    alike = Counter(
        (count, end_s - begin_s) for row in counts for begin_s, end_s, count in _intervals(row, bin_s, seconds)
    )
    wanted = per_s * seconds
    if not alike:
        raise InvalidInput("nobody asks for anything in these intervals")

    def expected(log_scale: float) -> float:
        rate = exp(log_scale) / bin_s
        return fsum(many * expected_arrivals(rate * count, length_s, cv) for (count, length_s), many in alike.items())

    # No process has on average more than one arrival less than its time has mean gaps.
    gaps = fsum(many * count * length_s for (count, length_s), many in alike.items()) / bin_s
    high = log((wanted + alike.total()) / gaps)
    low = log(bin_s * cv**2 / min(count for count, _ in alike)) - LONGEST_GAP_LOG
    if expected(low) > wanted:
        raise InvalidInput(
            f"{alike.total()} intervals in which requests are so bursty (a coefficient of variation of {cv:g}) have "
            f"more than {wanted:.3g} of them on average, at any rate that can be drawn; take longer ones, or a lower CV"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) < wanted else (low, middle)
    return exp(high)


def _intervals(row: Sequence[float], bin_s: float, seconds: float) -> Iterable[tuple[float, float, float]]:
    """Give begin, end and count of each interval in which somebody asks; the last ends with the time."""
    for number, count in enumerate(row):
        if count > 0 and number * bin_s < seconds:
            yield number * bin_s, min((number + 1) * bin_s, seconds), count


def expected_arrivals(per_s: float, seconds: float, cv: float) -> float:
    """Give how many arrivals a Gamma process has on average in so many seconds from its begin.

    It is the sum over all n of how likely the first n gaps together are no longer, which have a Gamma distribution of n
    times the shape of one. Where gaps are many, renewal theory gives it in the limit.
    """
    import torch

    gaps, shape = per_s * seconds, 1 / cv**2
    span = gaps * shape
    if gaps > FORGOTTEN_GAPS and span > FORGOTTEN_SPAN:
        return gaps + (cv**2 - 1) / 2
    whole, number, last = 0.0, 1, 1.0
    while last > LEAST_TERM:
        shapes = shape * torch.arange(number, number + TERMS, dtype=torch.float64)
        terms = torch.special.gammainc(shapes, torch.tensor(span, dtype=torch.float64))
        whole, number, last = whole + float(terms.sum()), number + TERMS, float(terms[-1])
    return whole


def rate_scaled(arrivals: Sequence[Arrival], per_s: float) -> list[Arrival]:
    """Give the same requests closer together, or further apart, so that `per_s` come on average."""
    if not arrivals or arrivals[-1].at_s <= 0:
        return list(arrivals)
    factor = len(arrivals) / arrivals[-1].at_s / per_s
    return [Arrival(at_s * factor, *what) for at_s, *what in arrivals]
