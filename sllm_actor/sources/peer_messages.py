"""What a node that wants a model and one that holds it say to each other.

Among the sources and not with the other messages, because its payload is a type of the runtime's, which messages do not
know. Every field is bounded where it is decoded.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from sllm_actor.messages.declare import message
from sllm_actor.runtime import Blob
from sllm_actor.sources.source import MAX_FILES, MAX_SIZE_BYTES
from sllm_actor.units import MIB

MAX_RANGE_BYTES = 16 * MIB

_Model = Annotated[str, Meta(min_length=1, max_length=256)]
_Name = Annotated[str, Meta(min_length=1, max_length=255)]
_Validator = Annotated[str, Meta(max_length=256)]
_Size = Annotated[int, Meta(ge=0, le=MAX_SIZE_BYTES)]


@message("peers.list")
class ListPeerFiles:
    """Answered by a stream of one `PeerModel` and then a `PeerFile` for each file, by name.

    Fails with `SourceMissing` where the node does not hold the model, `SourceInvalid` where it is no checkpoint.
    """

    model: _Model


@message("peers.model")
class PeerModel:
    """A model that a node holds; `model_id` is the digest of its content, empty where nobody has computed it."""

    model_id: Annotated[str, Meta(max_length=128)]
    files: Annotated[int, Meta(ge=0, le=MAX_FILES)]


@message("peers.file")
class PeerFile:
    """One file of it, as `SourceFile` has it."""

    name: _Name
    size_bytes: _Size
    validator: _Validator


@message("peers.read")
class ReadPeerRange:
    """Read `length` bytes, at most `MAX_RANGE_BYTES`, of a file that was listed.

    Answered by `PeerRange`, or fails with `SourceMissing`, `SourceChanged`, `SourceInvalid` (a range that is too long
    or goes beyond the file), or `Overloaded` where too many reads are under way.
    """

    model: _Model
    name: _Name
    size_bytes: _Size
    validator: _Validator
    offset: _Size
    length: Annotated[int, Meta(ge=0, le=MAX_SIZE_BYTES)]


@message("peers.range")
class PeerRange:
    """The bytes of a range, all of them."""

    data: Blob


PEER_MESSAGES = (ListPeerFiles, PeerModel, PeerFile, ReadPeerRange, PeerRange)
