"""The soonest offers of all nodes, found without a look at each. Pure.

Looked at one by one are those that have the checkpoint, or have fetched it before, found by indexes. All others would
fetch it, and differ in what has nothing to do with the checkpoint but its size: they are kept in order, for each kind
of model that was asked for of late, and only those of which something has changed since are looked at anew.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Set

from sllm_actor.domain import NodeId
from sllm_actor.messages.declare import changed
from sllm_actor.messages.placement import PlaceModel
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.estimator import SOURCE, Estimator
from sllm_actor.policy.node_view import NodeView
from sllm_actor.policy.offers import INF, Action, Offer, allows, first_action, offer_of, rest_s, way_up

# Kinds of models whose order is kept.
MAX_RANKINGS = 256

_Entry = tuple[float, NodeId, Action]


def soonest(view: ClusterView, estimator: Estimator, question: PlaceModel, most: int) -> list[Offer]:
    """Give the `most` soonest offers of all nodes, soonest first."""
    best: list[Offer] = []
    apart = {*view.holders(question.fingerprint), *estimator.fetched_by(question.fingerprint)}
    if question.only_on:
        apart.add(NodeId(question.only_on))
    for name in apart:
        node = view.nodes.get(name)
        _take(best, offer_of(node, estimator, question) if node is not None else None, most)
    if question.holders_only or question.only_on:
        return best
    for offer in _ranking(view, estimator, question).offers():
        if len(best) == most and offer[:2] > best[-1][:2]:
            break
        if offer.node not in apart and allows(question, offer.node):
            _take(best, offer, most)
    return best


def _take(best: list[Offer], offer: Offer | None, most: int) -> None:
    if offer is None or (len(best) == most and offer[:2] > best[-1][:2]):
        return
    insort(best, offer, key=lambda one: one[:2])
    del best[most:]


def _ranking(view: ClusterView, estimator: Estimator, question: PlaceModel) -> Ranking:
    kind = question.size_bytes, question.host_bytes, question.slots
    ranking = view.rankings.pop(kind, None)
    if ranking is None or ranking.estimator is not estimator:
        ranking = Ranking(question, view, estimator)
        if len(view.rankings) == MAX_RANKINGS:
            del view.rankings[next(iter(view.rankings))]
    view.rankings[kind] = ranking
    return ranking


class Ranking:
    """All nodes by their offers for a model of one kind that they neither have nor have ever fetched.

    Looked at anew are those of which the view or the estimator says that they have changed.
    """

    def __init__(self, question: PlaceModel, view: ClusterView, estimator: Estimator) -> None:
        self.estimator = estimator
        self._view = view
        # At which revisions of both it has looked last.
        self._looked_at = -1, -1
        # It has no fingerprint, which is none that a node could have.
        self._question = changed(question, fingerprint="", holders_only=False, not_on=(), only_on="")
        # Those that have seen how fast they fetch, by the whole of their offers; and those that have not by all of it
        # but the bytes, which take as long for each of them.
        self._seen: list[_Entry] = []
        self._unseen: list[_Entry] = []
        self._entries: dict[NodeId, tuple[list[_Entry], _Entry]] = {}

    def offers(self) -> Iterator[Offer]:
        """Give the offers, soonest first, of equal ones by name."""
        for name in self._changed():
            self._look_at(name, self._view.nodes.get(name))
        size_bytes, usual = self._question.size_bytes, self._view.usual_remote_bytes_per_s
        move_s = size_bytes / usual if usual > 0 else INF if size_bytes else 0.0
        # Where they take for ever all are equal, whatever comes on top.
        unseen = self._unseen if move_s < INF else sorted(self._unseen, key=lambda one: one[1])
        whole = ((move_s + seconds, name, action) for seconds, name, action in unseen)
        for estimate_s, name, action in heapq.merge(self._seen, whole):
            yield Offer(estimate_s, name, action, SOURCE)

    def _changed(self) -> Set[NodeId]:
        """Name the nodes that may have changed since this was asked last: at first, and after too long, all."""
        seen, learned, before = self._view.changes, self.estimator.changes, self._looked_at
        self._looked_at = seen.revision, learned.revision
        in_view, in_learned = seen.since(before[0]), learned.since(before[1])
        if in_view is None or in_learned is None:
            return {*self._view.nodes, *self._entries}
        return {*in_view, *in_learned}

    def _look_at(self, name: NodeId, node: NodeView | None) -> None:
        if name in self._entries:
            entries, entry = self._entries.pop(name)
            del entries[bisect_left(entries, entry)]
        action = first_action(node, self._question) if node is not None else None
        if node is None or action is None:
            return
        way = way_up(node, self._question)
        seconds = rest_s(node, self.estimator, self._question, way, action)
        if node.report.remote_bytes_per_s > 0:
            entries, entry = self._seen, (way.move_s + seconds, name, action)
        else:
            entries, entry = self._unseen, (seconds, name, action)
        insort(entries, entry)
        self._entries[name] = entries, entry
