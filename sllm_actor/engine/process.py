"""The engine process: one model, one thread, messages between the steps.

Blocking by design: nothing else runs in here, and between two steps it looks at its socket.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sllm_actor.checkpoint.adapter import CONFIG_NAME, read_lora_config
from sllm_actor.checkpoint.folder import read_config, read_folder
from sllm_actor.domain import EngineLimits, FinishReason, RequestId, Span
from sllm_actor.domain.tokens import unpack_uint32
from sllm_actor.engine import lora, skeleton
from sllm_actor.engine.architectures import ENCODERS
from sllm_actor.engine.embedding_jobs import EmbeddingJobs
from sllm_actor.engine.encoder import EncoderRunner
from sllm_actor.engine.generation import Generation, Step
from sllm_actor.engine.grammar import GrammarConstraint, Grammars
from sllm_actor.engine.mapped_tensors import tensors_of
from sllm_actor.engine.runner import Runner
from sllm_actor.errors import AdapterInvalid, EngineStartFailed, GenerationFailed, SllmError, UnsupportedArchitecture
from sllm_actor.messages.embedding import Embed
from sllm_actor.messages.engine import (
    AdapterDropped,
    AdapterLoaded,
    AdapterRefused,
    AttachWeights,
    CancelGeneration,
    CheckAdapter,
    CheckModel,
    DropAdapter,
    EngineFailed,
    EngineHello,
    EngineReady,
    ExtendParked,
    GenerationError,
    LoadAdapter,
    MapWeights,
    ModelChecked,
    Park,
    Parked,
    PooledFile,
    Prefilled,
    PrepareModel,
    ShutDown,
)
from sllm_actor.messages.generation import Finished, Generate, PromptLogprobs, Tokens
from sllm_actor.runtime.blocking import BlockingChannel
from sllm_actor.runtime.clock import Clock

# Maps pooled files into this process: (chunk_bytes, files) -> the bytes of each, kept mapped until it ends.
MapFiles = Callable[[int, Sequence[PooledFile]], Mapping[str, memoryview]]
WATCHED = ("bitsandbytes", "torch", "transformers")
# In one message, each with up to twenty likeliest tokens.
MAX_SCORED = 256


def _modules() -> set[str]:
    return {name for name in sys.modules if name.split(".")[0] in WATCHED}


class _Running:
    """A request, and how much of it has been told."""

    def __init__(self, request_id: RequestId, generation: Generation) -> None:
        self.request_id = request_id
        self.generation = generation
        self.begin_s: float | None = None
        self._prefilled = False

    def news(self, clock: Clock) -> list[object]:
        """Say what a step brought: a token, unless it ends the answer, and the end."""
        generation, said = self.generation, list[object]()
        if not self._prefilled:
            self._prefilled = True
            assert self.begin_s is not None
            span = Span(name="prefill", begin_s=self.begin_s, end_s=clock.monotonic_s())
            said.append(Prefilled(request_id=self.request_id, span=span))
            said += self._prompt_logprobs()
        drawn = generation.drawn
        if drawn is not None and generation.finish is not FinishReason.STOP:
            logprobs = () if drawn.logprobs is None else (drawn.logprobs,)
            index = len(generation.tokens) - 1
            said.append(Tokens(request_id=self.request_id, index=index, token_ids=(drawn.token_id,), logprobs=logprobs))
        if generation.finish is not None:
            said.append(self.finished(generation.finish))
        return said

    def _prompt_logprobs(self) -> list[object]:
        if not self.generation.scores_prompt:
            return []
        scored = self.generation.scored
        return [
            PromptLogprobs(
                request_id=self.request_id, index=begin + 1, logprobs=tuple(scored[begin : begin + MAX_SCORED])
            )
            for begin in range(0, max(len(scored), 1), MAX_SCORED)
        ]

    def finished(self, reason: FinishReason) -> Finished:
        generation = self.generation
        return Finished(
            request_id=self.request_id,
            reason=reason,
            prompt_tokens=len(generation.prompt),
            generated_tokens=len(generation.tokens),
            cached_tokens=generation.cached_tokens or 0,
        )


class EngineProcess:
    """Owns the model of this process and its running generations."""

    def __init__(self, channel: BlockingChannel, map_files: MapFiles, clock: Clock, threads: int) -> None:
        self._channel = channel
        self._map_files = map_files
        self._clock = clock
        self._at_fork = _modules()
        self._spans: list[Span] = []
        self._prepared: PrepareModel | None = None
        self._model: PreTrainedModel | None = None
        self._files: tuple[PooledFile, ...] = ()
        self._mapped: Mapping[str, memoryview] = {}
        self._runner: Runner | EncoderRunner | None = None
        self._jobs: EmbeddingJobs | None = None
        self._grammars: Grammars | None = None
        self._running: dict[RequestId, _Running] = {}
        self._parked: dict[RequestId, Generation] = {}
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)

    def run(self) -> int:
        """Serve until told to leave or left alone; the result is the exit status."""
        # The compute threads start with the first large operation: let that be now, not in a request.
        torch.ones(256, 256) @ torch.ones(256, 256)
        try:
            self._channel.send(EngineHello())
            return self._serve()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return 0

    def _serve(self) -> int:
        try:
            while True:
                message = self._channel.receive(wait=not self._busy)
                if isinstance(message, ShutDown):
                    return 0
                if message is not None:
                    self._take(message)
                else:
                    self._step()
        except SllmError as error:
            self._channel.send(EngineFailed(code=error.code, text=error.message))
            self._channel.wait_closed()
            return 1

    @property
    def _busy(self) -> bool:
        return self._runner is not None and self._jobs is not None and (self._runner.busy or self._jobs.busy)

    def _take(self, message: Any) -> None:
        if isinstance(message, Generate):
            self._begin(message)
        elif isinstance(message, Embed):
            self._embed(message)
        elif isinstance(message, CancelGeneration):
            self._cancel(message.request_id)
        elif isinstance(message, Park):
            self._park(message)
        elif isinstance(message, ExtendParked):
            self._extend(message)
        elif isinstance(message, LoadAdapter):
            self._load_adapter(message)
        elif isinstance(message, DropAdapter):
            self._drop_adapter(message.key)
        elif isinstance(message, PrepareModel):
            self._prepare(message)
        elif isinstance(message, CheckModel):
            self._check()
        elif isinstance(message, CheckAdapter):
            self._check_adapter(message.path)
        elif isinstance(message, MapWeights):
            self._map(message)
        elif isinstance(message, AttachWeights):
            self._attach(message.limits)

    def _span(self, name: str, begin_s: float) -> Span:
        return Span(name=name, begin_s=begin_s, end_s=self._clock.monotonic_s())

    def _prepare(self, message: PrepareModel) -> None:
        begin_s = self._clock.monotonic_s()
        self._prepared = message
        self._model = skeleton.build(message.path, message.dtype, generates=message.generates)
        self._spans.append(self._span("skeleton", begin_s))

    def _check(self) -> None:
        if self._prepared is None or self._model is None:
            raise EngineStartFailed("a check was asked for before a model was named")
        checkpoint = read_folder(Path(self._prepared.path))
        if checkpoint.ranks > 1:
            raise UnsupportedArchitecture(
                f"its tensors are split for {checkpoint.ranks} ranks, which this version does not serve"
            )
        tensors = [tensor for file in checkpoint.files for tensor in file.header.tensors]
        skeleton.match(self._model, tensors, self._prepared.aliases)
        self._channel.send(ModelChecked())

    def _check_adapter(self, path: str) -> None:
        if self._model is None:
            raise EngineStartFailed("an adapter's check was asked for before its base was named")
        found = read_folder(Path(path))
        if found.adapter is None:
            raise AdapterInvalid(f"{path} is not a LoRA adapter")
        tensors = [tensor for file in found.files for tensor in file.header.tensors]
        adapted = lora.match(self._model, found.adapter, tensors)
        lora.check_targets(self._model, found.adapter, adapted)
        self._channel.send(ModelChecked())

    def _load_adapter(self, message: LoadAdapter) -> None:
        if not isinstance(self._runner, Runner) or self._model is None:
            raise EngineStartFailed("an adapter came before its base's weights")
        try:
            adapter = self._read_adapter(self._model, message)
        except SllmError as error:
            self._channel.send(AdapterRefused(key=message.key, code=error.code, text=error.message))
            return
        self._runner.adapters.put(message.key, adapter)
        self._channel.send(AdapterLoaded(key=message.key))

    def _read_adapter(self, model: PreTrainedModel, message: LoadAdapter) -> lora.Adapter:
        config = read_lora_config(read_config(Path(message.path), CONFIG_NAME)[0], message.path)
        mapped = self._map_files(message.chunk_bytes, message.files)
        tensors, owner = tensors_of(message.files, mapped)
        placed = lora.match(model, config, tensors)
        return lora.make(config, placed, lambda tensor: owner[tensor.name].view(tensor), model.device)

    def _drop_adapter(self, key: str) -> None:
        assert isinstance(self._runner, Runner), "only what was loaded is dropped"
        self._runner.adapters.drop(key)
        self._channel.send(AdapterDropped(key=key))

    def _map(self, message: MapWeights) -> None:
        begin_s = self._clock.monotonic_s()
        self._files = message.files
        self._mapped = self._map_files(message.chunk_bytes, message.files)
        self._spans.append(self._span("map", begin_s))

    def _attach(self, limits: EngineLimits) -> None:
        if self._prepared is None or self._model is None or not self._files:
            raise EngineStartFailed("weights came before the model was named, or before they were mapped")
        begin_s = self._clock.monotonic_s()
        tensors, owner = tensors_of(self._files, self._mapped)
        paired = skeleton.match(self._model, tensors, self._prepared.aliases)
        weights = {name: owner[tensor.name].view(tensor) for name, tensor in paired.items()}
        skeleton.put_weights(self._model, weights)
        prepared = self._prepared
        if type(self._model).__name__ in ENCODERS:
            self._runner = EncoderRunner(self._model, prepared.context_tokens, limits)
        else:
            self._runner = Runner(self._model, prepared.eos_token_ids, prepared.context_tokens, limits)
        self._jobs = EmbeddingJobs(self._runner, prepared.embedding, self._clock)
        self._spans.append(self._span("attach", begin_s))
        late = tuple(sorted(_modules() - self._at_fork))
        self._channel.send(EngineReady(spans=tuple(self._spans), late_imports=late))

    def _begin(self, message: Generate) -> None:
        if self._runner is None:
            raise EngineStartFailed("a request came before the weights")
        try:
            if not isinstance(self._runner, Runner) or self._runner.headless:
                raise GenerationFailed("this model embeds texts and does not generate")
            constraint = self._constrain(message) if message.grammar else None
            generation = self._runner.begin(
                unpack_uint32(message.prompt),
                message.sampling,
                generated=unpack_uint32(message.generated),
                resume=message.resume,
                adapter=message.adapter,
                priority=message.priority,
                parked=self._parked.pop(RequestId(message.parked), None),
            )
        except SllmError as error:
            self._refuse(message.request_id, error)
            return
        generation.sampler.constraint = constraint
        running = _Running(message.request_id, generation)
        if generation.slot is not None:
            running.begin_s = self._clock.monotonic_s()
        if generation.finish is not None:
            self._channel.send(running.finished(generation.finish))
            return
        self._running[message.request_id] = running

    def _refuse(self, request_id: RequestId, error: SllmError) -> None:
        self._channel.send(_refusal(request_id, error))

    def _park(self, message: Park) -> None:
        try:
            if not isinstance(self._runner, Runner) or self._runner.headless:
                raise GenerationFailed("this model embeds texts and does not generate")
            self._parked[message.request_id] = self._runner.park(
                unpack_uint32(message.prompt),
                unpack_uint32(message.generated),
                resume=message.resume,
                adapter=message.adapter,
                priority=message.priority,
            )
        except SllmError as error:
            self._refuse(message.request_id, error)

    def _extend(self, message: ExtendParked) -> None:
        parked = self._parked.get(message.request_id)
        if parked is None:
            return
        assert isinstance(self._runner, Runner), "nothing else parks"
        try:
            self._runner.extend(parked, unpack_uint32(message.token_ids))
        except SllmError as error:
            self._cancel(message.request_id)
            self._refuse(message.request_id, error)

    def _embed(self, message: Embed) -> None:
        if self._jobs is None:
            raise EngineStartFailed("a request came before the weights")
        try:
            self._jobs.take(message)
        except SllmError as error:
            self._refuse(message.request_id, error)

    def _constrain(self, message: Generate) -> GrammarConstraint:
        if self._grammars is None:
            prepared, model = self._prepared, self._model
            assert prepared is not None and model is not None
            vocabulary_tokens = int(model.config.get_text_config().vocab_size)
            self._grammars = Grammars(prepared.path, vocabulary_tokens, prepared.eos_token_ids)
        return self._grammars.constrain(message.grammar, unpack_uint32(message.generated))

    def _cancel(self, request_id: RequestId) -> None:
        assert self._runner is not None and self._jobs is not None
        self._jobs.cancel(request_id)
        running = self._running.pop(request_id, None)
        generation = self._parked.pop(request_id, None) if running is None else running.generation
        if generation is not None:
            self._runner.cancel(generation)

    def _step(self) -> None:
        """Compute one step and send all that it brought."""
        assert self._runner is not None and self._jobs is not None
        begin_s = self._clock.monotonic_s()
        said = self._jobs.feed()
        if not self._runner.busy:
            self._channel.send_all(said)
            return
        step = self._runner.step()
        said += self._jobs.tell(step, begin_s)
        said += self._tell_parked(step)
        of = {running.generation: running for running in self._running.values()}
        for generation in step.admitted:
            if of[generation].begin_s is None:
                of[generation].begin_s = begin_s
        for generation in step.advanced:
            said += of[generation].news(self._clock)
            if generation.finish is not None:
                del self._running[of[generation].request_id]
        for generation, error in step.failed:
            said.append(_refusal(of[generation].request_id, error))
            del self._running[of[generation].request_id]
        self._channel.send_all(said)

    def _tell_parked(self, step: Step) -> list[object]:
        """Say which that are parked are as far as they can be, or have failed, and take them out of the step."""
        if not self._parked:
            return []
        ids = {generation: request_id for request_id, generation in self._parked.items()}
        said: list[object] = [Parked(request_id=ids[one], known_tokens=one.known) for one in step.parked]
        step.admitted[:] = [generation for generation in step.admitted if generation not in ids]
        for generation, error in step.failed:
            if generation in ids:
                del self._parked[ids[generation]]
                said.append(_refusal(ids[generation], error))
        step.failed[:] = [failed for failed in step.failed if failed[0] not in ids]
        return said


def _refusal(request_id: RequestId, error: SllmError) -> GenerationError:
    return GenerationError(request_id=request_id, code=error.code, text=error.message)
