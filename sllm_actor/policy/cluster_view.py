"""What is known of all nodes, kept so that a placement need not look at each: reports in, indexes out. Pure.

The same reports and grants in the same order give the same view. No clock: moments come with the calls.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from math import inf
from typing import TYPE_CHECKING

from sllm_actor.domain import ModelName, NodeId
from sllm_actor.messages.declare import changed
from sllm_actor.messages.placement import InstanceView, NodeChange, NodeReport
from sllm_actor.policy.bandwidth import Bandwidths
from sllm_actor.policy.changes import Changes
from sllm_actor.policy.node_view import Grant, NodeView, Ways

if TYPE_CHECKING:
    from sllm_actor.policy.soonest import Ranking


class ClusterView:
    """Owns the newest report of every node, the grants not yet used, which instances leave, and which are held, and
    which checkpoints are about to be in host memory.

    Until a node has told of a bandwidth, those given here are assumed; 0 is an unknown one.
    """

    def __init__(self, first_ssd_bytes_per_s: float = 0.0, first_remote_bytes_per_s: float = 0.0) -> None:
        self.nodes: dict[NodeId, NodeView] = {}
        self.grants: dict[str, Grant] = {}
        self._grants_on: dict[NodeId, dict[str, Grant]] = {}
        # No grant expires before this moment.
        self._expires_from_s = inf
        self.leaving: dict[NodeId, set[str]] = {}
        self.held: dict[NodeId, set[str]] = {}
        self._expected: dict[NodeId, dict[str, int]] = {}
        self._heard_s: dict[NodeId, float] = {}
        self._holders: dict[str, dict[NodeId, None]] = {}
        self._running_on: dict[ModelName, dict[NodeId, None]] = {}
        self._active: dict[ModelName, int] = {}
        self._awaited: Counter[ModelName] = Counter()
        self.names: list[NodeId] = []
        # The nodes by their queue of fetches.
        self.by_remote_queue: list[tuple[float, NodeId]] = []
        # Of which nodes something has changed that their offers are made of.
        self.changes = Changes()
        # The nodes by their offers for models of a few kinds: `soonest` makes and keeps these.
        self.rankings: dict[tuple[int, int, int], Ranking] = {}
        self._ways = Ways(Bandwidths(first_ssd_bytes_per_s), Bandwidths(first_remote_bytes_per_s))

    def hear(self, report: NodeReport, now_s: float) -> None:
        """Take in a node's newest report."""
        if report.node in self.leaving:
            self.leaving[report.node] &= {instance.instance_id for instance in report.instances}
        self._heard_s[report.node] = now_s
        self._see(report)

    def hear_of_change(self, change: NodeChange) -> bool:
        """Take in what has changed since a node's last report; tell whether any of that is known of."""
        node = self.nodes.get(change.node)
        if node is None:
            return False
        before = node.report
        known = [one.instance_id for one in before.instances]
        told = [one for one in change.instances if one.instance_id in known]
        instances = list(before.instances)
        for one in told:
            at = known.index(one.instance_id)
            # As it would have been when all of it was told.
            running_s = one.running_s - one.active * (change.told_s - before.told_s)
            self._count_active(one.model, one.active - instances[at].active)
            instances[at] = changed(one, running_s=running_s) if one.active else one
        awaited = before.awaited if change.awaited is None else change.awaited
        node.hear_of_change(changed(before, instances=tuple(instances), awaited=awaited))
        self._index_awaited(before.awaited, awaited)
        if told:
            self.changes.note(change.node)
        return bool(told) or change.awaited is not None

    def _see(self, report: NodeReport) -> None:
        node, before = report.node, self.nodes.get(report.node)
        expected = self._expected.get(node, {})
        grants, marked = self._grants_of(node), self._marked(node)
        view = self.nodes[node] = NodeView(report, self._ways, grants, *marked, expected, before)
        self._index(before, view)

    def forget(self, node: NodeId) -> None:
        """Forget a node that has gone, its grants with it."""
        gone = self.nodes.pop(node, None)
        if gone is None:
            return
        del self._heard_s[node]
        for placement_id in self._grants_on.pop(node, {}):
            del self.grants[placement_id]
        self.leaving.pop(node, None)
        self.held.pop(node, None)
        self._expected.pop(node, None)
        # Few leave, and none of these keeps the name of one that has left.
        self.rankings.clear()
        self._index(gone, None)

    def _index(self, before: NodeView | None, view: NodeView | None) -> None:
        """Change in the indexes what a node's view has, and the one before had not, or the other way about."""
        if view is not None:
            self.changes.note(view.report.node)
        if before is None or view is None or before.on_host is not view.on_host or before.on_ssd is not view.on_ssd:
            self._index_holders(before, view)
        self._index_models(before, view)
        self._index_awaited(_awaited(before), _awaited(view))
        if before is None and view is not None:
            insort(self.names, view.report.node)
        if view is None and before is not None:
            self.names.remove(before.report.node)
        old, new = _queued(before), _queued(view)
        if old != new:
            if old is not None:
                del self.by_remote_queue[bisect_left(self.by_remote_queue, old)]
            if new is not None:
                insort(self.by_remote_queue, new)
        old_ssd, old_remote = _bandwidths(before)
        new_ssd, new_remote = _bandwidths(view)
        self._ways.ssd.change(old_ssd, new_ssd)
        self._ways.remote.change(old_remote, new_remote)

    def _index_holders(self, before: NodeView | None, view: NodeView | None) -> None:
        old = before.on_host | before.on_ssd if before is not None else frozenset()
        new = view.on_host | view.on_ssd if view is not None else frozenset()
        for fingerprint in old - new:
            assert before is not None
            holders = self._holders[fingerprint]
            del holders[before.report.node]
            if not holders:
                del self._holders[fingerprint]
        for fingerprint in new - old:
            assert view is not None
            self._holders.setdefault(fingerprint, {})[view.report.node] = None

    def _index_models(self, before: NodeView | None, view: NodeView | None) -> None:
        old = before.active if before is not None else {}
        new = view.active if view is not None else {}
        if old == new:
            return
        for model in old.keys() - new.keys():
            assert before is not None
            del self._running_on[model][before.report.node]
            if not self._running_on[model]:
                del self._running_on[model]
        for model in new.keys() - old.keys():
            assert view is not None
            self._running_on.setdefault(model, {})[view.report.node] = None
        for model in [one for one in old.keys() | new.keys() if old.get(one) != new.get(one)]:
            self._count_active(model, new.get(model, 0) - old.get(model, 0))

    def _count_active(self, model: ModelName, more: int) -> None:
        active = self._active.pop(model, 0) + more
        if active:
            self._active[model] = active

    def _index_awaited(self, old: dict[ModelName, int], new: dict[ModelName, int]) -> None:
        if old != new:
            self._awaited.subtract(old)
            self._awaited.update(new)
            self._awaited = +self._awaited

    @property
    def awaited(self) -> Mapping[ModelName, int]:
        """How many requests wait for a start of each model, beside those that the Scheduler was asked for."""
        return self._awaited

    @property
    def active(self) -> Mapping[ModelName, int]:
        """How many requests run of each model of which any do, also on instances that leave."""
        return self._active

    def models(self) -> Set[ModelName]:
        """List the models that have instances."""
        return self._running_on.keys()

    def running(self, model: ModelName) -> Iterator[tuple[NodeReport, InstanceView]]:
        """Give the instances of a model that take requests, the least busy of each node first."""
        for name in self._running_on.get(model, ()):
            node = self.nodes[name]
            for instance in sorted(node.staying(model), key=lambda one: (one.active, one.instance_id)):
                yield node.report, instance

    def grant(self, placement_id: str, grant: Grant) -> None:
        """Take the room of a placement."""
        self._keep_grant(placement_id, grant)
        self._account(grant.node)

    def _keep_grant(self, placement_id: str, grant: Grant) -> None:
        self.grants[placement_id] = grant
        self._grants_on.setdefault(grant.node, {})[placement_id] = grant
        self._expires_from_s = min(self._expires_from_s, grant.expires_s)

    def release(self, placement_id: str) -> Grant | None:
        """Give the room of a placement back, if it has any still."""
        grant = self.grants.pop(placement_id, None)
        if grant is not None:
            here = self._grants_on[grant.node]
            del here[placement_id]
            if not here:
                del self._grants_on[grant.node]
            self._account(grant.node)
        return grant

    def extend(self, placement_id: str, expires_s: float) -> None:
        """Let a placement keep its room for longer, if it has any still."""
        grant = self.grants.get(placement_id)
        if grant is not None:
            self._keep_grant(placement_id, grant._replace(expires_s=expires_s))

    def expired(self, now_s: float) -> list[str]:
        """Release the placements that nobody used in time; give their ids."""
        if now_s < self._expires_from_s:
            return []
        self._expires_from_s = min(
            (grant.expires_s for grant in self.grants.values() if grant.expires_s > now_s), default=inf
        )
        ids = [placement_id for placement_id, grant in self.grants.items() if grant.expires_s <= now_s]
        for placement_id in ids:
            self.release(placement_id)
        return ids

    def give_up(self, node: NodeId, instance_ids: Iterable[str]) -> None:
        """Note instances that were asked to leave."""
        self.leaving.setdefault(node, set()).update(instance_ids)
        self._account(node)

    def keep(self, node: NodeId, instance_id: str) -> None:
        """Note that an instance stays after all."""
        self.leaving.get(node, set()).discard(instance_id)
        self._account(node)

    def hold(self, node: NodeId, instance_id: str) -> None:
        """Let an instance make no room for others, also while it is idle."""
        self.held.setdefault(node, set()).add(instance_id)
        self._account(node)

    def let_go(self, node: NodeId, instance_id: str) -> None:
        """Let it make room again."""
        held = self.held.get(node, set())
        held.discard(instance_id)
        if not held:
            self.held.pop(node, None)
        self._account(node)

    def expect(self, node: NodeId, fingerprint: str, host_bytes: int) -> None:
        """Take a checkpoint for one in host memory: it is about to be there, and a grant has its room."""
        self._expected[node] = {**self._expected.get(node, {}), fingerprint: host_bytes}
        if node in self.nodes:
            self._see(self.nodes[node].report)

    def expect_no_more(self, node: NodeId, fingerprint: str) -> None:
        """Believe the node's reports alone again."""
        left = {one: host_bytes for one, host_bytes in self._expected.pop(node, {}).items() if one != fingerprint}
        if left:
            self._expected[node] = left
        if node in self.nodes:
            self._see(self.nodes[node].report)

    def _account(self, node: NodeId) -> None:
        if node in self.nodes:
            self.nodes[node].count_beside(self._grants_of(node), *self._marked(node))
            self.changes.note(node)

    def _marked(self, node: NodeId) -> tuple[Collection[str], Collection[str]]:
        return self.leaving.get(node, ()), self.held.get(node, ())

    def _grants_of(self, node: NodeId) -> Collection[Grant]:
        return self._grants_on.get(node, {}).values()

    def age_s(self, node: NodeId, now_s: float) -> float:
        """Tell how old a node's newest report is."""
        return max(0.0, now_s - self._heard_s[node])

    def holders(self, fingerprint: str) -> Collection[NodeId]:
        """List the nodes that have a checkpoint in host memory or on their disk."""
        return self._holders.get(fingerprint, {})

    @property
    def usual_remote_bytes_per_s(self) -> float:
        """How fast a node is taken to fetch that has not done so yet."""
        return self._ways.remote.usual


def _queued(view: NodeView | None) -> tuple[float, NodeId] | None:
    return (view.report.remote_queue_s, view.report.node) if view is not None else None


def _awaited(view: NodeView | None) -> dict[ModelName, int]:
    return view.report.awaited if view is not None else {}


def _bandwidths(view: NodeView | None) -> tuple[float, float]:
    return (view.report.ssd_bytes_per_s, view.report.remote_bytes_per_s) if view is not None else (0.0, 0.0)
