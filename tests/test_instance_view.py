"""An idle instance is described to the Scheduler anew where anything of it has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from sllm_actor.actors.instance import Instance
from sllm_actor.domain import ModelName
from sllm_actor.messages.instances import Answered, InstanceActivity
from sllm_actor.messages.placement import InstanceView
from sllm_actor.policy.answer_times import LearnedTimes
from sllm_actor.testing.simulated_node import model_of


class Adapters:
    """Adapters of which one has been loaded, or not."""

    def __init__(self) -> None:
        self.loaded_bytes = 0

    def host_bytes(self, pinned: Collection[str]) -> int:
        return 0 if "adapter" in pinned else self.loaded_bytes


def activity(active: int = 0, running_s: float = 0.0, prompt_tokens: int = 0) -> InstanceActivity:
    return InstanceActivity(
        instance_id="m-1", active=active, keep_alive_s=60.0, running_s=running_s, prompt_tokens=prompt_tokens
    )


def changed(view: InstanceView, **changes: Any) -> Any:
    return msgspec.structs.replace(cast(Any, view), **changes)


async def test_whatever_changes_of_an_idle_instance_is_in_its_next_description() -> None:
    model, adapters, times = model_of("m", 100, 60.0), Adapters(), LearnedTimes()
    worker = SimpleNamespace(name="worker/m-1")
    one = Instance("m-1", model, cast(Any, None), cast(Any, adapters), cast(Any, worker), times, 1.0)
    view = one.view((), 2.0)
    assert (view.active, view.idle_since_s, view.host_bytes, view.leaving, view.kept) == (0, 1.0, 100, False, False)
    assert one.view((), 3.0) is view, "nothing has changed"
    assert one.view({model.fingerprint}, 3.0) == changed(view, host_bytes=0)
    adapters.loaded_bytes = 7
    assert one.view((), 4.0) == changed(view, host_bytes=107)
    assert one.view({"adapter"}, 4.0) == view
    adapters.loaded_bytes = 0
    one.kept = True
    assert one.view((), 4.0) == changed(view, kept=True)
    one.kept = False
    times.learn(ModelName("m"), Answered(computed_tokens=10, prefill_s=1.0, tokens=3, decode_s=1.0))
    seen = times.of(ModelName("m"))
    learned = changed(view, token_s=0.5, resume_s_per_token=seen.rising[0], resume_s=seen.rising[1])
    assert learned != view
    assert one.view((), 4.0) == learned
    one.hear(activity(active=1, prompt_tokens=5, running_s=0.5), 5.0)
    assert one.view((), 6.0) == changed(learned, active=1, prompt_tokens=5, running_s=1.5)
    assert one.view((), 7.0) == changed(learned, active=1, prompt_tokens=5, running_s=2.5)
    one.hear(activity(), 8.0)
    assert one.view((), 9.0) == changed(learned, idle_since_s=8.0)
    one.retired = asyncio.get_running_loop().create_future()
    assert one.view((), 9.0) == changed(learned, idle_since_s=8.0, leaving=True)
