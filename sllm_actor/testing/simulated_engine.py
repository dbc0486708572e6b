"""An engine process as its node sees it, on virtual time: the production client speaks to a simulated process.

It takes time as an engine does: a prompt by its tokens, an answer step by step, all that run together in one step. Its
tokens follow from model, prompt, seed and position alone, so that each one that is wrong, lost or repeated is seen.
"""

from __future__ import annotations

import asyncio
import enum
import math
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from typing import Any, Protocol

import msgspec
from xxhash import xxh3_64_intdigest

from sllm_actor.domain import EngineLimits, FinishReason, RequestId, Span
from sllm_actor.domain.tokens import unpack_uint32
from sllm_actor.errors import ActorDied
from sllm_actor.messages.engine import (
    AttachWeights,
    CancelGeneration,
    EngineHello,
    EngineReady,
    ExtendParked,
    MapWeights,
    Park,
    Parked,
    Prefilled,
    PrepareModel,
    ShutDown,
)
from sllm_actor.messages.generation import Finished, Generate, Tokens
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.simulated_cores import Cores
from sllm_actor.testing.virtual_loop import VirtualLoop

VOCABULARY_TOKENS = 50_000
# Of an answer of at most so many tokens, one in so many ends by itself at each position.
ENDS_ONE_IN = 40


class Heard(enum.Enum):
    """What an engine was told of a request, or has said of it, by which its moves can be followed."""

    GENERATE = enum.auto()
    PARK = enum.auto()
    PARKED = enum.auto()
    EXTEND = enum.auto()
    HANDED_OVER = enum.auto()
    TAKE_OVER = enum.auto()


class Node(Protocol):
    """Whose engines they are: it is told of what no engine may be asked for, and of what they hear of requests."""

    def problem(self, text: str) -> None: ...
    def hears(self, process: EngineProcess, heard: Heard, prompt: bytes, epoch: int) -> None: ...


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """How long a process takes: to be forked, to attach, for prompts, for a step and each row of it, to leave.

    Prompts that come together take `prefill_s`, and `prefill_s_per_token` for each of their tokens. The weights come to
    a device within `copy_s` of when they are mapped. For each token that it tells, nodes compute `told_s` beside it.
    Where many steps are one turn (`tokens_a_turn`), as many tokens of an answer come together, but the first one, which
    comes with the prompt. Such a turn ends with the first answer that does, or at the next step where a request comes
    that there is a slot for.
    """

    fork_s: float = 0.02
    attach_s: float = 0.1
    prefill_s: float = 0.0
    prefill_s_per_token: float = 0.000_5
    step_s: float = 0.02
    row_s: float = 0.002
    copy_s: float = 0.0
    leave_s: float = 0.0
    told_s: float = 0.0
    tokens_a_turn: int = 1

    def prompts_s(self, tokens: int) -> float:
        """Tell how long prompts of so many tokens take together."""
        return self.prefill_s + self.prefill_s_per_token * tokens


def answer_of(
    path: str, prompt: bytes, seed: int, max_tokens: int, ignore_eos: bool = False
) -> tuple[tuple[int, ...], FinishReason]:
    """Give the one right answer of the model in the folder `path`; one without an end of its own counts upwards."""
    if ignore_eos:
        first = xxh3_64_intdigest(f"{path} {seed} ".encode() + prompt) % VOCABULARY_TOKENS
        numbers = range(first, first + max_tokens)
        if numbers.stop > VOCABULARY_TOKENS:
            return tuple(number % VOCABULARY_TOKENS for number in numbers), FinishReason.LENGTH
        return tuple(numbers), FinishReason.LENGTH
    tokens: list[int] = []
    for position in range(max_tokens):
        drawn = xxh3_64_intdigest(f"{path} {seed} {position} ".encode() + prompt)
        tokens.append(drawn % VOCABULARY_TOKENS)
        if (drawn >> 32) % ENDS_ONE_IN == 0 and position + 1 < max_tokens:
            return tuple(tokens), FinishReason.STOP
    return tuple(tokens), FinishReason.LENGTH


class _Row:
    """One request: its whole answer, and how far it is."""

    def __init__(self, request: Generate, path: str) -> None:
        sampling = request.sampling
        self.request = request
        self.request_id = request.request_id
        self.answer, self.reason = answer_of(
            path, request.prompt, sampling.seed, sampling.max_tokens, sampling.ignore_eos
        )
        self.generated = tuple(unpack_uint32(request.generated))
        self.position = self.told = len(self.generated)
        self.prompt_tokens = len(request.prompt) // 4

    @property
    def known_tokens(self) -> int:
        """Count the tokens of prompt and answer so far."""
        return self.prompt_tokens + self.position


class EngineProcess:
    """The child process and the channel to it, both as `Engine` uses them. Runs in the context that it is made in.

    What it says to its node comes in the context `there`.
    """

    def __init__(self, there: Context, pid: int, speed_of: Callable[[str], Speed], node: Node, cores: Cores) -> None:
        self.pid = pid
        self._loop = VirtualLoop.running()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self.answer: Callable[[Any], None] = lambda _: None
        self.path = ""
        self.slots = 0
        self._chunk_tokens = 0
        self._leaving = False
        self.rows: dict[RequestId, _Row] = {}
        # What is held for requests that are to come here: prompt and tokens, packed.
        self.parked: dict[RequestId, tuple[bytes, bytes]] = {}
        self._there = there
        # In this turn.
        self._said: list[Any] = []
        self._node = node
        self._own = copy_context()
        self._speed_of = speed_of
        self._cores = cores
        self._speed = speed_of("")
        self._problem = node.problem
        self._waiting: deque[_Row] = deque()
        self._woken = asyncio.Event()
        self._scope = TaskScope("engine")
        self.mapped_s = 0.0
        # When it had its weights, when it ended, and for how long it has computed.
        self.attached_s = 0.0
        self.ended_s = 0.0
        self.busy_s = 0.0
        self._scope.spawn(self._live(), f"process-{self.pid}")

    # As `Child` and as `Channel`.

    @property
    def ended(self) -> bool:
        return self.exited.done()

    def kill(self) -> None:
        """End it at once."""
        self._exit(-signal.SIGKILL)

    def send_now(self, message: object) -> None:
        """Hear a message, in order."""
        if self.ended:
            raise ActorDied("the process at the other end has left")
        self._loop.call_soon(self._hear, message, context=self._own)

    def _exit(self, status: int) -> None:
        if not self.exited.done():
            for task in self._scope.tasks():
                task.cancel()
            self.rows.clear()
            self._waiting.clear()
            self.ended_s = self._loop.now_s
            self.exited.set_result(status)

    def _say(self, message: Any) -> None:
        self._said.append(message)
        if len(self._said) == 1:
            self._loop.call_soon(self._deliver, context=self._there)

    def _deliver(self) -> None:
        said, self._said = self._said, []
        for message in said:
            self.answer(message)

    def _hear(self, message: Any) -> None:
        if self.ended or self._leaving:
            return
        if isinstance(message, Generate):
            self._begin(message)
        elif isinstance(message, PrepareModel):
            self._expect(not self.path, "is prepared twice")
            self.path = message.path
            self._speed = self._speed_of(message.path)
        elif isinstance(message, MapWeights):
            self._expect(self.path != "" and not self.mapped_s, "maps weights out of turn")
            self.mapped_s = self._loop.now_s
        elif isinstance(message, AttachWeights):
            self._expect(self.mapped_s > 0 and not self.slots, "attaches out of turn")
            self._scope.spawn(self._attach(message.limits), "attach")
        elif isinstance(message, CancelGeneration):
            self.parked.pop(message.request_id, None)
            row = self.rows.pop(message.request_id, None)
            if row is not None and row in self._waiting:
                self._waiting.remove(row)
        elif isinstance(message, Park):
            self.parked[message.request_id] = (message.prompt, message.generated)
            self._node.hears(self, Heard.PARK, message.prompt, 0)
            self._scope.spawn(self._hold(message.request_id, len(message.prompt + message.generated) // 4), "park")
        elif isinstance(message, ExtendParked):
            self._extend(message)
        elif isinstance(message, ShutDown):
            self._shut_down()
        else:
            self._problem(f"an engine is told {type(message).__name__}")

    def _shut_down(self) -> None:
        if not self._speed.leave_s:
            self._exit(0)
            return
        for task in self._scope.tasks():
            task.cancel()
        self._leaving = True
        self._scope.spawn(self._leave(), "leave")

    async def _leave(self) -> None:
        await self._cores.work(self._speed.leave_s)
        self._exit(0)

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            self._problem(f"an engine {what}")

    def _extend(self, message: ExtendParked) -> None:
        held = self.parked.get(message.request_id)
        if held is not None:
            self.parked[message.request_id] = (held[0], held[1] + message.token_ids)
            self._node.hears(self, Heard.EXTEND, held[0], 0)
            self._scope.spawn(self._hold(message.request_id, len(message.token_ids) // 4), "extend")

    def is_handed_over(self, request_id: RequestId) -> None:
        """Tell the node that what is held waits for the request that takes it over."""
        held = self.parked.get(request_id)
        if held is not None:
            self._node.hears(self, Heard.HANDED_OVER, held[0], 0)

    async def _hold(self, request_id: RequestId, tokens: int) -> None:
        await self._cores.work(self._speed.prompts_s(tokens))
        if request_id in self.parked:
            prompt, generated = self.parked[request_id]
            known_tokens = len(prompt + generated) // 4
            self._node.hears(self, Heard.PARKED, prompt, 0)
            self._say(Parked(request_id=request_id, known_tokens=known_tokens))

    async def _attach(self, limits: EngineLimits) -> None:
        copied_s = self.mapped_s + self._speed.copy_s - self._loop.now_s
        await self._cores.work(self._speed.attach_s + max(0.0, copied_s))
        self.slots, self._chunk_tokens = limits.slots, limits.prefill_chunk_tokens
        self.attached_s = self._loop.now_s
        self._say(EngineReady(spans=(), late_imports=()))

    def _begin(self, request: Generate) -> None:
        self._expect(self.slots > 0, "generates before it is attached")
        self._expect(request.request_id not in self.rows, f"has {request.request_id} already")
        row = _Row(request, self.path)
        self._expect(len(self.rows) < self.slots, f"of {self.slots} slots has {len(self.rows) + 1} requests")
        right = row.answer[: row.position]
        self._expect(
            row.generated == right, f"is to go on behind {row.position} wrong tokens: {_first(row.generated, right)}"
        )
        heard = Heard.TAKE_OVER if request.parked else Heard.GENERATE
        self._node.hears(self, heard, request.prompt, request.epoch)
        if request.parked:
            prompt, generated = self.parked.pop(RequestId(request.parked), (request.prompt, request.generated))
            same = prompt == request.prompt and request.generated.startswith(generated)
            self._expect(same, f"has parked another answer: {_ends((prompt, generated))}")
        self.rows[request.request_id] = row
        self._waiting.append(row)
        self._woken.set()

    async def _live(self) -> None:
        await self._cores.work(self._speed.fork_s)
        self._say(EngineHello())
        running: list[_Row] = []
        while True:
            running = [row for row in running if self._runs(row)]
            if not running and not self._waiting:
                self._woken.clear()
                await self._woken.wait()
            while self._waiting and len(running) < self.slots:
                prompts = self._prompts_of_turn(self.slots - len(running))
                await self._prefill(prompts)
                running = [row for row in [*running, *prompts] if self._runs(row)]
            if not running:
                continue
            steps = await self._turn(running)
            for row in running:
                if self._runs(row):
                    self._step(row, steps)

    def _steps_of_turn(self, running: Sequence[_Row]) -> int:
        """Count the steps of the next turn: as many as a turn has, or as the first of the answers still needs."""
        left = min((len(row.answer) - row.position for row in running), default=1)
        return max(1, min(self._speed.tokens_a_turn, left))

    async def _turn(self, running: Sequence[_Row]) -> int:
        """Compute the steps of one turn; give how many. It ends early for a request that there is a slot for."""
        steps, step_s = self._steps_of_turn(running), self._speed.step_s + self._speed.row_s * len(running)
        if steps > 1 and self._cores.enough and len(running) < self.slots and not self._waiting:
            loop = self._loop
            begin_s, end_s = loop.now_s, loop.now_s + steps * step_s
            self._woken.clear()
            timer = loop.call_at(end_s, self._woken.set)
            try:
                await self._woken.wait()
            finally:
                timer.cancel()
            if loop.now_s >= end_s:
                self.busy_s += steps * step_s
                return steps
            steps_begun = math.ceil((loop.now_s - begin_s) / step_s)
            steps = min(max(1, steps_begun), steps)
            left_s = begin_s + steps * step_s - loop.now_s
            self.busy_s += steps * step_s - left_s
            self.busy_s += await self._cores.work(left_s)
            return steps
        self.busy_s += await self._cores.work(steps * step_s)
        return steps

    def _runs(self, row: _Row) -> bool:
        return self.rows.get(row.request_id) is row

    def _prompts_of_turn(self, slots: int) -> list[_Row]:
        """Take the prompts that are computed together, as many as a chunk holds, but one at least."""
        rows, tokens = [self._waiting.popleft()], 0
        while self._waiting and len(rows) < slots:
            tokens += rows[-1].known_tokens
            if tokens + self._waiting[0].known_tokens > self._chunk_tokens:
                break
            rows.append(self._waiting.popleft())
        return rows

    async def _prefill(self, rows: Sequence[_Row]) -> None:
        """Compute prompts, and the first token of each answer with them."""
        begin_s = self._loop.now_s
        tokens = sum(row.known_tokens for row in rows)
        self.busy_s += await self._cores.work(self._speed.prompts_s(tokens))
        for row in rows:
            if self._runs(row):
                span = Span(name="prefill", begin_s=begin_s, end_s=self._loop.now_s)
                self._say(Prefilled(request_id=row.request_id, span=span))
                self._step(row, 1, enough=1)

    def _step(self, row: _Row, tokens: int, enough: int = 0) -> None:
        """Count tokens of an answer, and tell those that were not told where they are enough, or it has ended."""
        request_id = row.request_id
        row.position = min(row.position + tokens, len(row.answer))
        has_ended = row.position >= len(row.answer)
        untold = row.answer[row.told : row.position]
        if untold and (has_ended or len(untold) >= (enough or self._speed.tokens_a_turn)):
            self._say(Tokens(request_id=request_id, index=row.told, token_ids=untold))
            self._cores.work_aside(self._speed.told_s * len(untold))
            row.told = row.position
        if has_ended:
            del self.rows[request_id]
            self._say(
                Finished(
                    request_id=request_id,
                    reason=row.reason,
                    prompt_tokens=row.prompt_tokens,
                    generated_tokens=len(row.answer),
                )
            )


def _ends(parked: tuple[bytes, bytes]) -> str:
    return f"{len(parked[0]) // 4} and {len(parked[1]) // 4} tokens"


def _first(given: Sequence[int], right: Sequence[int]) -> str:
    for position, token in enumerate(given):
        if position >= len(right) or right[position] != token:
            return f"token {position} is {token}"
    return "none of them"
