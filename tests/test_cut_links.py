"""A short conversation of two nodes, cut at every byte of it in each direction: nothing hangs, nothing is left."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from cutting_proxy import CuttingProxy, How, Way
from loops import LoopFactory
from remote_pairs import (
    FOR_EVER_S,
    LOOPS,
    QUICK,
    Carry,
    Count,
    Everyman,
    Say,
    link_of,
    node,
    nothing_left,
    outcome,
    run_on,
    system,
)

from sllm_actor.errors import NodeUnreachable
from sllm_actor.runtime import ActorRef, ActorSystem, Blob

# Of one chunk, as every blob below 64 KiB. Each byte of it costs a cut, and all within it are alike: no more of them.
BLOB = Blob(b"b" * 300)


async def conversation(ref: ActorRef) -> list[object]:
    """Ask, stream, carry a blob, tell, ask: everything at once, and what came of each."""

    async def stream() -> object:
        async with aclosing(ref.stream(Count(upto=5))) as items:
            return [item async for item in items]

    ref.tell(Say(text="told"))
    works = (
        ref.ask(Say(text="first"), timeout_s=FOR_EVER_S),
        stream(),
        ref.ask(Carry(blob=BLOB), timeout_s=FOR_EVER_S),
        ref.ask(Say(text="last"), timeout_s=FOR_EVER_S),
    )
    return list(await asyncio.gather(*(outcome(work) for work in works)))


def check(results: list[object]) -> int:
    """Check that each is right or a typed error; gives how many failed."""
    first, stream, carried, last = results
    right: list[bool] = [
        first == "first",
        stream == [0, 1, 2, 3, 4],
        getattr(carried, "blob", None) == BLOB,
        last == "last",
    ]
    for result, is_right in zip(results, right, strict=True):
        assert is_right or type(result) is NodeUnreachable, result
    return right.count(False)


async def lengths(address: str) -> dict[Way, int]:
    """Measure the whole conversation."""
    name, _, endpoint = address.partition("@")
    port = int(endpoint.rpartition(":")[2])
    async with CuttingProxy("127.0.0.1", port) as proxy:
        a = system("a")
        assert check(await conversation(a.ref("man", f"{name}@tcp://127.0.0.1:{proxy.port}"))) == 0
        carried = dict(proxy.carried)
        await a.close()
    return carried


async def cut_everywhere(b: ActorSystem, man: Everyman, way: Way, how: How, offsets: range) -> None:
    port = int(b.address.endpoint.rpartition(":")[2])
    async with CuttingProxy("127.0.0.1", port) as proxy:
        for offset in offsets:
            # A new node each time: the cut falls into its handshake, too.
            a = system(f"a{offset}", QUICK)
            ref = a.ref("man", f"b@tcp://127.0.0.1:{proxy.port}")
            proxy.arm(way, offset, how)
            failed = check(await conversation(ref))
            answer = None
            while answer != "back":
                answer = await outcome(ref.ask(Say(text="back"), timeout_s=FOR_EVER_S))
                if answer != "back":
                    assert type(answer) is NodeUnreachable
                    await asyncio.sleep(0.0005)
            assert man.seen.count("told") <= 1
            assert man.seen.count("first") <= 1
            man.seen.clear()
            link = link_of(a, "b")
            assert link.waiting_asks == 0
            assert failed == 0 or proxy.was_cut
            await a.close()


@pytest.mark.parametrize("way", Way, ids=lambda way: way.value)
@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_conversation_that_is_cut_anywhere_ends_and_the_next_one_goes_well(
    loop_factory: LoopFactory, way: Way
) -> None:
    async def body() -> None:
        async with node("b") as b:
            man = Everyman()
            await b.spawn(man, "man")
            whole = (await lengths(str(b.address)))[way]
            man.seen.clear()
            async with nothing_left():
                # Every byte is cut by an end or by a reset; the other loop cuts it the other way.
                async def cut(how: How, begin: int) -> None:
                    await cut_everywhere(b, man, way, how, range(begin, whole, 2))

                resets_even = loop_factory is asyncio.new_event_loop
                await cut(How.RST if resets_even else How.FIN, 0)
                await cut(How.FIN if resets_even else How.RST, 1)
            assert not [link for link in b.stats().links if link.open or link.running_calls]

    run_on(loop_factory, body())
