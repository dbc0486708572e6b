"""The soonest offers of all nodes, found without a look at each. Pure.

Looked at one by one are those that have the checkpoint, or have fetched it before, found by indexes. All others would
fetch it, and differ in what has nothing to do with the checkpoint but its size: they are kept in order, for each kind
of model that was asked for of late, and only those of which something has changed since are looked at anew.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from sllm_actor.domain import NodeId
from sllm_actor.messages.declare import changed
from sllm_actor.messages.placement import PlaceModel
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.estimator import SOURCE, Estimator
from sllm_actor.policy.node_view import NodeView
from sllm_actor.policy.offers import INF, Action, Offer, allows, first_action, offer_of, rest_s, way_up

# Kinds of models whose order is kept.
MAX_RANKINGS = 64

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
    for offer in _ranking(view, estimator, question).offers(view, estimator):
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
    if estimator.watcher is not view:
        # What was learned meanwhile is not known to the view.
        estimator.watcher = view
        view.rankings.clear()
    kind = question.size_bytes, question.host_bytes, question.slots
    ranking = view.rankings.pop(kind, None)
    if ranking is None:
        ranking = Ranking(question, view.nodes)
        if len(view.rankings) == MAX_RANKINGS:
            del view.rankings[next(iter(view.rankings))]
    view.rankings[kind] = ranking
    return ranking


class Ranking:
    """All nodes by their offers for a model of one kind that they neither have nor have ever fetched.

    Whoever changes what is known of one puts it among the `doubtful`.
    """

    def __init__(self, question: PlaceModel, nodes: Iterable[NodeId]) -> None:
        self.doubtful = set(nodes)
        # It has no fingerprint, which is none that a node could have.
        self._question = changed(question, fingerprint="", holders_only=False, not_on=(), only_on="")
        # Those that have seen how fast they fetch, by the whole of their offers; and those that have not by all of it
        # but the bytes, which take as long for each of them.
        self._seen: list[_Entry] = []
        self._unseen: list[_Entry] = []
        self._entries: dict[NodeId, tuple[list[_Entry], _Entry]] = {}

    def offers(self, view: ClusterView, estimator: Estimator) -> Iterator[Offer]:
        """Give the offers, soonest first, of equal ones by name."""
        for name in self.doubtful:
            self._look_at(name, view.nodes.get(name), estimator)
        self.doubtful.clear()
        size_bytes, usual = self._question.size_bytes, view.usual_remote_bytes_per_s
        move_s = size_bytes / usual if usual > 0 else INF if size_bytes else 0.0
        # Where they take for ever all are equal, whatever comes on top.
        unseen = self._unseen if move_s < INF else sorted(self._unseen, key=lambda one: one[1])
        whole = ((move_s + seconds, name, action) for seconds, name, action in unseen)
        for estimate_s, name, action in heapq.merge(self._seen, whole):
            yield Offer(estimate_s, name, action, SOURCE)

    def _look_at(self, name: NodeId, node: NodeView | None, estimator: Estimator) -> None:
        if name in self._entries:
            entries, entry = self._entries.pop(name)
            del entries[bisect_left(entries, entry)]
        action = first_action(node, self._question) if node is not None else None
        if node is None or action is None:
            return
        way = way_up(node, self._question)
        seconds = rest_s(node, estimator, self._question, way, action)
        if node.report.remote_bytes_per_s > 0:
            entries, entry = self._seen, (way.move_s + seconds, name, action)
        else:
            entries, entry = self._unseen, (seconds, name, action)
        insort(entries, entry)
        self._entries[name] = entries, entry
