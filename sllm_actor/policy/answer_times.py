"""Learn a model's `a`, `c` and `t` from its answers: what computing a prompt takes, and a token. Pure.

A resumed request computes its tokens as a prompt, so `a · tokens + c` of prompts is what a resume takes.
"""

from __future__ import annotations

from typing import NamedTuple

from sllm_actor.domain import ModelName
from sllm_actor.messages.instances import Answered
from sllm_actor.policy.line_fit import Line, learned

WEIGHT = 0.1


class AnswerTimes(NamedTuple):
    """What was learned of one model on one node; 0.0 where nothing was.

    `rising` is the slope and the constant of `resume`, worked out with each answer, and not with each report.
    """

    resume: Line = Line()
    token_s: float = 0.0
    rising: tuple[float, float] = (0.0, 0.0)


_NOTHING = AnswerTimes()


class LearnedTimes:
    """Owns what was learned of each model on one node, until that is forgotten."""

    def __init__(self) -> None:
        self._times: dict[ModelName, AnswerTimes] = {}

    def of(self, model: ModelName) -> AnswerTimes:
        """Give what was learned of a model."""
        return self._times.get(model, _NOTHING)

    def learn(self, model: ModelName, answered: Answered) -> None:
        """Take in an answer of it."""
        self._times[model] = learned_answer(self.of(model), answered)

    def forget(self, model: ModelName) -> None:
        """Forget a model that is removed."""
        self._times.pop(model, None)


def learned_answer(times: AnswerTimes, answered: Answered) -> AnswerTimes:
    """Take in an answer that has ended."""
    resume, token_s, rising = times
    if answered.computed_tokens > 0 and answered.prefill_s > 0:
        resume = learned(resume, answered.computed_tokens, answered.prefill_s)
        rising = resume.rising
    if answered.tokens > 1 and answered.decode_s > 0:
        seen_s = answered.decode_s / (answered.tokens - 1)
        token_s = (1 - WEIGHT) * token_s + WEIGHT * seen_s if token_s else seen_s
    return AnswerTimes(resume, token_s, rising)
