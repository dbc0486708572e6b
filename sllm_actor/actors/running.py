"""The requests that one instance works on: their prompts, how long they have been at it, what they teach in the end."""

from __future__ import annotations

from sllm_actor.domain import RequestId
from sllm_actor.engine.streams import Item
from sllm_actor.messages.embedding import Embed
from sllm_actor.messages.engine import Prefilled
from sllm_actor.messages.generation import Finished, Generate
from sllm_actor.messages.instances import AdapterHeld, Answered, InstanceActivity


class _One:
    def __init__(self, request: Generate | Embed, now_s: float) -> None:
        generated = request.generated if isinstance(request, Generate) else b""
        self.prompt_tokens = (len(request.prompt) + len(generated)) // 4
        self.priority = request.priority
        self.begin_s = now_s
        self.prefill_s = 0.0
        self.prefilled_s = now_s
        self.answered: Answered | None = None


class Running:
    """Owns what is known of the requests between `begin` and `end`."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._requests: dict[RequestId, _One] = {}

    def begin(self, request: Generate | Embed, now_s: float) -> None:
        """Note a request that has come, and may wait for its turn still."""
        self._requests[request.request_id] = _One(request, now_s)

    def take(self, request_id: RequestId, item: AdapterHeld | Item, now_s: float) -> None:
        """Note an item of an answer."""
        one = self._requests[request_id]
        if isinstance(item, Prefilled):
            one.prefill_s = item.span.end_s - item.span.begin_s
            one.prefilled_s = now_s
        elif isinstance(item, Finished):
            one.answered = Answered(
                computed_tokens=one.prompt_tokens - item.cached_tokens,
                prefill_s=one.prefill_s,
                tokens=item.generated_tokens,
                decode_s=now_s - one.prefilled_s,
            )

    def end(self, request_id: RequestId) -> Answered | None:
        """Forget a request; give what it teaches, nothing where it did not come to its good end."""
        return self._requests.pop(request_id).answered

    def activity(self, now_s: float, keep_alive_s: float, answered: Answered | None = None) -> InstanceActivity:
        """Describe the requests together."""
        prompt_tokens, running_s, priorities = 0, 0.0, list[int]()
        for one in self._requests.values():
            prompt_tokens += one.prompt_tokens
            running_s += now_s - one.begin_s
            priorities.append(one.priority)
        return InstanceActivity(
            instance_id=self._instance_id,
            active=len(priorities),
            prompt_tokens=prompt_tokens,
            running_s=running_s,
            priority=min(priorities, default=0),
            answered=answered,
            keep_alive_s=keep_alive_s,
        )
