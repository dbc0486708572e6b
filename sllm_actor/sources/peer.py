"""Another node that holds the model, as a source: its PeerServer gives ranges of files as payloads beside messages.

Knows nothing of the tier that they come from there.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from contextlib import aclosing, contextmanager

from sllm_actor.domain import check_model_name, check_node_id
from sllm_actor.domain.sentence_modules import wrong_below
from sllm_actor.errors import (
    ConfigInvalid,
    HandshakeRefused,
    InvalidInput,
    InvalidName,
    LinkDuplicate,
    NodeDown,
    ProtocolViolation,
    SllmError,
    SourceError,
    SourceInvalid,
    SourceMissing,
    SourceRefused,
    SourceUnreachable,
    SourceViolation,
)
from sllm_actor.runtime import ActorSystem, NodeAddress
from sllm_actor.sources.peer_messages import (
    MAX_RANGE_BYTES,
    ListPeerFiles,
    PeerFile,
    PeerModel,
    PeerRange,
    ReadPeerRange,
)
from sllm_actor.sources.source import SourceFile, SourceOptions, belongs_below
from sllm_actor.sources.under_way import UnderWay
from sllm_actor.units import MIB

log = logging.getLogger(__name__)

PEER_ACTOR = "peer"
# Small, so that one that stalls is noticed soon, a copy does not hold up the loop, and buffers are used again.
PIECE_BYTES = MIB
_URL = re.compile(r"sllm://([^@/]{1,255})@([^@/]{1,255})/(.{1,256})", re.IGNORECASE | re.ASCII)
assert PIECE_BYTES <= MAX_RANGE_BYTES


class PeerSource:
    """One model on one other node. The connection is the system's, and stays when this is closed."""

    parallel = 4

    def __init__(self, system: ActorSystem, address: NodeAddress, model: str, options: SourceOptions) -> None:
        self._ref = system.ref(PEER_ACTOR, at=address)
        self._model = model
        self._options = options
        self.url = f"sllm://{address.node}@{address.endpoint.removeprefix('tcp://')}/{model}"
        self.model_id = ""
        self._under_way = UnderWay(self.url)

    @classmethod
    def from_url(cls, system: ActorSystem, url: str, options: SourceOptions) -> PeerSource:
        """Make the source that `sllm://NODE@HOST:PORT/MODEL` names.

        Raises:
            SourceInvalid: it names none.
        """
        address, model = parse_peer_url(url)
        source = cls(system, address, model, options)
        peer = source._ref.peer
        if peer is not None and peer.link is not None and peer.endpoint not in ("", address.endpoint):
            log.warning("%s: %s is connected at %s, and read from there", source.url, address.node, peer.endpoint)
        return source

    async def files(self) -> tuple[SourceFile, ...]:
        """List the files that the node has of the model, and learn `model_id`; see `Source.files`."""
        return await self._under_way.run(self._list())

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        """Fill `into`; see `Source.read`."""
        assert offset >= 0 and offset + len(into) <= file.size_bytes, "a range beyond the file"
        await self._under_way.run(self._read(file, offset, into))

    async def close(self) -> None:
        """End what is being read."""
        await self._under_way.close()

    async def _list(self) -> tuple[SourceFile, ...]:
        timeout_s = self._options.connect_timeout_s + self._options.stall_timeout_s
        model: PeerModel | None = None
        found: list[SourceFile] = []
        with self._told():
            async with (
                asyncio.timeout(timeout_s),
                aclosing(self._ref.stream(ListPeerFiles(model=self._model))) as items,
            ):
                async for item in items:
                    if model is None and isinstance(item, PeerModel):
                        model = item
                    elif model is not None and isinstance(item, PeerFile) and len(found) < model.files:
                        found.append(self._checked(item))
                    else:
                        raise SourceViolation(f"an answer to a listing that is none: {type(item).__name__}")
            if model is None or len(found) != model.files:
                raise SourceViolation(f"the listing ended after {len(found)} files")
            if not found:
                raise SourceMissing("it has no file of a checkpoint", param="source")
            if len({file.name for file in found}) != len(found):
                raise SourceViolation("it lists a file twice")
            if (wrong := wrong_below([file.name for file in found])) is not None:
                raise SourceInvalid(f"it lists {wrong!r}, which belongs to no checkpoint", param="source")
        self.model_id = model.model_id
        return tuple(sorted(found, key=lambda file: file.name))

    def _checked(self, item: PeerFile) -> SourceFile:
        if not belongs_below(item.name):
            raise SourceInvalid(f"it lists {item.name!r}, which belongs to no checkpoint", param="source")
        return SourceFile(item.name, item.size_bytes, item.validator)

    async def _read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        for begin in range(0, len(into), PIECE_BYTES):
            piece = into[begin : begin + PIECE_BYTES]
            question = ReadPeerRange(
                model=self._model,
                name=file.name,
                size_bytes=file.size_bytes,
                validator=file.validator,
                offset=offset + begin,
                length=len(piece),
            )
            with self._told(begin):
                answer = await self._ref.ask(question, timeout_s=self._options.stall_timeout_s)
                if not isinstance(answer, PeerRange) or len(answer.data) != len(piece):
                    raise SourceViolation(f"{file.name}: not the {len(piece)} bytes from {offset + begin} on")
            piece[:] = memoryview(answer.data.data).cast("B")

    @contextmanager
    def _told(self, came_bytes: int = 0) -> Iterator[None]:
        """Say whatever goes wrong between two nodes in the words of a source."""
        try:
            yield
        except TimeoutError:
            silent = SourceUnreachable(f"{self.url} did not answer in time")
            silent.came_bytes = came_bytes
            raise silent from None
        except SllmError as error:
            told = _kind_of(error)(f"{self.url}: {error.message}", param=error.param, retry_after_s=error.retry_after_s)
            if isinstance(told, SourceError):
                told.came_bytes = came_bytes
            raise told from error


def _kind_of(error: SllmError) -> type[SllmError]:
    match error:
        case SourceError() | SourceMissing():
            return type(error)
        case InvalidInput():
            return SourceInvalid
        # Two nodes that dialled each other at once, and one that was given up on: another attempt may succeed.
        case LinkDuplicate() | NodeDown():
            return SourceUnreachable
        case HandshakeRefused():
            return SourceRefused
        case ProtocolViolation():
            return SourceViolation
        case _:
            return SourceUnreachable


def parse_peer_url(url: str) -> tuple[NodeAddress, str]:
    """Read `sllm://NODE@HOST:PORT/MODEL`: a node's address, and the name of a model there.

    Raises:
        SourceInvalid: it is none.
    """
    match = _URL.fullmatch(url)
    if match is None:
        # What was written may hold a password, so it is not repeated.
        raise SourceInvalid("that is no peer: write sllm://NODE@HOST:PORT/MODEL", param="source")
    node, endpoint, model = match.groups()
    try:
        address = NodeAddress.parse(f"{check_node_id(node)}@tcp://{endpoint.lower()}")
        return address, check_model_name(model)
    except (ConfigInvalid, InvalidName):
        raise SourceInvalid(
            "that is no peer: in sllm://NODE@HOST:PORT/MODEL, the node id, the port or the model's name can't be",
            param="source",
        ) from None
