"""The Router's memory: each request's tokens, spans and outcome. State without I/O."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from sllm_actor.domain import RequestId, Span, Timeline
from sllm_actor.domain.tokens import unpack_uint32
from sllm_actor.errors import InvalidRequest, RequestNotFound, SllmError
from sllm_actor.messages.embedding import Embed, Embedded
from sllm_actor.messages.generation import Finished, Generate, PromptLogprobs, RequestLocation, Tokens
from sllm_actor.messages.instances import InstanceStarted
from sllm_actor.runtime.clock import Clock


class RequestRecord:
    """One request, from arrival to end."""

    def __init__(self, request: Generate | Embed) -> None:
        self.request = request
        self.spans: list[Span] = list(request.spans)
        # The answer so far; one that goes on brings its tokens with it.
        self.tokens = list(unpack_uint32(request.generated)) if isinstance(request, Generate) else []
        self.instance: InstanceStarted | None = None
        self.cold = False
        self.beside = 0
        # Counts the instances that have had it.
        self.epoch = 0
        # When it was handed over the last time.
        self.moved_s = 0.0
        self.start_of = ""
        self.first_token_s = 0.0
        self.end_s = 0.0
        self.prompt_tokens = len(request.prompt) // 4
        self.outcome = "running"

    @property
    def begun(self) -> bool:
        """Whether anything of the answer has been given away."""
        return bool(self.first_token_s)

    def take(self, item: PromptLogprobs | Tokens | Embedded | Finished, now_s: float) -> None:
        """Note an item of the answer; tokens come in order, each once."""
        if not self.first_token_s:
            self.first_token_s = now_s
        if isinstance(item, Tokens):
            assert item.index == len(self.tokens), "an engine repeats or leaves out no token"
            self.tokens.extend(item.token_ids)

    def timeline(self) -> Timeline:
        return Timeline(
            request_id=self.request.request_id,
            model=self.request.model,
            cold=self.cold,
            arrived_s=self.request.arrived_s,
            spans=tuple(self.spans),
            first_token_s=self.first_token_s,
            end_s=self.end_s,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=len(self.tokens),
            outcome=self.outcome,
            instance_id=self.instance.instance_id if self.instance is not None else "",
            node=self.instance.node if self.instance is not None else "",
            beside=self.beside,
            start_of=self.start_of,
        )


class RequestLog:
    """Owns the running requests and the timelines of the last `history` finished ones."""

    def __init__(self, clock: Clock, history: int) -> None:
        self._clock = clock
        self._history = history
        self._running: dict[RequestId, RequestRecord] = {}
        # How many of these each instance answers.
        self._answering: Counter[str] = Counter()
        self._finished: OrderedDict[RequestId, Timeline] = OrderedDict()

    @contextmanager
    def following(self, request: Generate | Embed) -> Iterator[RequestRecord]:
        """Keep a record of a request that runs in this block, and of how that ends.

        Raises:
            InvalidRequest: a request of this id is running.
        """
        record = self._open(request)
        try:
            yield record
            record.outcome = "finished"
        except SllmError as error:
            record.outcome = error.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.outcome = "cancelled"
            raise
        finally:
            self._close(record)

    def _open(self, request: Generate | Embed) -> RequestRecord:
        if request.request_id in self._running:
            raise InvalidRequest(f"a request with the id {request.request_id} is running already")
        record = RequestRecord(request)
        self._running[request.request_id] = record
        return record

    def route(self, record: RequestRecord, instance: InstanceStarted) -> None:
        """Note the instance that answers a request, and how many it answers already."""
        self._leave(record)
        record.beside = self._answering[instance.instance_id]
        self._answering[instance.instance_id] += 1
        record.instance = instance

    def _leave(self, record: RequestRecord) -> None:
        if record.instance is not None:
            instance_id = record.instance.instance_id
            self._answering[instance_id] -= 1
            if not self._answering[instance_id]:
                del self._answering[instance_id]

    def _close(self, record: RequestRecord) -> None:
        """Move a record to the finished ones; the oldest of those is forgotten."""
        request_id = record.request.request_id
        self._leave(record)
        record.end_s = self._clock.monotonic_s()
        del self._running[request_id]
        self._finished.pop(request_id, None)
        self._finished[request_id] = record.timeline()
        while len(self._finished) > self._history:
            self._finished.popitem(last=False)

    def timeline(self, request_id: RequestId) -> Timeline:
        """Give the timeline of a request.

        Raises:
            RequestNotFound: it is not running and not among the remembered.
        """
        if request_id in self._running:
            return self._running[request_id].timeline()
        if request_id in self._finished:
            return self._finished[request_id]
        raise RequestNotFound(f"there is no request {request_id}", param="request_id")

    def location(self, request_id: RequestId) -> RequestLocation:
        """Say where a running request generates.

        Raises:
            RequestNotFound: it is not running, or waits for its instance still.
            InvalidRequest: it embeds.
        """
        record = self._running.get(request_id)
        if record is None or record.instance is None:
            raise RequestNotFound(f"no request {request_id} is generating", param="request_id")
        if not isinstance(record.request, Generate):
            raise InvalidRequest(f"request {request_id} embeds texts: it is not moved", param="request_id")
        return RequestLocation(
            request_id=request_id,
            node=record.instance.node,
            instance_id=record.instance.instance_id,
            worker=record.instance.worker,
            model=record.request.model,
            served=record.instance.model,
            priority=record.request.priority,
        )

    def timelines(self) -> tuple[Timeline, ...]:
        """List the running and the remembered requests, newest first."""
        running = [record.timeline() for record in self._running.values()]
        return tuple(reversed([*self._finished.values(), *running]))
