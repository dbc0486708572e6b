"""Which instances answer for which model, as one gateway knows them, and how many of its requests each has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from sllm_actor.domain import ModelName
from sllm_actor.messages.instances import InstanceStarted
from sllm_actor.policy.routing import Candidate, choose


class Routes:
    """Learns of instances from their starts, from what is published, and from those that fail. Belongs to one loop."""

    def __init__(self) -> None:
        self._by_model: dict[ModelName, dict[str, InstanceStarted]] = {}
        self._outstanding: Counter[str] = Counter()
        # Told of a model, one of whose instances may have a slot free now.
        self.on_free: Callable[[ModelName], None] = lambda _: None

    def add(self, instance: InstanceStarted) -> None:
        """Send requests to an instance from now on."""
        self._by_model.setdefault(instance.model, {})[instance.instance_id] = instance
        self.on_free(instance.model)

    def remove(self, model: ModelName, instance_id: str) -> None:
        """Send no more requests to an instance."""
        known = self._by_model.get(model, {})
        known.pop(instance_id, None)
        if not known:
            self._by_model.pop(model, None)

    def publish(self, come: Iterable[InstanceStarted], gone: Iterable[InstanceStarted]) -> None:
        """Take over what has changed in what all nodes say of their instances.

        One that has failed here is not tried again because others still name it.
        """
        for instance in gone:
            self.remove(instance.model, instance.instance_id)
        for instance in come:
            self.add(instance)

    def choose(self, model: ModelName, prompt: bytes) -> InstanceStarted | None:
        """Give the instance that a request goes to, None where none runs."""
        known = self._by_model.get(model)
        if not known:
            return None
        if len(known) == 1:
            return next(iter(known.values()))
        candidates = [Candidate(instance_id, self._outstanding[instance_id]) for instance_id in known]
        return known[choose(candidates, prompt)]

    def take(self, instance: InstanceStarted) -> None:
        """Count a request that the instance answers from now on, until `give`."""
        self._outstanding[instance.instance_id] += 1

    def give(self, instance: InstanceStarted) -> None:
        """Count one less; the instance may have a slot free now."""
        self._outstanding[instance.instance_id] -= 1
        if not self._outstanding[instance.instance_id]:
            del self._outstanding[instance.instance_id]
            self.on_free(instance.model)

    def idle(self, model: ModelName) -> list[InstanceStarted]:
        """List the instances that no request of this gateway is at."""
        known = self._by_model.get(model, {})
        return [instance for instance in known.values() if instance.instance_id not in self._outstanding]
