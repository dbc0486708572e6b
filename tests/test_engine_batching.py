"""Many generations on one model: who is computed when, in which memory, and what one's failure is to the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONTEXT_TOKENS, LIMITS, attach, finish, greedy, prompt_of, run, save_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from sllm_actor.domain import EngineLimits, FinishReason, Resume, Sampling
from sllm_actor.engine import runner as runner_module
from sllm_actor.engine import sampling as sampling_module
from sllm_actor.engine.generation import Generation
from sllm_actor.engine.kv_cache import FIRST_CAPACITY_TOKENS, KvShape, Slot, SlotPool, common_prefix
from sllm_actor.engine.lora import Adapter
from sllm_actor.engine.runner import Runner
from sllm_actor.errors import GenerationFailed, InvalidRequest

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CHUNK_TOKENS = LIMITS.prefill_chunk_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", num_key_value_heads=2)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return attach(folder)


def engine(model: PreTrainedModel, *, slots: int = 8, kv_tokens: int = 4096, chunk: int = CHUNK_TOKENS) -> Runner:
    limits = EngineLimits(slots=slots, kv_cache_bytes=kv_tokens * TOKEN_BYTES, prefill_chunk_tokens=chunk)
    return Runner(model, (), CONTEXT_TOKENS, limits)


# Keys and values of two layers with two key heads of 8 numbers each, four bytes a number.
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Note how many tokens each forward pass computes."""
    passes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield passes
    finally:
        hook.remove()


def seeded(max_tokens: int, seed: int = 3) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True)


# Steps.


def test_one_pass_computes_one_token_for_all(model: PreTrainedModel) -> None:
    runner = engine(model)
    generations = [runner.begin(prompt_of(5, seed=k), greedy(4)) for k in range(4)]
    with counted(model) as passes:
        finish(runner)
    assert passes == [20, 4, 4, 4]
    assert all(len(generation.tokens) == 4 for generation in generations)


def test_a_long_prompt_comes_in_chunks_and_no_running_answer_waits_longer_than_for_one(model: PreTrainedModel) -> None:
    runner = engine(model)
    first = runner.begin(prompt_of(5), greedy(60))
    runner.step()
    long = runner.begin(prompt_of(3 * CHUNK_TOKENS + 4, seed=1), greedy(2))
    with counted(model) as passes:
        for step in range(1, 5):
            assert first in runner.step().advanced
            assert bool(long.tokens) == (step == 4)
    assert passes == [CHUNK_TOKENS + 1] * 3 + [5]


def test_prompts_share_a_chunk_and_the_last_of_them_may_be_cut(model: PreTrainedModel) -> None:
    runner = engine(model)
    generations = [runner.begin(prompt_of(12, seed=k), greedy(3)) for k in range(4)]
    with counted(model) as passes:
        assert runner.step().advanced == generations[:2]
        assert runner.step().advanced == generations
        finish(runner)
    assert passes == [CHUNK_TOKENS, 2 + 16, 4, 2]


def test_a_seeded_answer_is_the_same_alone_and_in_any_batch(model: PreTrainedModel) -> None:
    prompts = [prompt_of(length, seed=length) for length in (3, 40, 17)]
    alone = [run(model, prompt, seeded(40)) for prompt in prompts]
    for order in itertools.permutations(range(3)):
        runner = engine(model)
        together = {}
        for place in order:
            together[place] = runner.begin(prompts[place], seeded(40))
            runner.step()
        finish(runner)
        assert [together[place].tokens for place in range(3)] == alone


def test_a_cancelled_generation_is_out_of_the_next_step_and_its_slot_is_free(model: PreTrainedModel) -> None:
    runner = engine(model, slots=2)
    gone, stays, waits = (runner.begin(prompt_of(5, seed=k), greedy(9)) for k in range(3))
    assert runner.step().advanced == [gone, stays]
    runner.cancel(gone)
    step = runner.step()
    assert (step.admitted, step.advanced) == ([waits], [stays, waits])
    assert len(gone.tokens) == 1
    finish(runner)
    assert stays.tokens == run(model, prompt_of(5, seed=1), greedy(9))
    runner.cancel(runner.begin(prompt_of(5), greedy(5)))
    assert not runner.busy


def test_of_those_who_wait_the_least_priority_is_first_and_then_the_first_to_come(model: PreTrainedModel) -> None:
    runner = engine(model, slots=1)
    runner.begin(prompt_of(3), greedy(3))
    runner.step()
    asked = [("late", 0), ("later", 0), ("urgent", -5), ("idle", 7), ("urgent, too", -5)]
    names = {runner.begin(prompt_of(3), greedy(2), priority=priority): name for name, priority in asked}
    admitted: list[Generation] = []
    while runner.busy:
        admitted += runner.step().admitted
    assert [names[generation] for generation in admitted] == ["urgent", "urgent, too", "late", "later", "idle"]


# Memory.


def test_a_prompt_that_can_never_fit_is_refused_at_once(model: PreTrainedModel) -> None:
    runner = engine(model, kv_tokens=50)
    with pytest.raises(InvalidRequest, match=r"51 tokens .* of 50 tokens"):
        runner.begin(prompt_of(51), greedy(1))
    assert runner.begin(prompt_of(50), greedy(1)).finish is None


def test_an_answer_that_has_all_the_memory_ends_where_that_ends(model: PreTrainedModel) -> None:
    runner = engine(model, kv_tokens=50)
    generation = runner.begin(prompt_of(20), greedy(200))
    advanced = [generation for _ in range(40) for generation in runner.step().advanced]
    assert (generation.finish, len(advanced)) == (FinishReason.LENGTH, 32)
    # The last token of an answer needs no room: nothing is computed with it.
    assert generation.tokens == run(model, prompt_of(20), greedy(31))
    assert generation.drawn is None
    assert not runner.busy


def test_where_answers_outgrow_the_memory_the_last_makes_way_and_goes_on_later(model: PreTrainedModel) -> None:
    runner = engine(model, kv_tokens=200)
    prompts = [prompt_of(30, seed=k) for k in range(4)]
    generations = [runner.begin(prompt, seeded(90)) for prompt in prompts]
    admitted: list[Generation] = []
    ended: list[Generation] = []
    while runner.busy:
        step = runner.step()
        assert not step.failed
        admitted += step.admitted
        ended += [generation for generation in step.advanced if generation.finish]
    assert len(admitted) > 4
    assert ended[0] is generations[0]
    assert [generation.tokens for generation in generations] == [run(model, prompt, seeded(90)) for prompt in prompts]


def test_a_slot_grows_by_doubling_and_keeps_what_is_written() -> None:
    pool = SlotPool(SHAPE, 2, 4096 * SHAPE.token_bytes)
    slot = pool.take(1, (), "")
    assert slot is not None
    written = torch.randn(1, SHAPE.heads, 300, SHAPE.head_dim)
    capacities = []
    for past in range(300):
        assert pool.grow(slot, past + 1)
        one = written[:, :, past : past + 1]
        for layer in range(SHAPE.layers):
            keys, values = slot.put(layer, past, one, -one)
            assert torch.equal(keys, written[:, :, : past + 1])
            assert torch.equal(values, -written[:, :, : past + 1])
        slot.tokens.append(past)
        capacities.append(slot.capacity_tokens)
    assert sorted(set(capacities)) == [FIRST_CAPACITY_TOKENS, 128, 256, 512]


SHAPE = KvShape(layers=2, heads=3, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 200), st.booleans()), max_size=60))
def test_slots_and_their_bytes_stay_within_their_bounds(events: list[tuple[int, int, bool]]) -> None:
    pool = SlotPool(SHAPE, 3, 300 * SHAPE.token_bytes)
    held: list[Slot] = []
    for place, tokens, flag in events:
        if flag and place < len(held):
            slot = held[place]
            if pool.grow(slot, min(tokens + slot.capacity_tokens, 300)):
                slot.tokens = list(range(slot.capacity_tokens))
        elif place < len(held):
            pool.give_back(held.pop(place), keep=tokens % 2 == 0)
        elif (taken := pool.take(tokens, range(tokens), "")) is not None:
            held.append(taken)
        kept = pool.kept_tokens
        assert len(held) + (kept > 0) <= 3
        assert sum(slot.capacity_tokens for slot in held) + kept <= pool.promised_tokens + kept <= 300


@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40))
def test_the_common_prefix_is_the_longest(left: list[int], right: list[int]) -> None:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    assert common_prefix(left, right) == len(list(pairs))


# Prefixes.


def test_what_another_prompt_began_with_is_not_computed_again(model: PreTrainedModel) -> None:
    runner = engine(model)
    begins = prompt_of(50)
    first = runner.begin(begins + prompt_of(8, seed=1), greedy(10))
    finish(runner)
    turn = begins + prompt_of(8, seed=1) + first.tokens + prompt_of(6, seed=2)
    other = begins[:31] + prompt_of(20, seed=3)
    for prompt, cached in ((turn, 67), (other, 31), (turn, len(turn) - 1), (begins, 49), (prompt_of(9, seed=4), 0)):
        with counted(model) as passes:
            generation = runner.begin(prompt, seeded(12))
            finish(runner)
        assert generation.cached_tokens == cached
        assert sum(passes) == len(prompt) - cached + 11
        assert generation.tokens == run(model, prompt, seeded(12))


def test_a_running_sequence_gives_what_it_has_and_goes_on(model: PreTrainedModel) -> None:
    runner = engine(model)
    first = runner.begin(prompt_of(40), greedy(30))
    for _ in range(6):
        runner.step()
    second = runner.begin(prompt_of(40) + first.tokens[:3] + [9], greedy(30))
    finish(runner)
    assert second.cached_tokens == 43
    assert first.tokens == run(model, prompt_of(40), greedy(30))
    assert second.tokens == run(model, second.prompt, greedy(30))


def test_a_scored_prompt_is_computed_whole_and_has_the_models_own_log_probabilities(
    model: PreTrainedModel, folder: Path
) -> None:
    prompt = prompt_of(2 * CHUNK_TOKENS + 3, 1)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.inference_mode():
        rows = torch.log_softmax(theirs(torch.tensor([prompt])).logits[0].float(), dim=-1)
    runner = engine(model)
    runner.begin(prompt, greedy(2))
    finish(runner)  # What another one has computed is not taken: it has no logits.
    wish = msgspec.structs.replace(greedy(0), prompt_logprobs=True, top_logprobs=2)
    scored, other = runner.begin(prompt, wish), runner.begin(prompt_of(9, 2), greedy(3))
    finish(runner)
    assert (scored.tokens, scored.finish, len(other.tokens)) == ([], FinishReason.LENGTH, 3)
    wanted = [float(rows[at - 1, prompt[at]]) for at in range(1, len(prompt))]
    assert [found.logprob for found in scored.scored] == pytest.approx(wanted, abs=1e-4)
    assert [found.top[0][1] for found in scored.scored] == pytest.approx(rows[:-1].amax(-1).tolist(), abs=1e-4)


def test_a_prompt_that_made_way_is_scored_once(model: PreTrainedModel) -> None:
    runner = engine(model, kv_tokens=64)
    wish = msgspec.structs.replace(greedy(30), prompt_logprobs=True, top_logprobs=0)
    first, second = runner.begin(prompt_of(20, 1), wish), runner.begin(prompt_of(20, 2), wish)
    finish(runner)
    assert (len(first.scored), len(second.scored)) == (19, 19)


def test_choices_of_one_prompt_compute_it_once(model: PreTrainedModel) -> None:
    runner = engine(model)
    prompt = prompt_of(3 * CHUNK_TOKENS)
    choices = [runner.begin(prompt, seeded(5, seed=k)) for k in range(4)]
    with counted(model) as passes:
        finish(runner)
    assert sum(passes) < len(prompt) + 4 * 6
    assert [choice.cached_tokens for choice in choices] == [0] + [len(prompt) - 1] * 3
    assert [choice.tokens for choice in choices] == [run(model, prompt, seeded(5, seed=k)) for k in range(4)]


def test_the_least_recently_used_sequence_is_forgotten_first(model: PreTrainedModel) -> None:
    runner = engine(model, slots=2)
    prompts = [prompt_of(20, seed=k) for k in range(3)]

    def cached(prompt: Sequence[int]) -> int | None:
        generation = runner.begin(prompt, greedy(1))
        finish(runner)
        return generation.cached_tokens

    assert [cached(prompts[place]) for place in (0, 1, 0, 2, 0, 1)] == [0, 0, 19, 0, 19, 0]


def test_keys_of_one_adapter_are_not_those_of_another(model: PreTrainedModel) -> None:
    runner = engine(model)
    for key in ("a", "b"):
        runner.adapters.put(key, Adapter({}))
    seen = []
    for adapter in ("", "a", "b", "a", ""):
        generation = runner.begin(prompt_of(20), greedy(1), adapter=adapter)
        finish(runner)
        seen.append(generation.cached_tokens)
    assert seen == [0, 0, 0, 19, 19]


# Failures.


@contextmanager
def poisoned(model: PreTrainedModel, token: int) -> Iterator[None]:
    """Let the embedding of one token be no number."""
    weight = model.get_input_embeddings().weight
    before = weight[token].clone()
    weight[token] = float("nan")
    try:
        yield
    finally:
        weight[token] = before


def test_numbers_that_are_none_fail_their_request_alone_and_leave_nothing_behind(model: PreTrainedModel) -> None:
    runner = engine(model, slots=3)
    good = [runner.begin(prompt_of(30, seed=k), greedy(20)) for k in range(2)]
    answers = [run(model, generation.prompt, greedy(20)) for generation in good]
    taken = {token for one, answer in zip(good, answers, strict=True) for token in one.prompt + answer}
    token = next(token for token in range(3, 128) if token not in taken)
    bad = runner.begin([*prompt_of(20, seed=5), token], greedy(20))
    with poisoned(model, token):
        step = runner.step()
        while not step.failed:
            step = runner.step()
    assert [(failed, type(error)) for failed, error in step.failed] == [(bad, GenerationFailed)]
    assert "not finite" in step.failed[0][1].message
    again = runner.begin(bad.prompt, greedy(20))
    finish(runner)
    assert again.cached_tokens == 0
    for generation in (*good, again):
        assert generation.tokens == run(model, generation.prompt, greedy(20))


@pytest.mark.parametrize("fault", [RuntimeError("no memory"), MemoryError(), IndexError("no such row")])
def test_a_pass_that_fails_ends_what_was_in_it_and_the_engine_goes_on(
    model: PreTrainedModel, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine(model, slots=2)
    running = [runner.begin(prompt_of(9, seed=k), greedy(9)) for k in range(2)]
    runner.step()
    waits = runner.begin(prompt_of(9, seed=2), greedy(9))

    def fail(*_: Any, **__: Any) -> None:
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(model, "forward", fail)
        step = runner.step()
    assert [generation for generation, _ in step.failed] == running
    assert all(isinstance(error, GenerationFailed) for _, error in step.failed)
    finish(runner)
    assert waits.tokens == run(model, waits.prompt, greedy(9))


def test_a_slot_that_finds_no_memory_fails_its_request_alone(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine(model)
    first = runner.begin(prompt_of(9), greedy(20))
    runner.step()

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(Slot, "resize", fail)
        second = runner.begin(prompt_of(9, seed=1), greedy(9))
        step = runner.step()
    assert [generation for generation, _ in step.failed] == [second]
    assert step.advanced == [first]
    finish(runner)
    assert first.tokens == run(model, first.prompt, greedy(20))


# Resuming.


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[object, int], torch.Tensor]]:
    """Note the logits behind every drawn token, by its sampler and place."""
    seen: dict[tuple[object, int], torch.Tensor] = {}

    def record(logits: torch.Tensor, samplers: Sequence[Any]) -> Any:
        seen.update(((sampler, sampler.position), row.clone()) for row, sampler in zip(logits, samplers, strict=True))
        return sampling_module.draw_rows(logits, samplers)

    with monkeypatch.context() as patched:
        patched.setattr(runner_module, "draw_rows", record)
        yield seen


@pytest.mark.parametrize("sampling", [greedy(24), seeded(24)])
@pytest.mark.parametrize("resume", Resume)
def test_an_answer_that_is_cut_anywhere_goes_on_as_if_it_was_not(
    model: PreTrainedModel, sampling: Sampling, resume: Resume
) -> None:
    for length in (1, 33, 70):
        prompt = prompt_of(length, seed=length)
        whole = run(model, prompt, sampling)
        runner = engine(model, slots=4)
        cut = [runner.begin(prompt, sampling, generated=whole[:at], resume=resume) for at in range(25)]
        assert cut[24].finish is FinishReason.LENGTH
        finish(runner)
        assert [generation.tokens for generation in cut] == [whole] * 25


def test_an_answer_that_has_its_end_already_is_not_run(model: PreTrainedModel) -> None:
    runner = Runner(model, (5,), CONTEXT_TOKENS, LIMITS)
    wish = Sampling(max_tokens=9, temperature=0.0, top_p=1.0, seed=0, stop_token_ids=(6,))
    for end in (5, 6):
        assert runner.begin([3, 4], wish, generated=[8, end]).finish is FinishReason.STOP
    assert runner.begin([3, 4], wish, generated=[8, 9]).finish is None


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "FalconForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_resume_has_the_same_logits_bit_for_bit_whatever_runs_beside_it(
    architecture: str, dtype: torch.dtype, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(save_model(tmp_path, architecture, dtype=dtype))
    prompt, sampling = prompt_of(CHUNK_TOKENS + 9), seeded(20)

    def beside(runner: Runner, neighbours: int) -> None:
        for k in range(neighbours):
            runner.begin(prompt[: 7 * k + 1] + prompt_of(11, seed=k), greedy(40))
            runner.step()

    with recorded(monkeypatch) as seen:
        runner = engine(model)
        beside(runner, 2)
        first = runner.begin(prompt, sampling, resume=Resume.EXACT)
        finish(runner)
        for at, neighbours in ((0, 0), (1, 3), (8, 5), (19, 1)):
            runner = engine(model)
            beside(runner, neighbours)
            again = runner.begin(prompt, sampling, generated=first.tokens[:at], resume=Resume.EXACT)
            finish(runner)
            assert again.tokens == first.tokens
            for place in range(at, 20):
                assert torch.equal(seen[again.sampler, place], seen[first.sampler, place]), (at, place)


def test_a_rope_of_the_whole_pass_is_resumed_as_it_was_computed(tmp_path: Any) -> None:
    """Its longer half begins within the answer: what was computed before that was rotated by the shorter one."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope |= {"original_max_position_embeddings": 80, "factor": 4.0}
    model = attach(save_model(tmp_path, "LlamaForCausalLM", rope_parameters=rope))
    prompt = prompt_of(70)
    whole = run(model, prompt, greedy(40))
    runner = engine(model, kv_tokens=16384)
    runner.begin(prompt_of(100, seed=1), greedy(60))
    cut = [runner.begin(prompt, greedy(40), generated=whole[:at]) for at in (1, 9, 10, 11, 30)]
    finish(runner)
    assert [generation.tokens for generation in cut] == [whole] * 5
    assert {generation.cached_tokens for generation in cut} == {None}
