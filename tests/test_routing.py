"""Which instance a request goes to, where it goes when that one has gone, and who is asked when the leader has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_instance_faults import model_of
from test_membership import House, in_a_house
from test_supervision import now_s, turn, virtual_system, virtually

from sllm_actor.actors.going_on import MAX_PREEMPTIONS, MOST_URGENT
from sllm_actor.actors.request_log import RequestLog
from sllm_actor.actors.route_book import ROUTES, RouteBook
from sllm_actor.actors.router import Router
from sllm_actor.actors.routes import Routes
from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.actors.starting import MAX_ATTEMPTS, Starting
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import FinishReason, ModelName, NodeId, RequestId, Sampling
from sllm_actor.domain.tokens import pack_uint32, unpack_uint32
from sllm_actor.errors import DestinationFailed, EngineDied, NoCapacity, NodeUnreachable, NoLeader, Preempted, SllmError
from sllm_actor.messages.generation import Finished, Generate, GetTimeline, Tokens
from sllm_actor.messages.instances import InstanceStarted, StartInstance
from sllm_actor.messages.models import GetModel
from sllm_actor.messages.placement import HurryPlacement, Placement, PlaceModel, RunsAlready
from sllm_actor.metadata import Delete, Put
from sllm_actor.policy.routing import SLACK, Candidate, choose
from sllm_actor.runtime import Actor, ActorSystem, handles

SAMPLING = Sampling(max_tokens=9, temperature=0.0, top_p=1.0, seed=0)
MODEL = model_of(cast(Any, type("Described", (), {"path": "/m", "fingerprint": "f", "size_bytes": 9})))


def instance(instance_id: str, node: str = "n") -> InstanceStarted:
    return InstanceStarted(
        instance_id=instance_id, model=ModelName("m"), node=NodeId(node), worker=f"worker/{instance_id}", spans=()
    )


def request(name: str = "r", prompt: bytes = b"\1\0\0\0") -> Generate:
    return Generate(request_id=RequestId(name), model=ModelName("m"), prompt=prompt, sampling=SAMPLING)


class Worker(Actor):
    """Says the numbers behind those that are said, `lasts` of them, and dies of it, or up to nine."""

    def __init__(self, lasts: int | None = None, dies_of: type[SllmError] = EngineDied) -> None:
        self._lasts = lasts
        self._dies_of = dies_of
        self.priorities: list[int] = []

    @handles(Generate)
    async def generate(self, request: Generate) -> AsyncIterator[Tokens | Finished]:
        self.priorities.append(request.priority)
        begin = len(unpack_uint32(request.generated))
        for index in range(begin, 9):
            if self._lasts is not None and index >= begin + self._lasts:
                raise self._dies_of("it is gone")
            yield Tokens(request_id=request.request_id, index=index, token_ids=(index,), epoch=request.epoch)
        yield Finished(request_id=request.request_id, reason=FinishReason.LENGTH, prompt_tokens=1, generated_tokens=9)


class Everything(Actor):
    """A manager and a Scheduler in one, whose nodes can't be reached as long as there is one of `deaf`.

    With `no_others` these nodes are all that there are.
    """

    def __init__(self, *deaf: str, runs: str = "", takes_s: float = 0.0, no_others: bool = False) -> None:
        self._deaf = list(deaf)
        self._nodes = set(deaf) if no_others else {*deaf, "n"}
        self.runs = runs
        self._takes_s = takes_s
        self.hurried: list[HurryPlacement] = []
        self.asked: list[PlaceModel] = []

    @handles(GetModel)
    async def get(self, message: GetModel) -> Any:
        return MODEL

    @handles(HurryPlacement)
    async def hurry(self, message: HurryPlacement) -> None:
        self.hurried.append(message)

    @handles(PlaceModel, concurrent=True)
    async def place(self, message: PlaceModel) -> Placement | RunsAlready:
        self.asked.append(message)
        if self._nodes <= set(message.not_on):
            raise DestinationFailed("there is no other node for it", param="to")
        runs = self.runs
        await asyncio.sleep(self._takes_s)
        if runs:
            return RunsAlready(
                model=message.model, instance_id=runs, node=NodeId("n"), worker=f"worker/{runs}", address=""
            )
        node = self._deaf[0] if self._deaf else "n"
        return Placement(
            placement_id="p", node=NodeId(node), manager="all", estimate_s=1.0, lease_s=1.0, reason="it is there"
        )

    @handles(StartInstance)
    async def start(self, message: StartInstance) -> AsyncIterator[InstanceStarted]:
        if self._deaf:
            raise NodeUnreachable(f"{self._deaf.pop(0)} is deaf")
        yield instance("i1")


async def routed(everything: Everything, *workers: tuple[str, Worker]) -> tuple[ActorSystem, Routes]:
    made, routes = virtual_system(), Routes()
    ref = await made.spawn(everything, "all")
    for name, worker in workers:
        await made.spawn(worker, f"worker/{name}")
    way, counts = SchedulerWay(made.clock, 0.0, ref), StartCounts()
    starting = Starting(ref, way, made.clock, counts, ask_timeout_s=5.0, placement_timeout_s=5.0, start_timeout_s=50.0)
    router = Router(
        way, starting, RequestLog(made.clock, 9), made.clock, routes=routes,
        room=WaitingRoom(made.clock, max_in_all=9, max_per_model=9), counts=counts, ask_timeout_s=5.0,
    )  # fmt: skip
    await made.spawn(router, "router")
    return made, routes


async def said(made: ActorSystem, asked: Generate | None = None) -> list[int]:
    items = [item async for item in made.ref("router").stream(asked or request())]
    assert isinstance(items[-1], Finished)
    return [token for item in items[:-1] for token in item.token_ids]


@virtually
async def test_an_answer_goes_on_behind_what_was_given_each_token_once() -> None:
    everything = Everything(runs="third")
    made, routes = await routed(everything, ("first", Worker(3)), ("second", Worker(2)), ("third", Worker()))
    routes.add(instance("first"))
    routes.add(instance("second"))
    assert await said(made) == list(range(9))
    assert [set(question.failed) for question in everything.asked] == [{"first", "second"}]
    await made.close()


@virtually
async def test_a_request_that_brings_tokens_of_its_answer_goes_on_behind_them_also_where_its_instance_dies() -> None:
    everything = Everything(runs="second")
    made, routes = await routed(everything, ("first", Worker(3)), ("second", Worker()))
    routes.add(instance("first"))
    asked = cast(Generate, msgspec.structs.replace(cast(Any, request()), generated=pack_uint32(range(2))))
    assert await said(made, asked) == list(range(2, 9))
    assert [question.failed for question in everything.asked] == [("first",)]
    timeline = await made.ref("router").ask(GetTimeline(request_id=asked.request_id), timeout_s=5.0)
    assert (timeline.outcome, timeline.generated_tokens) == ("finished", 9)
    await made.close()


@virtually
async def test_a_request_under_which_one_instance_too_many_dies_fails_as_the_last_one_did() -> None:
    made, routes = await routed(Everything(), *((f"w{k}", Worker(1)) for k in range(MAX_ATTEMPTS)))
    for k in range(MAX_ATTEMPTS):
        routes.add(instance(f"w{k}"))
    with pytest.raises(EngineDied):
        await said(made)
    await made.close()


@virtually
async def test_a_request_that_others_have_ended_goes_on_and_in_the_end_nobody_ends_it() -> None:
    names = [f"w{k}" for k in range(MAX_ATTEMPTS + 2)]
    workers = [Worker(1, dies_of=Preempted) for _ in names]
    made, routes = await routed(Everything(), *zip(names, workers, strict=True), ("i1", last := Worker()))
    for name in names:
        routes.add(instance(name))
    assert await said(made) == list(range(9))
    priorities = sorted(priority for worker in workers for priority in worker.priorities)
    assert priorities == [MOST_URGENT] * (len(names) - MAX_PREEMPTIONS) + [0] * MAX_PREEMPTIONS
    assert last.priorities == [MOST_URGENT]
    await made.close()


class Crowded(Everything):
    """Has no place for so many questions, each of which it keeps waiting for as long as may be."""

    def __init__(self, refuses: int) -> None:
        super().__init__()
        self._refuses = refuses

    @handles(PlaceModel, concurrent=True)
    async def place(self, message: PlaceModel) -> Placement | RunsAlready:
        if len(self.asked) < self._refuses:
            self.asked.append(message)
            await asyncio.sleep(message.timeout_s)
            raise NoCapacity("all of them are busy")
        return await super().place(message)


@virtually
async def test_a_request_that_others_have_ended_waits_for_a_place_as_long_as_its_client_does() -> None:
    everything = Crowded(refuses=4 * MAX_ATTEMPTS)
    made, routes = await routed(everything, ("first", Worker(1, dies_of=Preempted)), ("i1", Worker()))
    routes.add(instance("first"))
    assert await said(made) == list(range(9))
    assert len(everything.asked) == 4 * MAX_ATTEMPTS + 1
    # One that never had a place is told.
    routes.remove(ModelName("m"), "i1")
    everything.asked.clear()
    with pytest.raises(NoCapacity):
        await said(made, request("another"))
    assert len(everything.asked) == 1
    await made.close()


@virtually
async def test_who_joins_a_start_says_what_it_could_not_reach_and_is_not_given_that() -> None:
    everything = Everything(runs="second", takes_s=1.0)
    made, routes = await routed(everything, ("second", Worker(1)), ("third", Worker()))
    first = asyncio.ensure_future(said(made, request("first")))
    while not everything.asked:
        await asyncio.sleep(0.01)
    # One that comes meanwhile knows an instance, which fails it, and then joins the start that the first has begun.
    routes.add(instance("second"))
    joined = asyncio.ensure_future(said(made, request("joins")))
    while not everything.hurried:
        await asyncio.sleep(0.01)
    assert everything.hurried == [HurryPlacement(request_id=RequestId("first"), priority=0, failed=("second",))]
    await asyncio.sleep(0.5)
    everything.runs = "third"
    assert (await joined, await first) == (list(range(9)), list(range(9)))
    assert everything.asked[-1].failed == ("second",)
    await made.close()


@virtually
async def test_a_node_that_can_t_be_reached_is_not_asked_for_the_start_again() -> None:
    everything = Everything("deaf", "mute")
    made, _ = await routed(everything, ("i1", Worker()))
    assert await said(made) == list(range(9))
    assert [question.not_on for question in everything.asked] == [(), ("deaf",), ("deaf", "mute")]
    await made.close()


@virtually
async def test_an_instance_that_nobody_has_published_is_known_no_more_once_its_worker_ends() -> None:
    made, routes = await routed(Everything(), ("i1", Worker()))
    await said(made)
    assert routes.choose(MODEL.name, b"") is not None
    await made.stop("worker/i1")
    await turn()
    assert routes.choose(MODEL.name, b"") is None
    await made.close()


@virtually
async def test_where_every_node_could_not_do_it_a_moment_ago_each_may_be_asked_again() -> None:
    everything = Everything("deaf", "mute", no_others=True)
    made, _ = await routed(everything, ("i1", Worker()))
    assert await said(made) == list(range(9))
    assert [question.not_on for question in everything.asked] == [(), ("deaf",), ("deaf", "mute"), ()]
    await made.close()


@virtually
async def test_where_there_is_no_node_but_those_that_the_caller_rules_out_it_hears_so_at_once() -> None:
    everything = Everything("deaf", no_others=True)
    made, _ = await routed(everything)
    way = SchedulerWay(made.clock, 0.0, made.ref("all"))
    starting = Starting(
        made.ref("all"), way, made.clock, StartCounts(), ask_timeout_s=5.0, placement_timeout_s=5.0, start_timeout_s=5.0
    )
    with pytest.raises(DestinationFailed):
        await starting.start(made, request().request_id, MODEL.name, "", lambda: (0, ()), not_on=[NodeId("deaf")])
    assert len(everything.asked) == 1
    await made.close()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.binary(max_size=300))
def test_the_choice_does_not_hang_on_the_order_and_is_never_much_busier_than_the_least(
    loads: list[int], prompt: bytes
) -> None:
    candidates = [Candidate(f"i{k}", load) for k, load in enumerate(loads)]
    chosen = choose(candidates, prompt)
    assert choose(candidates[::-1], prompt) == chosen
    assert dict(candidates)[chosen] <= min(loads) + SLACK


def test_prompts_that_begin_alike_go_to_one_instance_and_others_spread() -> None:
    idle = [Candidate(f"i{k}", 0) for k in range(4)]
    system = b"You are helpful." * 30
    assert len({choose(idle, system + str(k).encode()) for k in range(50)}) == 1
    assert len({choose(idle, str(k).encode() + system) for k in range(50)}) == 4


def test_what_others_publish_comes_and_goes_and_what_failed_here_is_not_tried_again_for_it() -> None:
    routes, a, b = Routes(), instance("a"), instance("b")
    routes.publish([a], [])
    assert routes.choose(ModelName("m"), b"") is a
    routes.remove(ModelName("m"), "a")
    routes.publish([b], [])
    assert routes.choose(ModelName("m"), b"") is b
    routes.publish([], [b])
    assert routes.choose(ModelName("m"), b"") is None


@in_a_house
async def test_of_all_routes_only_what_comes_and_goes_is_told_also_of_one_that_is_written_again(house: House) -> None:
    node, told = await house.node("a").start(), list[tuple[list[str], list[str]]]()

    def hear(come: Sequence[InstanceStarted], gone: Sequence[InstanceStarted]) -> None:
        told.append(([one.instance_id for one in come], [one.instance_id for one in gone]))

    book = RouteBook(node.way, node.membership, house.clock, hear)
    book.start()
    first, second = (msgspec.msgpack.encode(instance(name)) for name in ("1", "2"))
    for operations in (
        [Put(f"{ROUTES}m/1", first)], [Put(f"{ROUTES}m/2", second), Put(f"{ROUTES}m/1", first)],
        [Put(f"{ROUTES}m/3", b"of another version")], [Delete(f"{ROUTES}m/1"), Delete(f"{ROUTES}m/3")],
    ):  # fmt: skip
        seen = len(told)
        await house.truth.commit([], operations)
        while len(told) == seen:
            await house.clock.sleep(0.01)
    assert told[-4:] == [(["1"], []), (["2"], []), ([], []), ([], ["1"])]
    await book.stop()
    await node.stop()


@in_a_house
async def test_a_route_whose_writing_had_no_answer_is_removed_with_its_instance(house: House) -> None:
    node = await house.node("a").start()
    book = RouteBook(node.way, node.membership, house.clock, None)
    book.start()
    node.way.cut = node.way.loses_answers = True
    node.way.patience_s = 0.5
    book.add(instance("1"))
    while not (await house.truth.list(ROUTES)).facts:
        await house.clock.sleep(0.01)
    book.remove(instance("1"))
    node.way.cut = node.way.loses_answers = False
    standing = node.membership.held()
    while (await house.truth.list(ROUTES)).facts:
        await house.clock.sleep(0.01)
        assert node.membership.held() == standing, "it went with the lease alone"
    await book.stop()
    await node.stop()


class Leader(Actor):
    """Answers with the name of its question's request."""

    @handles(PlaceModel)
    async def place(self, message: PlaceModel) -> str:
        return message.request_id


def question() -> PlaceModel:
    return PlaceModel(
        request_id=RequestId("q"), model=ModelName("m"), fingerprint="f", size_bytes=1, host_bytes=1, timeout_s=1.0
    )


@virtually
async def test_a_question_outlives_its_leader_and_goes_to_the_next_one_at_once() -> None:
    made = virtual_system()
    way = SchedulerWay(made.clock, 30.0, made.ref("gone"))
    asking = made.tasks.spawn(way.ask(question(), timeout_s=100.0), "ask")
    await asyncio.sleep(10.0)
    assert not asking.done()
    told: list[float] = []
    way.listen(lambda: told.append(now_s()))
    way.lead_to(None)
    await made.spawn(Leader(), "leader")
    way.lead_to(made.ref("leader"))
    changed_s = now_s()
    assert (await asking, now_s() - changed_s, told) == ("q", 0.0, [changed_s])
    await made.close()


@virtually
async def test_without_a_leader_a_question_fails_when_the_patience_is_over() -> None:
    made = virtual_system()
    way, begin_s = SchedulerWay(made.clock, 6.0, made.ref("gone")), now_s()
    with pytest.raises(NoLeader):
        await way.ask(question(), timeout_s=100.0)
    assert now_s() - begin_s == pytest.approx(6.0, abs=0.3)
    await made.close()
