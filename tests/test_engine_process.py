"""Engine processes as a node has them: forked from the real fork server, over frames, with a pool of their own."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import random_answers
import torch
from msgspec import structs
from random_answers import DEMO, END, compiled, decode
from safetensors.torch import load_file
from tiny_models import (
    CONTEXT_TOKENS,
    LIMITS,
    VOCABULARY_TOKENS,
    change_tensors,
    prompt_of,
    run_transformers,
    save_model,
)

from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.manifest import read_manifest
from sllm_actor.domain import FinishReason, ModelName, RequestId, Resume, Sampling, TokenLogprobs
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.engine.architectures import MODULES
from sllm_actor.engine.client import Engine
from sllm_actor.engine.pool import EnginePool
from sllm_actor.errors import (
    CheckpointConfigInvalid,
    CheckpointInvalid,
    CheckpointMissing,
    EngineDied,
    FrameTooLong,
    GenerationFailed,
    InvalidRequest,
    SllmError,
    TokenizerInvalid,
    UnsupportedArchitecture,
)
from sllm_actor.messages.engine import (
    FROM_ENGINE,
    TO_ENGINE,
    EngineFailed,
    EngineHello,
    EngineReady,
    PooledFile,
    Prefilled,
    PrepareModel,
)
from sllm_actor.messages.generation import Finished, Generate, Tokens
from sllm_actor.node.limits import ENGINE_THREADS
from sllm_actor.node.limits import MAX_FRAME_BYTES as MAX_FRAME_BYTES_NAME
from sllm_actor.runtime.blocking import BlockingChannel
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.forking import ForkServer
from sllm_actor.runtime.frames import Codec
from sllm_actor.runtime.tasks import TaskScope

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("warm_starts"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

REPOSITORY = Path(__file__).parent.parent
CHUNK_BYTES = 4096
MAX_FRAME_BYTES = 1024 * 1024
LIMIT_S = 60.0


async def attached(engine: Engine, files: list[PooledFile]) -> EngineReady:
    engine.place(CHUNK_BYTES, files)
    return await engine.attach(LIMITS)


class Pool:
    """A host pool as the loader would fill it, with every file's chunks in any order."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("pool")
        self._chunks = 0
        self._dice = random.Random(1)

    def add(self, path: Path) -> PooledFile:
        data = path.read_bytes()
        count = -(-len(data) // CHUNK_BYTES)
        places = list(range(self._chunks, self._chunks + count))
        self._dice.shuffle(places)
        self._chunks += count
        os.ftruncate(self.fd, self._chunks * CHUNK_BYTES)
        for at, place in enumerate(places):
            os.pwrite(self.fd, data[at * CHUNK_BYTES : (at + 1) * CHUNK_BYTES], place * CHUNK_BYTES)
        return PooledFile(name=path.name, size_bytes=len(data), chunks=pack_uint32(places))

    def add_folder(self, folder: Path) -> list[PooledFile]:
        return [self.add(folder / file.name) for file in read_folder(folder).files]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def forks() -> AsyncIterator[ForkServer]:
    """The node's own fork server: its imports take seconds, so all tests here share one."""
    server = ForkServer(
        "sllm_actor.node.children",
        {
            ENGINE_THREADS: "1",
            MAX_FRAME_BYTES_NAME: str(MAX_FRAME_BYTES),
            "SLLM_NO_NATIVE": "1",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]),
        },
    )
    await server.start()
    yield server
    await server.stop()


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", num_key_value_heads=2)


Start = Callable[[], Awaitable[Engine]]


@pytest_asyncio.fixture(loop_scope="module")
async def start(forks: ForkServer, pool: Pool) -> AsyncIterator[Start]:
    """Fork engines that leave with the test, whatever happened to them."""
    engines: list[Engine] = []

    async def fork() -> Engine:
        engines.append(await Engine.fork(forks, pool.fd, MAX_FRAME_BYTES))
        return engines[-1]

    async with asyncio.timeout(LIMIT_S):
        yield fork
        for engine in engines:
            engine.kill()
            await engine.leave(LIMIT_S)


def prepare(folder: Path, eos: tuple[int, ...] = ()) -> PrepareModel:
    manifest = read_manifest(folder)
    return PrepareModel(
        path=str(folder),
        dtype="F32",
        eos_token_ids=eos,
        context_tokens=CONTEXT_TOKENS,
        aliases=manifest.aliases if manifest is not None else {},
    )


def ask(prompt: list[int], max_tokens: int, request_id: str = "r") -> Generate:
    return Generate(
        request_id=RequestId(request_id),
        model=ModelName("m"),
        prompt=pack_uint32(prompt),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0, top_p=1.0, seed=0),
    )


async def serving(start: Start, pool: Pool, folder: Path, eos: tuple[int, ...] = ()) -> Engine:
    engine = await start()
    engine.prepare(prepare(folder, eos))
    await attached(engine, pool.add_folder(folder))
    return engine


async def answer(engine: Engine, request: Generate) -> list[int]:
    """Read a whole answer, checking the order of what comes."""
    token_ids: list[int] = []
    prefills = 0
    async with aclosing(engine.generate(request)) as items:
        async for item in items:
            assert item.request_id == request.request_id
            if isinstance(item, Prefilled):
                assert token_ids == []
                prefills += 1
            elif isinstance(item, Tokens):
                assert item.index == len(token_ids)
                token_ids += item.token_ids
            else:
                assert isinstance(item, Finished)
                assert item.prompt_tokens == len(request.prompt) // 4
    assert prefills == 1
    assert isinstance(item, Finished)
    return token_ids


async def test_an_engine_is_warm_checks_attaches_and_generates_what_transformers_does(
    start: Start, pool: Pool, llama: Path
) -> None:
    engine = await start()
    await engine.ready()
    engine.prepare(prepare(llama))
    await engine.check()
    ready = await attached(engine, pool.add_folder(llama))
    assert [span.name for span in ready.spans] == ["skeleton", "map", "attach"]
    assert all(span.begin_s <= span.end_s for span in ready.spans)
    assert ready.late_imports == ()
    assert await answer(engine, ask(prompt_of(7), 90)) == run_transformers(llama, prompt_of(7), 90)


@pytest.mark.parametrize("architecture", sorted(MODULES.keys() - {"LlamaForCausalLM"}))
async def test_no_architecture_imports_anything_after_the_fork(
    architecture: str, start: Start, pool: Pool, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, architecture, tie_word_embeddings=True)
    engine = await start()
    engine.prepare(prepare(folder))
    assert (await attached(engine, pool.add_folder(folder))).late_imports == ()
    assert await answer(engine, ask(prompt_of(3), 10)) == run_transformers(folder, prompt_of(3), 10)


async def test_generations_side_by_side_are_what_they_are_alone(start: Start, pool: Pool, llama: Path) -> None:
    engine = await serving(start, pool, llama)
    prompts = [prompt_of(length, seed=length) for length in (1, 20, 90)]
    answers = await asyncio.gather(*(answer(engine, ask(prompt, 60)) for prompt in prompts))
    assert answers == [run_transformers(llama, prompt, 60) for prompt in prompts]


async def test_an_end_token_is_counted_and_not_sent(start: Start, pool: Pool, llama: Path) -> None:
    whole = run_transformers(llama, prompt_of(7), 40)
    eos = whole[25]
    at = whole.index(eos)
    engine = await serving(start, pool, llama, (eos,))
    items = [item async for item in engine.generate(ask(prompt_of(7), 40))]
    last = items[-1]
    assert isinstance(last, Finished)
    assert (last.reason, last.generated_tokens) == (FinishReason.STOP, at + 1)
    assert [token for item in items if isinstance(item, Tokens) for token in item.token_ids] == whole[:at]


async def test_closing_a_generation_cancels_it_and_the_others_go_on(start: Start, pool: Pool, llama: Path) -> None:
    engine = await serving(start, pool, llama)
    other = TaskScope("test").spawn(answer(engine, ask(prompt_of(9), 200, "other")), "other")
    async with aclosing(engine.generate(ask(prompt_of(3), 300, "closed"))) as items:
        assert [type(await anext(items)) for _ in range(4)] == [Prefilled, Tokens, Tokens, Tokens]
    assert await other == run_transformers(llama, prompt_of(9), 200)


async def test_an_id_that_comes_again_at_once_meets_no_tokens_of_its_first_use(
    start: Start, pool: Pool, llama: Path
) -> None:
    engine = await serving(start, pool, llama)
    wanted = run_transformers(llama, prompt_of(5), 20)
    for _ in range(10):
        async with aclosing(engine.generate(ask(prompt_of(3), 300))) as items:
            await anext(items)
            await anext(items)
        assert await answer(engine, ask(prompt_of(5), 20)) == wanted


async def test_a_request_that_can_not_be_computed_fails_alone(start: Start, pool: Pool, llama: Path) -> None:
    engine = await serving(start, pool, llama)
    with pytest.raises(GenerationFailed):
        await answer(engine, ask([VOCABULARY_TOKENS + 5], 5))
    assert await answer(engine, ask(prompt_of(5), 5)) == run_transformers(llama, prompt_of(5), 5)


def held(**changes: Any) -> Generate:
    request: Any = ask(prompt_of(4), 40)
    changed: Generate = msgspec.structs.replace(request, **changes)
    return changed


async def test_an_answer_keeps_to_its_grammar_and_what_is_none_fails_its_request_alone(
    start: Start, pool: Pool, llama: Path, tmp_path: Path
) -> None:
    schema = {"type": "array", "items": {"enum": ["a", 1]}, "minItems": 2, "maxItems": 3}
    grammar = compiled(json.dumps(schema))
    folder = save_model(tmp_path, "LlamaForCausalLM", vocab_size=random_answers.VOCABULARY_TOKENS)
    shutil.copy(Path(DEMO) / "tokenizer.json", folder)
    engine = await serving(start, pool, folder, eos=(END,))
    for wrong in ("nonsense", grammar.replace('"vocab_size":600', '"vocab_size":512')):
        with pytest.raises(InvalidRequest, match="no grammar for this model"):
            await answer(engine, held(grammar=wrong))
    for seed in range(3):
        sampling = Sampling(max_tokens=40, temperature=1.0, top_p=1.0, seed=seed)
        request = held(sampling=sampling, grammar=grammar)
        tokens = await answer(engine, request)
        value = json.loads(decode(tokens))
        assert len(value) in (2, 3) and set(value) <= {"a", 1}
        for cut in (1, len(tokens) // 2, len(tokens) - 1):
            resumed = held(sampling=sampling, grammar=grammar, generated=pack_uint32(tokens[:cut]))
            async with aclosing(engine.generate(resumed)) as items:
                rest = [
                    token
                    for item in [item async for item in items]
                    if isinstance(item, Tokens)
                    for token in item.token_ids
                ]
            assert tokens[:cut] + rest == tokens
    other = await serving(start, pool, llama)
    with pytest.raises(TokenizerInvalid):
        await answer(other, held(grammar=grammar))
    assert len(await answer(other, ask(prompt_of(4), 3))) == 3


async def test_a_request_over_the_frame_bound_is_refused_and_the_engine_goes_on(
    start: Start, pool: Pool, llama: Path
) -> None:
    engine = await serving(start, pool, llama)
    with pytest.raises(FrameTooLong):
        await answer(engine, ask([3] * MAX_FRAME_BYTES, 5))
    assert len(await answer(engine, ask(prompt_of(5), 5))) == 5


async def test_what_is_wrong_with_a_checkpoint_is_told_by_its_type(start: Start, pool: Pool, tmp_path: Path) -> None:
    lacking = save_model(tmp_path / "lacking", "LlamaForCausalLM")
    change_tensors(lacking, lambda found: {name: value for name, value in found.items() if "norm" not in name})
    absurd = save_model(tmp_path / "absurd", "LlamaForCausalLM")
    (absurd / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": -1}'
    )
    cases: list[tuple[Path, type[SllmError]]] = [
        (lacking, CheckpointInvalid),
        (absurd, CheckpointConfigInvalid),
    ]
    for folder, kind in cases:
        for asks in ("check", "attach"):
            engine = await start()
            engine.prepare(prepare(folder))
            with pytest.raises(kind) as caught:
                await (engine.check() if asks == "check" else attached(engine, pool.add_folder(lacking)))
            assert type(caught.value) is kind
            await engine.leave(LIMIT_S)
            assert engine.died.result() == "exit status 1"
            with pytest.raises(kind):
                await engine.check()


async def test_the_type_of_a_failure_is_known_also_after_the_process_has_left(start: Start, tmp_path: Path) -> None:
    engine = await start()
    engine.prepare(prepare(tmp_path / "nowhere"))
    assert await asyncio.shield(engine.died) == "exit status 1"
    with pytest.raises(CheckpointConfigInvalid):
        await engine.check()
    folder = save_model(tmp_path, "LlamaForCausalLM")
    engine = await start()
    engine.prepare(prepare(folder))
    await engine.ready()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointInvalid):
        await engine.check()
    assert not issubclass(CheckpointMissing, EngineDied)


async def test_bytes_in_the_pool_that_are_no_weight_file_are_refused(
    start: Start, pool: Pool, llama: Path, tmp_path: Path
) -> None:
    garbage = tmp_path / "model.safetensors"
    garbage.write_bytes(bytes(range(256)) * 40)
    engine = await start()
    engine.prepare(prepare(llama))
    with pytest.raises(CheckpointInvalid):
        await attached(engine, [pool.add(garbage)])


async def test_an_engine_that_is_killed_fails_its_generations_and_says_how_it_ended(
    start: Start, pool: Pool, llama: Path
) -> None:
    engine = await serving(start, pool, llama)
    reading = engine.generate(ask(prompt_of(3), 300))
    await anext(reading)
    os.kill(engine.pid, 9)
    with pytest.raises(EngineDied, match="killed by signal 9"):
        async for _ in reading:
            pass
    with pytest.raises(EngineDied):
        await anext(engine.generate(ask(prompt_of(3), 5)))
    with pytest.raises(EngineDied):
        await engine.check()
    assert engine.died.result() == "killed by signal 9"
    await engine.leave(0.0)


async def test_an_engine_that_is_asked_to_leave_leaves_and_one_that_is_stuck_is_killed(start: Start) -> None:
    polite, stuck = await start(), await start()
    await polite.ready()
    await polite.leave(LIMIT_S)
    await polite.leave(LIMIT_S)
    assert polite.died.result() == "exit status 0"
    os.kill(stuck.pid, 19)
    await stuck.leave(0.01)
    assert stuck.died.result() == "killed by signal 9"


async def raw_engine(forks: ForkServer, pool: Pool) -> tuple[socket.socket, BlockingChannel, asyncio.Future[int]]:
    ours, theirs = socket.socketpair()
    with theirs:
        child = await forks.fork("engine", [theirs.fileno(), pool.fd])
    return ours, BlockingChannel(ours, Codec(TO_ENGINE, FROM_ENGINE, MAX_FRAME_BYTES)), child.exited


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x02\xc1\xc1", b"\x00\x00\x00\x01\x91"])
async def test_garbage_ends_an_engine_with_a_typed_word(garbage: bytes, forks: ForkServer, pool: Pool) -> None:
    sock, channel, exited = await raw_engine(forks, pool)
    with sock:
        assert await asyncio.to_thread(channel.receive, True) == EngineHello()
        sock.sendall(garbage)
        said = await asyncio.to_thread(channel.receive, True)
        assert isinstance(said, EngineFailed)
        assert said.code in ("frame_too_long", "frame_invalid")
        # More than the socket holds: whoever sends just then must not be cut off from what was said.
        sock.settimeout(LIMIT_S)
        await asyncio.to_thread(sock.sendall, bytes(8 * 1024 * 1024))
        sock.close()
        assert await exited == 1


async def test_messages_out_of_turn_end_an_engine_with_a_typed_word(forks: ForkServer, pool: Pool, llama: Path) -> None:
    sock, channel, exited = await raw_engine(forks, pool)
    with sock:
        channel.send(ask(prompt_of(3), 5))
        assert await asyncio.to_thread(channel.receive, True) == EngineHello()
        said = await asyncio.to_thread(channel.receive, True)
        assert isinstance(said, EngineFailed)
        assert said.code == "engine_start_failed"
        sock.close()
        assert await exited == 1


async def test_an_engine_whose_node_has_gone_leaves(forks: ForkServer, pool: Pool) -> None:
    sock, channel, exited = await raw_engine(forks, pool)
    assert await asyncio.to_thread(channel.receive, True) == EngineHello()
    sock.close()
    assert await exited == 0
    sock, _, exited = await raw_engine(forks, pool)
    sock.close()
    assert await exited == 0


# The pool of idle engines.


class Gate(SystemClock):
    """A clock whose sleepers wake when the test says so."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.open = asyncio.Event()

    async def sleep(self, duration_s: float) -> None:
        self.slept.append(duration_s)
        await self.open.wait()


class Forking:
    """Forks engines for a pool and tells when each is asked for."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self.forked: asyncio.Queue[Engine] = asyncio.Queue()
        self.fail = False

    async def __call__(self) -> Engine:
        if self.fail:
            raise EngineDied("no process today")
        engine = await self._start()
        self.forked.put_nowait(engine)
        return engine


async def test_a_taken_engine_is_warm_and_replaced_after_the_delay(start: Start) -> None:
    forking, clock = Forking(start), Gate()
    engines = EnginePool(forking, 2, 0.5, clock)
    await engines.start()
    assert (engines.idle_engines, forking.forked.qsize()) == (2, 2)
    first, second = forking.forked.get_nowait(), forking.forked.get_nowait()
    assert await engines.take() is first
    assert engines.idle_engines == 1
    clock.open.set()
    replacement = await forking.forked.get()
    assert clock.slept == [0.5]
    assert await engines.take() is second
    assert await engines.take() is replacement
    await engines.close(LIMIT_S)
    assert not first.died.done()


async def test_an_empty_pool_forks_at_once(start: Start) -> None:
    forking, clock = Forking(start), Gate()
    engines = EnginePool(forking, 1, 0.5, clock)
    await engines.start()
    taken = [await engines.take(), await engines.take()]
    assert forking.forked.qsize() == 2
    for engine in taken:
        await engine.ready()
    await engines.close(LIMIT_S)


async def test_an_idle_engine_that_has_died_is_not_given(start: Start) -> None:
    forking, clock = Forking(start), Gate()
    engines = EnginePool(forking, 2, 0.5, clock)
    await engines.start()
    dead, living = forking.forked.get_nowait(), forking.forked.get_nowait()
    dead.kill()
    await asyncio.shield(dead.died)
    assert engines.idle_engines == 1
    assert await engines.take() is living
    await engines.close(LIMIT_S)


async def test_a_pool_that_is_closed_lets_its_engines_leave(start: Start) -> None:
    forking, clock = Forking(start), Gate()
    engines = EnginePool(forking, 2, 0.5, clock)
    await engines.start()
    idle = [forking.forked.get_nowait(), forking.forked.get_nowait()]
    await engines.close(LIMIT_S)
    assert [engine.died.result() for engine in idle] == ["exit status 0"] * 2


async def test_a_refill_that_fails_is_tried_again_with_the_next_engine_taken(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    forking, clock = Forking(start), Gate()
    engines = EnginePool(forking, 2, 0.5, clock)
    await engines.start()
    clock.open.set()
    forking.fail = True
    await engines.take()
    while not caplog.records:
        await asyncio.sleep(0)
    assert "no process today" in caplog.text
    forking.fail = False
    await engines.take()
    await asyncio.gather(*(forking.forked.get() for _ in range(4)))
    await engines.close(LIMIT_S)


async def test_a_converted_pickle_answers_as_its_model_does_also_where_two_layers_share_weights(
    start: Start, pool: Pool, llama: Path, tmp_path: Path
) -> None:
    weights = load_file(llama / "model.safetensors")
    up = "model.layers.{}.mlp.up_proj.weight"
    weights[up.format(1)] = weights[up.format(0)]
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(llama / "config.json", source)
    torch.save(weights, source / "pytorch_model.bin")
    expected = change_tensors(shutil.copytree(llama, tmp_path / "stock"), lambda _: weights)
    converted = convert(source, tmp_path / "converted")
    assert converted.manifest.aliases == {up.format(1): up.format(0)}
    engine = await serving(start, pool, converted.path)
    prompt = prompt_of(11)
    assert await answer(engine, ask(prompt, 6)) == run_transformers(expected, prompt, 6)


async def test_slices_for_ranks_are_refused_before_their_weights_are_read(
    start: Start, llama: Path, tmp_path: Path
) -> None:
    ranks = convert(llama, tmp_path / "ranks", tensor_parallel=2).path
    engine = await start()
    engine.prepare(prepare(ranks))
    with pytest.raises(UnsupportedArchitecture, match="split for 2 ranks"):
        await engine.check()


# Resuming in another process.


def changed(request: Any, **changes: Any) -> Generate:
    wanted: Generate = structs.replace(request, **changes)
    return wanted


async def drawn(engine: Engine, request: Generate) -> tuple[list[int], list[TokenLogprobs], Finished]:
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    begin = len(request.generated) // 4
    async with aclosing(engine.generate(request)) as items:
        async for item in items:
            if isinstance(item, Tokens):
                assert item.index == begin + len(token_ids)
                token_ids += item.token_ids
                logprobs += item.logprobs
    assert isinstance(item, Finished)
    return token_ids, logprobs, item


@pytest.mark.parametrize("resume", Resume)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_an_answer_goes_on_in_another_process_wherever_it_was_cut(
    resume: Resume, temperature: float, start: Start, pool: Pool, llama: Path
) -> None:
    """Exact: the logarithms of the probabilities are equal in all their digits, with other requests beside them."""
    first, second = await serving(start, pool, llama), await serving(start, pool, llama)
    wish = Sampling(max_tokens=16, temperature=temperature, top_p=0.95, seed=11, top_logprobs=3)
    for length in (1, 40):
        whole = changed(ask(prompt_of(length, seed=length), 16), sampling=wish, resume=resume)
        tokens, logprobs, _ = await drawn(first, whole)
        assert len(tokens) == len(logprobs) == 16
        cuts = [changed(whole, generated=pack_uint32(tokens[:at])) for at in range(17)]
        for cut, (rest, its_logprobs, finished) in zip(
            range(17), await asyncio.gather(*(drawn(second, request) for request in cuts)), strict=True
        ):
            assert tokens[:cut] + rest == tokens
            assert finished.generated_tokens == 16
            if resume is Resume.EXACT:
                assert its_logprobs == logprobs[cut:]


async def test_a_prompt_that_was_computed_before_says_so(start: Start, pool: Pool, llama: Path) -> None:
    engine = await serving(start, pool, llama)
    cached = [(await drawn(engine, ask(prompt_of(20), 3)))[2].cached_tokens for _ in range(2)]
    assert cached == [0, 19]
