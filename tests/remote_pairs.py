"""Systems over real sockets, an actor that does whatever a test asks of it, and a bare peer without a runtime."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
import uvloop
from loops import LoopFactory

from sllm_actor.errors import ModelNotFound, SllmError
from sllm_actor.runtime import Actor, ActorRef, ActorSystem, Blob, Ended, FreeForm, Limits, Security, handles
from sllm_actor.runtime.calls import CURRENT, current_trace
from sllm_actor.runtime.handshake import NONCE_BYTES, Hello
from sllm_actor.runtime.letters import Ask, LetterCodec, OpenStream
from sllm_actor.runtime.network import Endpoint
from sllm_actor.runtime.stats import LinkStats
from sllm_actor.runtime.wire import LETTERS, LETTERS_HEADER, Introduced, Opened, Role, Wire

FOR_EVER_S = 3600.0
# The end of a test's patience; nothing takes a tenth of it.
PATIENCE_S = 120.0
LOOPS = [pytest.param(asyncio.new_event_loop, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")]
KIB, MIB = 1024, 1024 * 1024
# What is slow by default is quick here: a dial after a loss, and what follows a silence.
QUICK = Limits(redial_first_s=0.002, redial_last_s=0.01)
SECRET = b"a secret of the test's own cluster"


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """Base of what the tests send."""


class Say(Message, frozen=True, tag="say"):
    """Answered by its text."""

    text: str


class Hold(Message, frozen=True, tag="hold"):
    """Answered once the gate is open."""

    note: str = ""


class HoldAside(Message, frozen=True, tag="hold_aside"):
    """Like `Hold`, by a concurrent handler."""


class OpenGate(Message, frozen=True, tag="open_gate"):
    """Lets go on what is held; served first."""


class Count(Message, frozen=True, tag="count"):
    """Answered by a stream of so many numbers, or of texts of `text_bytes` if that is not zero."""

    upto: int
    text_bytes: int = 0
    fails: bool = False


class Raise(Message, frozen=True, tag="raise"):
    """Answered by an error of the kind that `what` names in `RAISED`."""

    what: str


class Give(Message, frozen=True, tag="give"):
    """Answered by the value that `what` names in `GIVEN`."""

    what: str


class GiveStream(Message, frozen=True, tag="give_stream"):
    """Answered by a stream of one good item and the value that `what` names."""

    what: str


class Carry(Message, frozen=True, tag="carry"):
    """Answered by `Carried`, with the same bytes."""

    blob: Blob
    note: str = ""


class Carried(Message, frozen=True, tag="carried"):
    """What came."""

    blob: Blob
    note: str


class BlobStream(Message, frozen=True, tag="blob_stream"):
    """Answered by a stream of `Carried`."""

    count: int
    size_bytes: int


class Loose(Message, frozen=True, tag="loose"):
    """Answered by the same again."""

    data: FreeForm


class Relay(Message, frozen=True, tag="relay"):
    """Passed along `hops`; who is last does what `what` says: `say`, `hold`, `trace` or `left_s`."""

    hops: tuple[ActorRef, ...]
    what: str
    timeout_s: float = FOR_EVER_S


class Introduce(Message, frozen=True, tag="introduce"):
    """Answered by `Acquainted`, with the same reference."""

    ref: ActorRef


class Acquainted(Message, frozen=True, tag="acquainted"):
    """A reference in an answer."""

    ref: ActorRef
    was_local: bool


class WatchIt(Message, frozen=True, tag="watch_it"):
    """Answered by True once the actor watches `ref`."""

    ref: ActorRef


class Crash(Message, frozen=True, tag="crash"):
    """Handled by a bug."""


class WhoAreYou(Message, frozen=True, tag="who_are_you"):
    """Answered by the process id."""


class Unheard(Message, frozen=True, tag="unheard"):
    """Handled by nobody."""


class NotInTheTable(Message, frozen=True, tag="not_in_the_table"):
    """Known to no system."""


TABLE = (
    Say, Hold, HoldAside, OpenGate, Count, Raise, Give, GiveStream, Carry, Carried, BlobStream, Loose, Relay, Introduce,
    Acquainted, WatchIt, Crash, WhoAreYou, Unheard,
)  # fmt: skip


class Undeclared(msgspec.Struct):
    """No message at all."""

    n: int = 0


RAISED: dict[str, Callable[[], BaseException]] = {
    "typed": lambda: ModelNotFound("it is not here", param="model", retry_after_s=2.5),
    "bug": lambda: ZeroDivisionError("a secret of the handler"),
    "cancelled": asyncio.CancelledError,
    "undecodable path": lambda: ModelNotFound(f"no file {os.fsdecode(bytes([255]))}"),
    "long param": lambda: ModelNotFound("too much", param="p" * 3 * MIB),
    "param that is no text": lambda: ModelNotFound("a wrong type", param=3),  # type: ignore[arg-type]
}
GIVEN: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "true": lambda: True,
    "int": lambda: -5,
    "float": lambda: 0.5,
    "str": lambda: "text",
    "bytes": lambda: b"bytes",
    "message": lambda: Say(text="a message"),
    "tuple": lambda: (1, "two", None, Say(text="three")),
    "empty tuple": lambda: (),
    "set": lambda: {1, 2},
    "list": lambda: [1, 2],
    "undeclared": Undeclared,
    "not in the table": NotInTheTable,
    "a tuple with a set": lambda: (1, {2}),
    "int of 70 bits": lambda: 2**70,
    "undecodable text": lambda: os.fsdecode(bytes([255])),
    "message with a wrong field": lambda: Say(text=5),  # type: ignore[arg-type]
    "blob with holes": lambda: Carried(blob=Blob(memoryview(b"abcdefgh")[::2]), note=""),
    "blob of no bytes": lambda: Carried(blob=Blob(None), note=""),  # type: ignore[arg-type]
    "too long": lambda: "x" * 3 * MIB,
}
CAN_TRAVEL = ("none", "true", "int", "float", "str", "message", "tuple", "empty tuple")
CAN_NOT_TRAVEL = (
    "set", "list", "undeclared", "not in the table", "a tuple with a set", "int of 70 bits", "undecodable text",
    "message with a wrong field", "blob with holes", "blob of no bytes", "too long",
)  # fmt: skip


class Everyman(Actor):
    """Does whatever a test asks, and remembers what reached it."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.made = 0
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.ends: asyncio.Queue[Ended] = asyncio.Queue()

    @handles(Say)
    async def say(self, message: Say) -> str:
        self.seen.append(message.text)
        return message.text

    @handles(Hold)
    async def hold(self, message: Hold) -> str:
        self.seen.append(f"hold {message.note}")
        return await self._held()

    @handles(HoldAside, concurrent=True)
    async def hold_aside(self, _: HoldAside) -> str:
        return await self._held()

    async def _held(self) -> str:
        self.begun.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return "held"

    @handles(OpenGate, priority=True)
    async def open_gate(self, _: OpenGate) -> None:
        self.gate.set()

    @handles(Count)
    async def count(self, message: Count) -> AsyncGenerator[int | str, None]:
        self.begun.set()
        try:
            for number in range(message.upto):
                self.made += 1
                yield str(number).rjust(message.text_bytes, ".") if message.text_bytes else number
            if message.fails:
                raise ModelNotFound("no more", param="model")
        finally:
            self.cancelled.set()

    @handles(Raise)
    async def fail(self, message: Raise) -> None:
        raise RAISED[message.what]()

    @handles(Give)
    async def give(self, message: Give) -> Any:
        return GIVEN[message.what]()

    @handles(GiveStream)
    async def give_stream(self, message: GiveStream) -> AsyncGenerator[Any, None]:
        yield "good"
        yield GIVEN[message.what]()

    @handles(Carry)
    async def carry(self, message: Carry) -> Carried:
        self.seen.append(f"{len(message.blob)} bytes {message.note}")
        return Carried(blob=message.blob, note=message.note)

    @handles(BlobStream)
    async def blob_stream(self, message: BlobStream) -> AsyncGenerator[Carried, None]:
        for number in range(message.count):
            yield Carried(blob=Blob(bytes([number % 256]) * message.size_bytes), note=str(number))

    @handles(Loose)
    async def loose(self, message: Loose) -> Loose:
        return message

    @handles(Relay)
    async def relay(self, message: Relay) -> Any:
        if message.hops:
            onward = Relay(hops=message.hops[1:], what=message.what, timeout_s=message.timeout_s)
            return await message.hops[0].ask(onward, timeout_s=message.timeout_s)
        if message.what == "hold":
            return await self._held()
        if message.what == "trace":
            trace = current_trace()
            return trace.hex() if trace is not None else None
        if message.what == "left_s":
            return CURRENT.get()[3] - self.context.system.now_s()
        self.seen.append(message.what)
        return message.what

    @handles(Introduce)
    async def introduce(self, message: Introduce) -> Acquainted:
        return Acquainted(ref=message.ref, was_local=message.ref.is_local)

    @handles(WatchIt)
    async def watch_it(self, message: WatchIt) -> bool:
        self.context.watch(message.ref)
        return True

    @handles(Ended)
    async def gone(self, ended: Ended) -> None:
        self.ends.put_nowait(ended)

    @handles(Crash)
    async def crash(self, _: Crash) -> None:
        raise ZeroDivisionError

    @handles(WhoAreYou)
    async def who_are_you(self, _: WhoAreYou) -> int:
        return os.getpid()


def system(node: str, limits: Limits = QUICK, security: Security | None = None) -> ActorSystem:
    """Make a system that knows the messages of this module."""
    return ActorSystem(node_id=node, messages=TABLE, limits=limits, security=security)


@asynccontextmanager
async def node(
    name: str, limits: Limits = QUICK, *, listen: str = "tcp://127.0.0.1:0", security: Security | None = None
) -> AsyncIterator[ActorSystem]:
    """Run a system that listens, unless `listen` is empty."""
    running = system(name, limits, security)
    try:
        if listen:
            await running.listen(listen)
        yield running
    finally:
        await running.close()


class Pair:
    """Node `a`, and an actor `man` on node `b` with the reference that `a` has to it; for `local`, both are one."""

    def __init__(self, a: ActorSystem, b: ActorSystem, man: Everyman, ref: ActorRef) -> None:
        self.a = a
        self.b = b
        self.man = man
        self.ref = ref


PLACES = ("local", "tcp", "unix")


@asynccontextmanager
async def pair(
    place: str = "tcp", a_limits: Limits = QUICK, b_limits: Limits = QUICK, *, security: Security | None = None
) -> AsyncIterator[Pair]:
    """Run two nodes; `a` asks and `b` answers."""
    man = Everyman()
    if place == "local":
        async with node("a", a_limits, listen="") as both:
            yield Pair(both, both, man, await both.spawn(man, "man"))
        return
    with tempfile.TemporaryDirectory() as folder:
        where = f"unix://{folder}/b.sock" if place == "unix" else "tcp://127.0.0.1:0"
        async with (
            node("b", b_limits, listen=where, security=security) as b,
            node("a", a_limits, security=security) as a,
        ):
            await b.spawn(man, "man")
            yield Pair(a, b, man, a.ref("man", str(b.address)))


def link_of(system: ActorSystem, node: str) -> LinkStats:
    """Give a system's counts of one peer."""
    return next(link for link in system.stats().links if link.node == node)


# What is left behind.


def open_files() -> dict[str, str]:
    """List this process's descriptors: number to what it is."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    # libuv keeps one in reserve, to refuse a connection with when there are no more.
    return {name: kind for name, kind in found.items() if kind != "/dev/null"}


async def until(condition: Callable[[], bool], what: str = "it") -> None:
    """Turn the loop until a condition holds; who waits in vain hears of it."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + PATIENCE_S / 4
    turns = 0
    while not condition():
        turns += 1
        assert turns < 100 or loop.time() < deadline_s, f"waited in vain until {what} came true"
        # The kernel and other processes need the processor, too.
        await asyncio.sleep(0 if turns < 100 else 0.002)


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Check that what ran inside left no task and no descriptor open."""
    tasks, files = asyncio.all_tasks(), open_files()
    yield

    def left() -> list[object]:
        new_files = [f"{name}: {kind}" for name, kind in open_files().items() if name not in files]
        return [*(asyncio.all_tasks() - tasks), *new_files]

    with suppress(AssertionError):
        await until(lambda: not left())
    remains = left()
    assert not remains, remains


# Running tests.


def run_on(loop_factory: LoopFactory, body: Coroutine[Any, Any, None]) -> None:
    """Run to the end on a new loop, and check that nothing is left."""

    async def checked() -> None:
        async with nothing_left():
            await asyncio.wait_for(body, PATIENCE_S)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(checked())


def on_both_loops(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[LoopFactory], None]:
    """Run a test on both loops, and check that nothing is left."""

    @pytest.mark.parametrize("loop_factory", LOOPS)
    def run(loop_factory: LoopFactory) -> None:
        run_on(loop_factory, test())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


def everywhere(test: Callable[[Pair], Coroutine[Any, Any, None]]) -> Callable[[LoopFactory, str], None]:
    """Run a test with a local reference, one over TCP, and one over a Unix socket, on both loops."""

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("loop_factory", LOOPS)
    def run(loop_factory: LoopFactory, place: str) -> None:
        async def body() -> None:
            async with pair(place) as both:
                await test(both)

        run_on(loop_factory, body())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


async def outcome(work: Awaitable[Any]) -> Any:
    """Give what an ask brings, be it an answer or a typed error."""
    try:
        return await work
    except SllmError as error:
        return error


# A peer that is none.

RAW_UID = 77


class BarePeer:
    """One connection that speaks the protocol by hand, and therefore can break it."""

    def __init__(self, sock: socket.socket, wire: Wire, codec: LetterCodec) -> None:
        self.sock = sock
        self._wire = wire
        self._codec = codec
        self._heard: list[Any] = []

    @classmethod
    async def dial(cls, address: str, name: str = "bare", *, uid: int = RAW_UID, **hello: Any) -> BarePeer:
        """Connect to a node and shake hands."""
        sock = await dialled(address)
        peer = cls.over(sock, Role.DIALER, name, uid=uid, **hello)
        await peer._shake(Opened)
        return peer

    @classmethod
    async def answer(cls, listener: socket.socket, name: str = "bare", *, uid: int = RAW_UID, **hello: Any) -> BarePeer:
        """Take a connection and shake hands."""
        sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        sock.setblocking(False)
        peer = cls.over(sock, Role.ACCEPTOR, name, uid=uid, **hello)
        await peer._shake(Introduced)
        peer._wire.admit()
        await peer.send_bytes(peer._wire.take_output())
        return peer

    @classmethod
    def over(
        cls,
        sock: socket.socket,
        role: Role = Role.DIALER,
        name: str = "bare",
        *,
        uid: int = RAW_UID,
        secret: bytes = b"",
        **changes: Any,
    ) -> BarePeer:
        """Speak over a connection; `changes` are to the hello."""
        fields: dict[str, Any] = {
            "version_min": 1,
            "version_max": 1,
            "node": name,
            "uid": uid,
            "nonce": bytes(NONCE_BYTES),
            "endpoint": "",
            "secured": False,
            "links": 0,
            "max_frame_bytes": MIB,
            "max_blob_bytes": 64 * MIB,
        }
        codec = LetterCodec(TABLE, lambda ref: ref, lambda raw: raw, ActorRef)
        return cls(sock, Wire(role, Hello(**(fields | changes)), codec, Limits(), secret), codec)

    async def say_hello(self) -> None:
        """Say hello and wait for the other's, no more."""
        await self.send_bytes(self._wire.take_output())
        while self._wire.peer is None:
            await self._receive()

    async def _shake(self, until_event: type) -> None:
        try:
            while True:
                await self.send_bytes(self._wire.take_output())
                events = await self._receive()
                if any(isinstance(event, until_event) for event in events):
                    self._heard += [event for event in events if not isinstance(event, until_event)]
                    return
        except BaseException:
            self.close()
            raise

    async def _receive(self) -> Sequence[Any]:
        """Read once; raises `HandshakeRefused` or `ConnectionError` when there is nothing more."""
        came = await asyncio.get_running_loop().sock_recv(self.sock, 64 * KIB)
        if not came:
            raise ConnectionResetError("the end")
        events: list[Any] = []
        while came:
            buffer = self._wire.buffer()
            part, came = came[: len(buffer)], came[len(buffer) :]
            buffer[: len(part)] = part
            events += self._wire.received(len(part))
        return events

    async def next_letter(self, kind: type) -> Any:
        """Give the next letter of this kind; heartbeats and others are passed over."""
        while True:
            while self._heard:
                letter = self._heard.pop(0)
                if isinstance(letter, kind):
                    return letter
            self._heard += await self._receive()

    async def send(self, *letters: object) -> None:
        """Send letters in one frame."""
        written = [self._codec.encode(letter).data for letter in letters]
        size = sum(map(len, written))
        await self.send_bytes(LETTERS_HEADER.pack(size + 3, LETTERS, len(written)) + b"".join(written))

    async def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def closed_by_peer(self) -> None:
        """Read on until the other side has closed."""
        with suppress(ConnectionError):
            while await asyncio.get_running_loop().sock_recv(self.sock, 64 * KIB):
                pass

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()


def asking(call: int, message: Message, target: str = "man") -> object:
    """Make the letter of an ask."""
    return Ask(call=call, target=target, ttl_s=FOR_EVER_S, trace=None, body=message)


def opening(call: int, message: Message, *, credit: int = 4, window_bytes: int = MIB, target: str = "man") -> object:
    """Make the letter that opens a stream."""
    return OpenStream(call=call, target=target, trace=None, body=message, credit=credit, window_bytes=window_bytes)


async def dialled(address: str) -> socket.socket:
    """Open a plain connection to a node's address."""
    where = Endpoint.parse(address.partition("@")[2])
    sock = socket.socket(socket.AF_UNIX if where.path else socket.AF_INET)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, where.path or (where.host, where.port))
    except BaseException:
        sock.close()
        raise
    return sock


def listening(name: str = "bare") -> tuple[socket.socket, str]:
    """Listen on a free port; gives the socket and the address under which a node can dial it."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    return listener, f"{name}@tcp://127.0.0.1:{listener.getsockname()[1]}"
