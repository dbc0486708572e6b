"""Going on in another runner with what it computed while the first one went on: a migration as two engines see it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import CONTEXT_TOKENS, LIMITS, attach, finish, greedy, prompt_of, save_model

from sllm_actor.domain import EngineLimits, Resume, Sampling
from sllm_actor.engine.generation import Generation
from sllm_actor.engine.runner import Runner
from sllm_actor.errors import GenerationFailed

SAMPLED = Sampling(max_tokens=14, temperature=1.0, top_p=0.9, seed=7, presence_penalty=0.5, frequency_penalty=0.3)
ROUND_TOKENS = 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", num_key_value_heads=2)


def runner_of(folder: Path, limits: EngineLimits = LIMITS) -> Runner:
    return Runner(attach(folder), (), CONTEXT_TOKENS, limits)


def settle(runner: Runner) -> list[Generation]:
    """Step until all that is left waits for tokens from outside; give those that were told to be as far as they can."""
    told: list[Generation] = []
    while runner.busy:
        step = runner.step()
        assert not step.failed, step.failed
        told += step.parked
    return told


def migrated(
    source: Runner, target: Runner, prompt: list[int], sampling: Sampling, at: int, resume: Resume
) -> list[int]:
    """Answer, going over after `at` tokens; the first goes on for a round while the second one computes."""
    first = source.begin(prompt, sampling, resume=resume)
    while len(first.tokens) < at:
        source.step()
    parked = target.park(prompt, first.tokens, resume=resume)
    assert settle(target) == [parked]
    for _ in range(ROUND_TOKENS):
        if first.finish is None:
            source.step()
    if first.finish is not None:
        target.cancel(parked)
        return first.tokens
    target.extend(parked, first.tokens[at:])
    assert settle(target) == [parked]
    source.cancel(first)
    gone_on = target.begin(prompt, sampling, generated=first.tokens, resume=resume, parked=parked)
    if at:
        assert gone_on.known - gone_on.written == 1, "the last token alone is left to be computed"
    finish(target)
    assert parked.slot is None
    return gone_on.tokens


@pytest.mark.parametrize("resume", [Resume.FAST, Resume.EXACT])
@pytest.mark.parametrize("sampling", [greedy(14), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "architecture",
    [
        "LlamaForCausalLM", "OPTForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
        "FalconForCausalLM", "GPTNeoXForCausalLM",
    ],
)  # fmt: skip
def test_an_answer_that_goes_over_at_any_token_is_the_undisturbed_one(
    architecture: str, sampling: Sampling, resume: Resume, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, architecture)
    source, target = runner_of(folder), runner_of(folder)
    prompt = prompt_of(LIMITS.prefill_chunk_tokens + 3)
    undisturbed = source.begin(prompt, sampling, resume=resume)
    finish(source)
    for at in range(len(undisturbed.tokens)):
        assert migrated(source, target, prompt, sampling, at, resume) == undisturbed.tokens, at


def test_a_parked_one_computes_nothing_more_and_lets_the_runner_rest(llama: Path) -> None:
    runner = runner_of(llama)
    parked = runner.park(prompt_of(40), [1, 2, 3])
    assert settle(runner) == [parked]
    assert runner.step() == ([], [], [], [])
    assert (parked.written, parked.known) == (42, 43)
    runner.extend(parked, [4])
    assert settle(runner) == [parked]
    assert parked.written == 43


@pytest.mark.parametrize("resume", [Resume.FAST, Resume.EXACT])
def test_the_tokens_that_come_with_the_take_over_are_computed_with_the_next_one(resume: Resume, llama: Path) -> None:
    source, target = runner_of(llama), runner_of(llama)
    undisturbed = source.begin(prompt_of(20), greedy(14), resume=resume)
    finish(source)
    parked = target.park(prompt_of(20), undisturbed.tokens[:5], resume=resume)
    settle(target)
    gone_on = target.begin(prompt_of(20), greedy(14), generated=undisturbed.tokens[:9], resume=resume, parked=parked)
    assert gone_on.known - gone_on.written == 5
    steps = 0
    while len(gone_on.tokens) == 9:
        target.step()
        steps += 1
    # An exact one replays them as they were computed: one by one.
    assert steps == (5 if resume is Resume.EXACT else 1)
    finish(target)
    assert gone_on.tokens == undisturbed.tokens


def test_others_are_answered_while_one_is_parked(llama: Path) -> None:
    runner = runner_of(llama)
    runner.park(prompt_of(40), [1, 2, 3])
    other = runner.begin(prompt_of(9, seed=3), greedy(12))
    settle(runner)
    assert len(other.tokens) == 12


def test_one_that_waits_for_the_slot_of_a_parked_one_gets_it_when_that_leaves(llama: Path) -> None:
    runner = runner_of(llama, EngineLimits(slots=1, kv_cache_bytes=LIMITS.kv_cache_bytes, prefill_chunk_tokens=16))
    parked = runner.park(prompt_of(20), [])
    settle(runner)
    waits = runner.begin(prompt_of(9), greedy(4))
    settle(runner)
    assert not waits.tokens
    runner.cancel(parked)
    finish(runner)
    assert len(waits.tokens) == 4


@pytest.mark.parametrize("changed", ["tokens", "adapter-less resume"])
def test_what_does_not_fit_is_computed_anew(changed: str, llama: Path) -> None:
    runner = runner_of(llama)
    parked = runner.park(prompt_of(20), [1, 2, 3])
    settle(runner)
    generated, resume = ([1, 5, 3], Resume.FAST) if changed == "tokens" else ([1, 2, 3], Resume.EXACT)
    gone_on = runner.begin(prompt_of(20), greedy(8), generated=generated, resume=resume, parked=parked)
    assert gone_on.slot is None
    finish(runner)
    alone = runner_of(llama)
    wanted = alone.begin(prompt_of(20), greedy(8), generated=generated, resume=resume)
    finish(alone)
    assert gone_on.tokens == wanted.tokens


def test_what_a_model_can_not_hold_is_refused(llama: Path) -> None:
    runner = runner_of(llama)
    with pytest.raises(GenerationFailed, match="not loaded"):
        runner.park(prompt_of(3), [], adapter="other")
    with pytest.raises(GenerationFailed, match="token 1000000 "):
        runner.park(prompt_of(3), [1000000])
    with pytest.raises(GenerationFailed, match=f"in a context of {CONTEXT_TOKENS}"):
        runner.park(prompt_of(CONTEXT_TOKENS), [1])
    parked = runner.park(prompt_of(3), [])
    with pytest.raises(GenerationFailed, match="token 1000000 "):
        runner.extend(parked, [1000000])
    assert parked.tokens == []
