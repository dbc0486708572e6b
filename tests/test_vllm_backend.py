"""Engine processes whose engine is vLLM's: our protocol over a strict stand-in for vLLM, in a process of its own.

What the real vLLM computes is not tested here; what it is asked for and what is made of its answers is.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from msgspec import structs
from safetensors.torch import load_file
from test_engine_process import Pool
from tiny_models import CONTEXT_TOKENS, LIMITS, VOCABULARY_TOKENS, change_config, change_tensors, save_model

from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.config import Config
from sllm_actor.domain import FinishReason, ModelName, RequestId, Sampling
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.engine.client import Engine
from sllm_actor.errors import (
    BackendInvalid,
    CheckpointInvalid,
    EngineDied,
    EngineStartFailed,
    GenerationFailed,
    UnsupportedArchitecture,
)
from sllm_actor.messages.embedding import Embed
from sllm_actor.messages.engine import Prefilled, PrepareModel
from sllm_actor.messages.generation import Finished, Generate, PromptLogprobs, Tokens
from sllm_actor.node import vllm_engines
from sllm_actor.node.vllm_engines import VllmEngines

pytestmark = pytest.mark.asyncio(loop_scope="module")

STANDIN = Path(__file__).parent / "vllm_standin"
EOS = 2
SLOTS = 2
LIMIT_S = 60.0
PROMPT = [5, 9, 33]


@pytest.fixture(scope="module", autouse=True)
def with_vllm() -> Iterator[None]:
    """Processes that are started from here on find the stand-in."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STANDIN), before]))
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool()


def prepare(folder: Path) -> PrepareModel:
    known: Checkpoint = read_folder(folder)
    return PrepareModel(
        path=str(folder), dtype=known.dtype, eos_token_ids=(EOS,), context_tokens=CONTEXT_TOKENS, aliases=known.aliases
    )


Start = Callable[..., Awaitable[Engine]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start(pool: Pool) -> AsyncIterator[Start]:
    """Start engines that leave with the module, whatever happened to them."""
    engines: list[Engine] = []

    async def started(**knobs: Any) -> Engine:
        config = Config(**{"vllm_python": sys.executable, **knobs})
        engines.append(await VllmEngines(config, pool.fd).take())
        return engines[-1]

    yield started
    for engine in engines:
        await engine.leave(5)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(start: Start, llama: Path, pool: Pool) -> Engine:
    """One that all tests here ask, with two slots."""
    running = await start()
    running.prepare(prepare(llama))
    async with asyncio.timeout(LIMIT_S):
        await running.check()
        running.place(4096, pool.add_folder(llama))
        ready = await running.attach(structs.replace(LIMITS, slots=SLOTS))
    assert [span.name for span in ready.spans] == ["vllm"]
    return running


def sampling(max_tokens: int = 20, **changes: Any) -> Sampling:
    made = Sampling(max_tokens=max_tokens, temperature=0.0, top_p=1.0, seed=3, ignore_eos=True)
    return structs.replace(made, **changes)


def asked(tokens: list[int], how: Sampling, generated: list[int] | None = None, **changes: Any) -> Generate:
    return Generate(
        request_id=RequestId("mine"), model=ModelName("m"), prompt=pack_uint32(tokens), sampling=how,
        generated=pack_uint32(generated or []), epoch=7, **changes,
    )  # fmt: skip


async def items_of(engine: Engine, request: Generate | Embed, parking: Any = None) -> list[Any]:
    async with asyncio.timeout(LIMIT_S), aclosing(engine.generate(request, parking=parking)) as stream:
        return [item async for item in stream]


async def tokens_of(engine: Engine, request: Generate) -> list[int]:
    return [token for item in await items_of(engine, request) if isinstance(item, Tokens) for token in item.token_ids]


def logits_behind(folder: Path, token: int) -> torch.Tensor:
    """Give what the stand-in's model makes of one token, from the stored weights."""
    weights = load_file(folder / "model.safetensors")
    hidden = weights["model.embed_tokens.weight"][token] * weights["model.norm.weight"]
    return weights["lm_head.weight"] @ hidden


def expected(folder: Path, last: int, count: int) -> list[int]:
    found = [last]
    for _ in range(count):
        found.append(int(logits_behind(folder, found[-1]).argmax()))
    return found[1:]


async def test_an_answer_is_what_the_weights_in_the_host_pool_give(engine: Engine, llama: Path) -> None:
    items = await items_of(engine, asked(PROMPT, sampling()))
    assert isinstance(items[0], Prefilled) and isinstance(items[-1], Finished)
    told = [item for item in items if isinstance(item, Tokens)]
    assert [token for item in told for token in item.token_ids] == expected(llama, PROMPT[-1], 20)
    assert [item.index for item in told] == list(range(20))
    assert {(item.request_id, item.epoch) for item in told} == {("mine", 7)}
    end = items[-1]
    assert (end.reason, end.prompt_tokens, end.generated_tokens) == (FinishReason.LENGTH, 3, 20)


async def test_an_answer_that_goes_on_is_the_rest_of_the_whole_one(engine: Engine) -> None:
    whole = await tokens_of(engine, asked(PROMPT, sampling()))
    items = await items_of(engine, asked(PROMPT, sampling(), whole[:8]))
    told = [item for item in items if isinstance(item, Tokens)]
    assert [token for item in told for token in item.token_ids] == whole[8:]
    assert told[0].index == 8
    assert (items[-1].prompt_tokens, items[-1].generated_tokens) == (3, 20)


async def test_the_token_that_ends_an_answer_is_counted_and_not_told(engine: Engine, llama: Path) -> None:
    whole = expected(llama, PROMPT[-1], 20)
    end = next(token for token in whole[3:] if whole.index(token) >= 3)
    place = whole.index(end)
    items = await items_of(engine, asked(PROMPT, sampling(stop_token_ids=(end,))))
    assert [token for item in items if isinstance(item, Tokens) for token in item.token_ids] == whole[:place]
    assert (items[-1].reason, items[-1].generated_tokens) == (FinishReason.STOP, place + 1)
    later = await tokens_of(engine, asked(PROMPT, sampling(stop_token_ids=(end,), min_tokens=place + 1)))
    assert len(later) > place


async def test_the_models_own_end_holds_unless_it_is_ignored(engine: Engine) -> None:
    to_end = ((EOS, 100.0),)
    ended = await items_of(engine, asked(PROMPT, sampling(ignore_eos=False, logit_bias=to_end)))
    assert not [item for item in ended if isinstance(item, Tokens)] and ended[-1].reason is FinishReason.STOP
    assert await tokens_of(engine, asked(PROMPT, sampling(3, logit_bias=to_end))) == [EOS] * 3


@pytest.mark.parametrize(
    ("generated", "changes", "reason"),
    [([4, 5], {"max_tokens": 2}, FinishReason.LENGTH), ([4, 6], {"stop_token_ids": (6,)}, FinishReason.STOP)],
)
async def test_an_answer_that_is_whole_already_ends_at_once(
    engine: Engine, generated: list[int], changes: dict[str, Any], reason: FinishReason
) -> None:
    (end,) = await items_of(engine, asked(PROMPT, sampling(**changes), generated))
    assert (end.reason, end.generated_tokens) == (reason, 2)


async def test_log_probabilities_are_those_before_all_else_likeliest_first(engine: Engine, llama: Path) -> None:
    items = await items_of(engine, asked(PROMPT, sampling(2, top_logprobs=3, prompt_logprobs=True)))
    behind = [torch.log_softmax(logits_behind(llama, token), -1) for token in PROMPT]
    (scored,) = (item for item in items if isinstance(item, PromptLogprobs))
    assert scored.index == 1
    assert [one.logprob for one in scored.logprobs] == pytest.approx([float(behind[0][9]), float(behind[1][33])])
    first = next(item for item in items if isinstance(item, Tokens)).logprobs[0]
    values, likeliest = behind[2].topk(3)
    assert [token for token, _ in first.top] == likeliest.tolist()
    assert [value for _, value in first.top] == pytest.approx(values.tolist())
    assert first.logprob == first.top[0][1]
    assert not [item for item in await items_of(engine, asked(PROMPT, sampling(2))) if getattr(item, "logprobs", ())]


async def test_a_prompt_is_scored_without_an_answer(engine: Engine) -> None:
    items = await items_of(engine, asked(PROMPT, sampling(0, prompt_logprobs=True)))
    assert [type(item) for item in items] == [Prefilled, PromptLogprobs, Finished]
    assert (items[-1].reason, items[-1].generated_tokens) == (FinishReason.LENGTH, 0)


async def test_a_seed_repeats_an_answer_and_its_choices_differ_and_it_does_not_over_a_move(engine: Engine) -> None:
    warm = sampling(30, temperature=1.5, seed=11)
    once = await tokens_of(engine, asked(PROMPT, warm))
    assert await tokens_of(engine, asked(PROMPT, warm)) == once
    assert await tokens_of(engine, asked(PROMPT, structs.replace(warm, choice=1))) != once
    moved = asked(PROMPT, warm, once[:10])
    rest = await tokens_of(engine, moved)
    assert rest == await tokens_of(engine, moved), "what goes on the same way is the same"
    assert rest != once[10:] and rest[:10] != once[:10], "neither the rest of the unmoved one nor its numbers anew"


async def test_who_leaves_gives_up_the_place_that_others_wait_for(engine: Engine) -> None:
    endless = asked(PROMPT, sampling(CONTEXT_TOKENS - 10, temperature=1.0))
    async with asyncio.timeout(LIMIT_S):
        for _ in range(SLOTS + 1):
            async with aclosing(engine.generate(endless)) as stream:
                assert isinstance(await anext(stream), Prefilled)
        assert len(await tokens_of(engine, asked(PROMPT, sampling(4)))) == 4


async def test_what_is_parked_is_found_computed_by_who_goes_on_with_it(engine: Engine) -> None:
    prompt = list(range(40, 80))
    whole = await tokens_of(engine, asked(prompt, sampling(30)))
    request = asked(list(reversed(prompt)), sampling(30))
    fresh = await items_of(engine, request)
    assert fresh[-1].cached_tokens == 0
    twice = [*prompt[::2], *prompt[::2]]
    async with asyncio.timeout(LIMIT_S):
        with engine.park(asked(twice, sampling(30))) as parking:
            assert await parking.reached() == 40
            parking.extend(whole[:8])
            assert await parking.reached() == 48
            items = await items_of(engine, asked(twice, sampling(30), whole[:8]), parking)
    assert items[-1].cached_tokens == 32
    assert items[-1].generated_tokens == 30


async def test_what_vllm_is_not_given_is_refused_by_its_name_and_the_engine_goes_on(engine: Engine) -> None:
    with pytest.raises(BackendInvalid, match="response_format"):
        await items_of(engine, asked(PROMPT, sampling(), grammar="{}"))
    text = Embed(request_id=RequestId("e"), model=ModelName("m"), prompt=pack_uint32([1]), sizes=pack_uint32([1]))
    with pytest.raises(GenerationFailed, match="embeds no texts"):
        await items_of(engine, text)
    with pytest.raises(BackendInvalid, match="no adapters"):
        await engine.load_adapter("sql", "/nowhere", 4096, [])
    assert len(await tokens_of(engine, asked(PROMPT, sampling(4)))) == 4


@pytest.mark.parametrize(
    ("tokens", "says"), [([VOCABULARY_TOKENS], "vocabulary"), ([1] * (CONTEXT_TOKENS + 1), "")], ids=["token", "length"]
)
async def test_what_vllm_refuses_fails_alone(engine: Engine, tokens: list[int], says: str) -> None:
    if says:
        with pytest.raises(GenerationFailed, match=f"vLLM: .*{says}"):
            await items_of(engine, asked(tokens, sampling()))
    else:
        (end,) = await items_of(engine, asked(tokens, sampling()))
        assert end.reason is FinishReason.LENGTH
    assert len(await tokens_of(engine, asked(PROMPT, sampling(4)))) == 4


async def test_a_class_that_vllm_does_not_serve_is_refused_when_it_is_checked(
    start: Start, llama: Path, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM")
    change_config(folder, architectures=["NobodysForCausalLM"])
    engine = await start()
    engine.prepare(prepare(folder))
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(UnsupportedArchitecture, match="NobodysForCausalLM"):
            await engine.check()
        assert await engine.died == "exit status 1"


async def test_weights_that_vllm_does_not_take_end_the_start_with_their_error(
    start: Start, pool: Pool, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM")
    change_tensors(folder, lambda tensors: {name: one for name, one in tensors.items() if name != "lm_head.weight"})
    engine = await start()
    engine.prepare(prepare(folder))
    engine.place(4096, pool.add_folder(folder))
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(CheckpointInvalid, match="head"):
            await engine.attach(LIMITS)
        assert await engine.died == "exit status 1"


async def test_a_process_of_another_version_leaves_before_it_says_a_word(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engines, "version", lambda _: "0.0.9")
    engine = await start()
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(EngineDied):
            await engine.ready()


async def test_without_a_python_there_is_no_such_backend_and_one_that_is_not_there_is_named(start: Start) -> None:
    with pytest.raises(BackendInvalid, match="vllm_python") as refused:
        await start(vllm_python="")
    assert refused.value.param == "backend"
    with pytest.raises(EngineStartFailed, match="/nowhere/python"):
        await start(vllm_python="/nowhere/python")
