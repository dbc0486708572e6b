"""Requests for vectors in an engine: the texts of each go to the runner a few at a time, in turn with those of others.

So a request of thousands of texts keeps nobody waiting for longer than some of them take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from sllm_actor.domain import Embedding, FinishReason, RequestId, Span
from sllm_actor.domain.tokens import unpack_uint32
from sllm_actor.engine.encoder import EncoderRunner
from sllm_actor.engine.generation import Generation, Step
from sllm_actor.engine.pooling import Pooler
from sllm_actor.engine.runner import Runner
from sllm_actor.errors import GenerationFailed, SllmError
from sllm_actor.messages.embedding import Embed, Embedded
from sllm_actor.messages.engine import GenerationError, Prefilled
from sllm_actor.messages.generation import Finished
from sllm_actor.runtime.clock import Clock


class _Job:
    """One request: the texts that the runner has not yet, by index, and how many vectors are still to come."""

    def __init__(self, message: Embed) -> None:
        tokens, sizes = unpack_uint32(message.prompt), unpack_uint32(message.sizes)
        if sum(sizes) != len(tokens) or not sizes:
            raise GenerationFailed(f"{len(tokens)} tokens are not those of {len(sizes)} texts")
        self.message = message
        self.prompt_tokens = len(tokens)
        self.left = len(sizes)
        self.begin_s: float | None = None
        self.texts: deque[tuple[int, Sequence[int]]] = deque()
        begin = 0
        for index, size in enumerate(sizes):
            self.texts.append((index, tokens[begin : begin + size]))
            begin += size


class EmbeddingJobs:
    """Owns the requests for vectors of an engine, and their texts in its runner."""

    def __init__(self, runner: Runner | EncoderRunner, embedding: Embedding | None, clock: Clock) -> None:
        self._runner = runner
        self._embedding = embedding
        self._clock = clock
        self._jobs: deque[_Job] = deque()
        self._running: dict[Generation, tuple[_Job, int]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def take(self, message: Embed) -> None:
        """Take on a request.

        Raises:
            GenerationFailed: it is none that this model can be asked.
        """
        if self._embedding is None:
            raise GenerationFailed("this model was registered without saying how it embeds")
        self._jobs.append(_Job(message))

    def cancel(self, request_id: RequestId) -> None:
        """Forget a request and its texts."""
        self._jobs = deque(job for job in self._jobs if job.message.request_id != request_id)
        gone = [text for text, (job, _) in self._running.items() if job.message.request_id == request_id]
        for text in gone:
            del self._running[text]
            self._runner.cancel(text)

    def feed(self) -> list[object]:
        """Give the runner texts, one of each request in turn, as many as it has room for; say what it refused."""
        said: list[object] = []
        waiting = deque(job for job in self._jobs if job.texts)
        while waiting and len(self._running) < self._runner.room_for_texts():
            job = waiting.popleft()
            index, tokens = job.texts.popleft()
            assert self._embedding is not None
            pooler = Pooler(self._embedding, job.message.dimensions)
            try:
                text = self._runner.begin_embedding(tokens, pooler, job.message.priority)
            except SllmError as error:
                said.append(self._fail(job, error))
                continue
            self._running[text] = job, index
            if job.texts:
                waiting.append(job)
        if self._jobs:
            self._jobs.rotate(-1)  # Another one is first next time.
        return said

    def tell(self, step: Step, begin_s: float) -> list[object]:
        """Say what a step brought of the texts, and take them out of it."""
        said: list[object] = []
        for text in step.admitted:
            if text in self._running and (job := self._running[text][0]).begin_s is None:
                job.begin_s = begin_s
        for text in step.advanced:
            if text in self._running:
                said += self._told(*self._running.pop(text), text)
        for text, error in step.failed:
            if text in self._running:
                said.append(self._fail(self._running.pop(text)[0], error))
        step.admitted[:] = [generation for generation in step.admitted if generation.pooler is None]
        step.advanced[:] = [generation for generation in step.advanced if generation.pooler is None]
        step.failed[:] = [(generation, error) for generation, error in step.failed if generation.pooler is None]
        return said

    def _told(self, job: _Job, index: int, text: Generation) -> list[object]:
        request_id = job.message.request_id
        said: list[object] = [Embedded(request_id=request_id, index=index, vector=text.vector)]
        job.left -= 1
        if job.left == 0:
            assert job.begin_s is not None
            self._jobs.remove(job)
            span = Span(name="embed", begin_s=job.begin_s, end_s=self._clock.monotonic_s())
            said.append(Prefilled(request_id=request_id, span=span))
            said.append(
                Finished(
                    request_id=request_id,
                    reason=FinishReason.STOP,
                    prompt_tokens=job.prompt_tokens,
                    generated_tokens=0,
                )
            )
        return said

    def _fail(self, job: _Job, error: SllmError) -> GenerationError:
        request_id = job.message.request_id
        self.cancel(request_id)
        return GenerationError(request_id=request_id, code=error.code, text=error.message)
