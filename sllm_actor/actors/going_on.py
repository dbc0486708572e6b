"""Going on with an answer whose instance has gone: what has been given already, and what is still to be asked for.

Source of the idea: ServerlessLLM (OSDI '24, section 5): tokens are what a running inference consists of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec

from sllm_actor.actors.starting import MAX_ATTEMPTS
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.errors import Draining, NoCapacity, NoSuchActor, Preempted, SllmError
from sllm_actor.messages.embedding import Embed, Embedded
from sllm_actor.messages.generation import Finished, Generate, PromptLogprobs, Tokens

Answered = PromptLogprobs | Tokens | Embedded | Finished
# The lowest number that a request may have.
MOST_URGENT = -(2**31)


# One that was ended so often for more urgent ones is so no more.
MAX_PREEMPTIONS = 2
# So many instances may leave before a request has a slot of one.
MAX_TURNED_AWAY = 20
TURNED_AWAY_RETRY_S = 1.0


class Tries:
    """How often one request has been asked for anew, and why: it is asked for so often, and no more."""

    def __init__(self) -> None:
        self.preempted = 0
        self._attempts = 1
        self._turned_away = 0

    @property
    def spared(self) -> bool:
        """Whether it was ended for others often enough."""
        return self.preempted >= MAX_PREEMPTIONS

    def note(self, gone: SllmError, *, had_slot: bool) -> None:
        """Take note of what an instance failed with, after which another one is to be asked.

        Raises:
            NoCapacity: instances leave for others all the time, before the request has a slot of one.
            SllmError: what it failed with, where that was often enough.
        """
        if isinstance(gone, Preempted):
            self.preempted += 1
        elif not had_slot and isinstance(gone, (Draining, NoSuchActor)):
            # It left while the request waited for a slot, or was on its way to it.
            self._turned_away += 1
            if self._turned_away > MAX_TURNED_AWAY:
                raise NoCapacity(
                    f"{self._turned_away} instances of the model have made room for others before the request had a"
                    " slot of one",
                    retry_after_s=TURNED_AWAY_RETRY_S,
                ) from gone
        else:
            self._attempts += 1
            if self._attempts > MAX_ATTEMPTS:
                raise gone


class Given:
    """What has been given of one answer beside its tokens, so that of another instance's only the rest is."""

    def __init__(self) -> None:
        self._scored = 1
        self._vectors: set[int] = set()

    def is_new(self, item: Answered, epoch: int) -> bool:
        """Take note of an item that is to be given; false for one that has been, or is of an earlier epoch."""
        if isinstance(item, Tokens):
            return item.epoch == epoch
        if isinstance(item, PromptLogprobs):
            if item.index < self._scored:
                return False
            self._scored = item.index + len(item.logprobs)
        elif isinstance(item, Embedded):
            if item.index in self._vectors:
                return False
            self._vectors.add(item.index)
        return True


def rest_of(
    request: Generate | Embed, token_ids: Sequence[int], epoch: int, migration_id: str = ""
) -> Generate | Embed:
    """Ask for what is missing behind the tokens of an answer, as the one who has it in this epoch.

    `migration_id` is of what is prepared for it there. Vectors are computed again.
    """
    if isinstance(request, Embed):
        return request
    gone_on: Generate = msgspec.structs.replace(
        cast(Any, request), generated=pack_uint32(token_ids), epoch=epoch, migration_id=migration_id
    )
    return gone_on


def most_urgent(request: Generate | Embed) -> Generate | Embed:
    """Give the request such a priority that no other one ends it."""
    urgent: Generate | Embed = msgspec.structs.replace(cast(Any, request), priority=MOST_URGENT)
    return urgent
