"""What is refused for now, with nothing done; the tree is drawn with the others."""

from __future__ import annotations

from sllm_actor.errors.base import SllmError


class Overloaded(SllmError):
    code = "overloaded"


class MailboxFull(Overloaded):
    code = "mailbox_full"


class LinkFull(Overloaded):
    code = "link_full"


class QueueFull(Overloaded):
    code = "queue_full"


class NoCapacity(Overloaded):
    code = "no_capacity"


class Draining(Overloaded):
    code = "draining"


class Preempted(Draining):
    code = "preempted"


class RateLimited(Overloaded):
    code = "rate_limit_exceeded"


class RoleMissing(Overloaded):
    code = "role_missing"


class NoLeader(Overloaded):
    code = "no_leader"
