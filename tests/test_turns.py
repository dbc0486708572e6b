"""The turns of the loop: a bounded share of each, in order, and events that leave together."""

from __future__ import annotations

import asyncio
import json
import re
from typing import cast

from sllm_actor.frontend.turns import Share, Turns
from sllm_actor.testing.node_process import NodeProcess


async def turns_taken(share: Share, units: list[int]) -> list[int]:
    """Let one task for each take its units; tell in which turn of the loop each had them, from 0 on."""
    turn = 0
    taken: dict[int, int] = {}

    async def take(number: int) -> None:
        await share.take(units[number])
        taken[number] = turn

    async with asyncio.TaskGroup() as group:
        for number in range(len(units)):
            group.create_task(take(number))
        while len(taken) < len(units):
            await asyncio.sleep(0)
            turn += 1
    assert list(taken) == list(range(len(units))), "they go in order"
    return [taken[number] for number in range(len(units))]


async def test_as_much_as_a_share_has_is_done_in_one_turn_of_the_loop_and_the_rest_in_later_ones() -> None:
    turns = await turns_taken(Share(3), [1] * 10)
    assert [turns.count(turn) for turn in sorted(set(turns))] == [3, 3, 3, 1]


async def test_what_takes_more_units_than_a_share_has_gets_a_turn_all_the_same() -> None:
    turns = await turns_taken(Share(3), [9, 9, 1, 1, 9, 1])
    assert [turns.count(turn) for turn in sorted(set(turns))] == [1, 1, 3, 1]


async def test_who_has_given_up_waiting_takes_nothing() -> None:
    share = Share(1)
    first, impatient, patient = (asyncio.ensure_future(share.take()) for _ in range(3))
    await asyncio.sleep(0)
    assert first.done()
    impatient.cancel()
    await patient
    assert impatient.cancelled()
    for _ in range(3):
        await asyncio.sleep(0)
    assert share.take_now(), "nobody waits any more"
    assert not share.take_now()


async def test_first_tokens_do_not_wait_for_the_next_ones_of_others() -> None:
    turns = Turns()
    while turns.next.take_now():
        pass
    assert turns.first.take_now()


def chunks_of(node: NodeProcess, request: bytes) -> list[bytes]:
    """Give the body of an answer in the chunks that it came in, each of which was written as one."""
    connection = node.connect()
    connection.connect()
    with connection.sock as sock:
        sock.sendall(request)
        raw = b""
        while not raw.endswith(b"\r\n0\r\n\r\n"):
            data = sock.recv(65536)
            assert data, raw
            raw += data
    chunks, rest = [], raw.partition(b"\r\n\r\n")[2]
    while (size := int(cast("re.Match[bytes]", re.match(rb"([0-9a-f]+)\r\n", rest))[1], 16)) > 0:
        begin = rest.index(b"\r\n") + 2
        chunks.append(rest[begin : begin + size])
        rest = rest[begin + size + 2 :]
    return chunks


def test_what_is_known_at_one_time_leaves_in_one_write(node: NodeProcess) -> None:
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps({"model": "demo", "messages": messages, **options}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = chunks_of(node, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    chunks = [chunk for chunk in chunks if not chunk.startswith(b":")]
    first, last = chunks[0].split(b"\n\n"), chunks[-1].split(b"\n\n")
    assert b'"role":"assistant"' in first[0]
    assert b'"content":"' in first[1], "the first text goes with the role"
    assert last[-2:] == [b"data: [DONE]", b""]
    assert b'"completion_tokens":' in last[-3]
    assert b'"finish_reason":"stop"' in last[-4], "the end goes with the last event"
