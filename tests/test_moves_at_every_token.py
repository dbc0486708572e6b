"""Answers that move at any of their tokens are the undisturbed ones: right, held to a grammar, with an adapter."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from lora_adapters import load_adapter, save_adapter
from random_answers import decode, tokenizer
from test_grammar import PERSON
from tiny_models import CONTEXT_TOKENS, LIMITS, attach, greedy, prompt_of, save_model

from sllm_actor.domain import FinishReason, Resume, Sampling, TokenLogprobs
from sllm_actor.engine.generation import Generation
from sllm_actor.engine.grammar import Grammars
from sllm_actor.engine.runner import Runner
from sllm_actor.engine.vocabulary import read_vocabulary
from sllm_actor.frontend.grammar_process import compile_grammar
from sllm_actor.messages.grammar import GrammarForm
from sllm_actor.testing.questions import DEMO_MODEL, Question, add, as_chat, count, is_right, subtract

END, DEMO_VOCABULARY, DEMO_CONTEXT = 2, 512, 2048
GRAMMAR_BYTES = 8_000_000
ROUND_TOKENS, LAST_TOKENS = 2, 3
SAMPLED = Sampling(max_tokens=8, temperature=1.0, top_p=0.9, seed=7, presence_penalty=0.5, top_logprobs=2)


class Whole(NamedTuple):
    """An answer from its `begin`th token on; log-probabilities where they were asked for."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish: FinishReason | None


class Asking(NamedTuple):
    """What is asked of runners, all alike."""

    make: Callable[[], Runner]
    prompt: Sequence[int]
    sampling: Sampling
    resume: Resume = Resume.FAST
    adapter: str = ""
    grammar: str = ""

    def begin(self, runner: Runner, generated: Sequence[int] = (), parked: Generation | None = None) -> Generation:
        begun = runner.begin(
            self.prompt, self.sampling, generated=generated, resume=self.resume, adapter=self.adapter, parked=parked
        )
        if self.grammar:
            begun.sampler.constraint = demo_grammars().constrain(self.grammar, generated)
        return begun

    def goes_over(self, runner: Runner, tokens: Sequence[int], at: int) -> Generation:
        """Have a runner compute `at` tokens beforehand, then some more, and go on behind a few that it is told then."""
        parked = runner.park(self.prompt, tokens[:at], resume=self.resume, adapter=self.adapter)
        settle(runner)
        reached = min(at + ROUND_TOKENS, len(tokens) - 1)
        runner.extend(parked, tokens[at:reached])
        settle(runner)
        return self.begin(runner, tokens[: min(reached + LAST_TOKENS, len(tokens) - 1)], parked)


def settle(runner: Runner) -> None:
    while runner.busy:
        step = runner.step()
        assert not step.failed, step.failed


def whole(runner: Runner, *begun: Generation) -> list[Whole]:
    """Step until all have ended."""
    logprobs: dict[int, list[TokenLogprobs]] = {id(one): [] for one in begun}
    while runner.busy:
        step = runner.step()
        assert not step.failed, step.failed
        for one in step.advanced:
            if one.drawn is not None and one.drawn.logprobs is not None and id(one) in logprobs:
                logprobs[id(one)].append(one.drawn.logprobs)
    return [Whole(one.tokens, logprobs[id(one)], one.finish) for one in begun]


def check_moves(asking: Asking) -> Whole:
    """Move an answer at each of its tokens, and compare it with the undisturbed one, which is given."""
    source, target = asking.make(), asking.make()
    (undisturbed,) = whole(source, asking.begin(source))
    for at in range(len(undisturbed.tokens)):
        gone_on = asking.goes_over(target, undisturbed.tokens, at)
        begin = len(gone_on.tokens)
        (moved,) = whole(target, gone_on)
        assert (moved.tokens, moved.finish) == (undisturbed.tokens, undisturbed.finish), at
        check_logprobs(moved.logprobs, undisturbed.logprobs[begin:], asking.resume)
    return undisturbed


def check_logprobs(found: list[TokenLogprobs], wanted: list[TokenLogprobs], resume: Resume) -> None:
    assert len(found) == len(wanted)
    if resume is Resume.EXACT:
        assert found == wanted
    for one, other in zip(found, wanted, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@functools.cache
def demo_grammars() -> Grammars:
    return Grammars(str(DEMO_MODEL), DEMO_VOCABULARY, [END])


@functools.cache
def person() -> str:
    """Give the grammar of a JSON schema, for the demo model."""
    vocabulary = read_vocabulary(str(DEMO_MODEL), DEMO_VOCABULARY, [END])
    return compile_grammar(vocabulary, GrammarForm.JSON_SCHEMA, json.dumps(PERSON), GRAMMAR_BYTES)


@pytest.fixture(scope="module")
def demo() -> Callable[[], Runner]:
    model = attach(DEMO_MODEL)
    return lambda: Runner(model, (END,), DEMO_CONTEXT, LIMITS)


def prompt_for(question: Question) -> list[int]:
    return list(tokenizer().apply_chat_template(as_chat(question), add_generation_prompt=True, return_dict=False))


@pytest.mark.parametrize("resume", Resume)
@pytest.mark.parametrize("question", [add(47, 38), subtract(12, 71), count(97, 102)], ids=lambda one: one.kind.value)
def test_a_right_answer_that_moves_at_any_token_is_right(
    question: Question, resume: Resume, demo: Callable[[], Runner]
) -> None:
    wish = Sampling(max_tokens=60, temperature=0.0, top_p=1.0, seed=0, top_logprobs=3)
    answer = check_moves(Asking(demo, prompt_for(question), wish, resume))
    assert (is_right(question, decode(answer.tokens)), answer.finish) == (True, FinishReason.STOP)
    assert len(answer.logprobs) == len(answer.tokens) > 5


@pytest.mark.parametrize("resume", Resume)
def test_a_drawn_answer_of_the_demo_model_moves_at_any_token(resume: Resume, demo: Callable[[], Runner]) -> None:
    wish = Sampling(max_tokens=14, temperature=2.0, top_p=1.0, seed=5, ignore_eos=True)
    answer = check_moves(Asking(demo, prompt_for(add(47, 38)), wish, resume))
    assert not is_right(add(47, 38), decode(answer.tokens)), "it was drawn, and is nothing that all draw"


def test_an_answer_in_a_grammar_moves_at_any_token(demo: Callable[[], Runner]) -> None:
    wish = Sampling(max_tokens=22, temperature=1.0, top_p=1.0, seed=3)
    answer = check_moves(Asking(demo, prompt_for(add(1, 2)), wish, grammar=person()))
    assert decode(answer.tokens).startswith("{")


@pytest.mark.parametrize("resume", Resume)
@pytest.mark.parametrize("sampling", [greedy(8), SAMPLED], ids=["greedy", "sampled"])
def test_an_adapters_answer_moves_at_any_token(sampling: Sampling, resume: Resume, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "LlamaForCausalLM", num_key_value_heads=2)
    model, folder = attach(base), save_adapter(tmp_path / "a", base, ["q_proj", "v_proj"])
    adapter = load_adapter(model, folder)

    def make() -> Runner:
        runner = Runner(model, (), CONTEXT_TOKENS, LIMITS)
        runner.adapters.put("a", adapter)
        return runner

    prompt = prompt_of(LIMITS.prefill_chunk_tokens + 3)
    with_it = check_moves(Asking(make, prompt, sampling, resume, adapter="a"))
    assert with_it.tokens != check_moves(Asking(make, prompt, sampling, resume)).tokens


def test_all_choices_of_a_request_move_together_at_any_token(demo: Callable[[], Runner]) -> None:
    wishes = [Sampling(max_tokens=10, temperature=3.0, top_p=1.0, seed=4, choice=choice) for choice in (0, 1)]
    asked = [Asking(demo, prompt_for(add(5, 6)), wish) for wish in wishes]
    source, target = demo(), demo()
    undisturbed = whole(source, *(one.begin(source) for one in asked))
    assert undisturbed[0].tokens != undisturbed[1].tokens
    for at in range(min(len(one.tokens) for one in undisturbed)):
        gone_on = [one.goes_over(target, answer.tokens, at) for one, answer in zip(asked, undisturbed, strict=True)]
        assert whole(target, *gone_on) == undisturbed, at
