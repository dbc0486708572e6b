"""What simulated engines take: prompts as `Runner` computes them, cores that all share, a while to leave."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import copy_context

import msgspec
import pytest

from sllm_actor.domain import EngineLimits, ModelName, RequestId, Sampling
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.messages.engine import AttachWeights, MapWeights, Prefilled, PrepareModel, ShutDown
from sllm_actor.messages.generation import Finished, Generate, Tokens
from sllm_actor.testing.simulated_cores import Cores
from sllm_actor.testing.simulated_engine import EngineProcess, Heard, Speed
from sllm_actor.testing.virtual_loop import VirtualLoop, run_virtual

SPEED = Speed(fork_s=0.0, attach_s=1.0, prefill_s=1.0, prefill_s_per_token=0.1, step_s=0.5, row_s=0.0)


@pytest.mark.parametrize(("cores", "took_s"), [(1, [2.0, 3.0]), (2, [1.0, 2.0]), (8, [1.0, 2.0])])
def test_those_at_work_share_the_cores(cores: int, took_s: list[float]) -> None:
    async def main() -> list[float]:
        shared = Cores(cores)
        return list(await asyncio.gather(shared.work(1.0), shared.work(2.0)))

    assert run_virtual(main) == pytest.approx(took_s)


def test_whoever_comes_later_slows_those_who_are_at_work() -> None:
    async def main() -> list[float]:
        shared, loop = Cores(1), VirtualLoop.running()

        async def later(at_s: float, seconds: float) -> float:
            await asyncio.sleep(at_s)
            return await shared.work(seconds)

        async def given_up() -> float:
            """Take half a core for two seconds, and then nothing any more."""
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.0):
                    await shared.work(9.0)
            return loop.now_s

        took = await asyncio.gather(shared.work(1.0), given_up(), later(2.0, 1.0))
        shared.work_aside(1.0)
        return [took[0], took[2], await shared.work(1.0)]

    assert run_virtual(main) == pytest.approx([2.0, 1.0, 2.0])


class Asked:
    """An engine that is attached, and all that it says, with its moment."""

    def __init__(self, speed: Speed) -> None:
        self.loop = VirtualLoop.running()
        self.said: list[tuple[float, object]] = []
        self.process = EngineProcess(copy_context(), 1, lambda _: speed, self, Cores())
        self.process.answer = lambda message: self.said.append((self.loop.now_s - self.begin_s, message))
        limits = EngineLimits(slots=8, kv_cache_bytes=1, prefill_chunk_tokens=100)
        for message in (
            PrepareModel(path="/m", dtype="float16", aliases={}, eos_token_ids=(2,), context_tokens=100),
            MapWeights(files=(), chunk_bytes=1),
            AttachWeights(limits=limits),
        ):
            self.process.send_now(message)
        self.begin_s = self.loop.now_s

    def problem(self, text: str) -> None:
        raise AssertionError(text)

    def hears(self, process: EngineProcess, heard: Heard, prompt: bytes, epoch: int) -> None:
        pass

    async def ask(self, prompts: Sequence[int], max_tokens: int = 2) -> None:
        """Ask at once for some tokens each, when it is attached, and wait for the last answer."""
        await asyncio.sleep(self.begin_s + 2.0 - self.loop.now_s)
        self.said.clear()
        self.begin_s = self.loop.now_s
        for number, tokens in enumerate(prompts):
            sampling = Sampling(max_tokens=max_tokens, temperature=1.0, top_p=1.0, seed=number, ignore_eos=True)
            prompt = pack_uint32([number] * tokens)
            self.process.send_now(
                Generate(request_id=RequestId(f"r{number}"), model=ModelName("m"), prompt=prompt, sampling=sampling)
            )
        while sum(isinstance(message, Finished) for _, message in self.said) < len(prompts):
            await asyncio.sleep(0.01)

    def first_tokens_s(self) -> list[float]:
        return [at_s for at_s, message in self.said if isinstance(message, Tokens) and message.index == 0]


@pytest.mark.parametrize(
    ("prompts", "first_s"),
    [
        ([10], [2.0]),
        ([10, 10, 20], [5.0, 5.0, 5.0]),
        # More than a chunk: the last one comes behind.
        ([50, 40, 20], [10.0, 10.0, 13.0]),
        ([500, 10], [51.0, 53.0]),
    ],
)
def test_prompts_that_come_together_are_computed_together_and_give_the_first_token(
    prompts: list[int], first_s: list[float]
) -> None:
    async def main() -> Asked:
        asked = Asked(SPEED)
        await asked.ask(prompts)
        asked.process.kill()
        return asked

    asked = run_virtual(main)
    assert asked.first_tokens_s() == pytest.approx(first_s)
    prefilled_s = [at_s for at_s, message in asked.said if isinstance(message, Prefilled)]
    assert prefilled_s == pytest.approx(first_s)


@pytest.mark.parametrize(("max_tokens", "busy_s"), [(1, 2.0), (2, 2.5), (4, 3.5)])
def test_an_answer_takes_a_step_for_each_token_behind_its_first(max_tokens: int, busy_s: float) -> None:
    async def main() -> float:
        asked = Asked(SPEED)
        await asked.ask([10], max_tokens)
        await asyncio.sleep(9.0)
        asked.process.kill()
        return asked.process.busy_s

    assert run_virtual(main) == pytest.approx(busy_s)


@pytest.mark.parametrize("leave_s", [0.0, 3.0])
def test_an_engine_that_leaves_says_nothing_more_and_takes_its_time(leave_s: float) -> None:
    async def main() -> tuple[float, int]:
        asked = Asked(msgspec.structs.replace(SPEED, leave_s=leave_s))
        await asked.ask([10])
        asked.said.clear()
        begin_s = asked.loop.now_s
        sampling = Sampling(max_tokens=9, temperature=1.0, top_p=1.0, seed=9)
        asked.process.send_now(
            Generate(request_id=RequestId("late"), model=ModelName("m"), prompt=pack_uint32([1]), sampling=sampling)
        )
        asked.process.send_now(ShutDown())
        assert await asked.process.exited == 0
        return asked.loop.now_s - begin_s, len(asked.said)

    took_s, said = run_virtual(main)
    assert took_s == pytest.approx(leave_s) and not said
