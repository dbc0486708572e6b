"""What two nodes say to each other once they have shaken hands, and how it is written.

A letter is a MessagePack array whose first element is its kind. Its body is a message of the system's type table,
which is decoded straight into its typed struct: what is unknown is refused before anything is built.
`docs/protocol.md` describes every byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, Union

import msgspec

from sllm_actor.errors import FrameInvalid
from sllm_actor.runtime.values import Blob, FreeForm

B = TypeVar("B")
V = TypeVar("V")

MAX_BLOBS = 64
MAX_TRACE_BYTES = 64
Trace = Annotated[bytes, msgspec.Meta(max_length=MAX_TRACE_BYTES)] | None
# What an encoder raises on a value that it can't write.
WRITE_ERRORS = (TypeError, ValueError, OverflowError, RecursionError)


class Ask(msgspec.Struct, Generic[B], array_like=True, gc=False, tag=1, forbid_unknown_fields=True):
    """Handle `body` and answer. `ttl_s` is what is left of the caller's time."""

    call: int
    target: str
    ttl_s: Annotated[float, msgspec.Meta(ge=0)]
    trace: Trace
    body: B


class OpenStream(msgspec.Struct, Generic[B], array_like=True, gc=False, tag=2, forbid_unknown_fields=True):
    """Handle `body` and send items; at most `credit` items or `window_bytes` may be on their way or unread."""

    call: int
    target: str
    trace: Trace
    body: B
    credit: int
    window_bytes: int


class Tell(msgspec.Struct, Generic[B], array_like=True, gc=False, tag=3, forbid_unknown_fields=True):
    """Handle `body`; no answer."""

    target: str
    trace: Trace
    body: B


class Answer(msgspec.Struct, Generic[V], array_like=True, gc=False, tag=4, forbid_unknown_fields=True):
    """The answer to a call, or the end of a stream."""

    call: int
    value: V


class Failure(msgspec.Struct, array_like=True, gc=False, tag=5, forbid_unknown_fields=True):
    """Why a call has no answer: an error by its code."""

    call: int
    code: str
    text: str
    param: str | None
    retry_after_s: float | None


class Item(msgspec.Struct, Generic[V], array_like=True, gc=False, tag=6, forbid_unknown_fields=True):
    """An item of a stream."""

    call: int
    value: V


class Mark(msgspec.Struct, array_like=True, gc=False, tag=7, forbid_unknown_fields=True):
    """Follows an item of a stream: tell by `Credit` when everything up to here has been read."""

    call: int


class Credit(msgspec.Struct, array_like=True, gc=False, tag=8, forbid_unknown_fields=True):
    """The reader of a stream has taken the `items` before a mark, since the mark before."""

    call: int
    items: int


class Cancel(msgspec.Struct, array_like=True, gc=False, tag=9, forbid_unknown_fields=True):
    """The caller has gone; nothing more is to be said of this call."""

    call: int


class Watch(msgspec.Struct, array_like=True, gc=False, tag=10, forbid_unknown_fields=True):
    """Answer this call with the reason, a string, when `target` has ended."""

    call: int
    target: str


class Beat(msgspec.Struct, array_like=True, gc=False, tag=11, forbid_unknown_fields=True):
    """A heartbeat, to be echoed at once."""

    stamp: int


class Echo(msgspec.Struct, array_like=True, gc=False, tag=12, forbid_unknown_fields=True):
    """The echo of a heartbeat."""

    stamp: int


class Goodbye(msgspec.Struct, array_like=True, gc=False, tag=13, forbid_unknown_fields=True):
    """The sender closes the connection now; `reason` is a code."""

    reason: str


# Kinds that are written as plain tuples, because many are: a struct would be made only to be read once.
ASK, STREAM, TELL, ANSWER, ITEM = 1, 2, 3, 4, 6
ASK_KINDS = (ASK, STREAM)
VALUE_KINDS = (ANSWER, ITEM)
CALL_KINDS = (*ASK_KINDS, *VALUE_KINDS)
PLAIN_LETTERS = (Failure, Mark, Credit, Cancel, Watch, Beat, Echo, Goodbye)
MESSAGE_LETTERS = (Ask, OpenStream, Tell)
VALUE_LETTERS = (Answer, Item)
SCALARS = (type(None), bool, int, float, str)


def lane_of(letter: tuple[Any, ...]) -> str | int:
    """Give the lane of an ask, a stream, a tell, an answer or an item: what it must not overtake has the same."""
    lane: str | int = letter[2] if letter[0] in ASK_KINDS else letter[1]
    return lane


class Misread(NamedTuple):
    """A letter whose body is no message of the table. Its sender can be told, so the connection stands."""

    kind: int
    call: int
    error: FrameInvalid

    @classmethod
    def of(cls, raw: msgspec.Raw, error: Exception) -> Misread:
        """Find out which call a letter that can't be read belongs to.

        Raises:
            FrameInvalid: it is not even a letter.
        """
        reason = FrameInvalid(f"a message that can't be read: {error}")
        try:
            fields = _raws.decode(raw)
            kind = _number.decode(fields[0])
            if kind == TELL:
                return cls(kind, 0, reason)
            if kind in CALL_KINDS and len(fields) > 2:
                return cls(kind, _number.decode(fields[1]), reason)
        except (msgspec.DecodeError, IndexError, RecursionError):
            pass
        raise reason


class Written(NamedTuple):
    """An encoded letter, and the blobs that it refers to."""

    data: bytes
    blobs: Sequence[Blob]


class LetterCodec:
    """Letters to bytes and back, for one type table. Knows the blobs of one connection's transfers."""

    def __init__(
        self,
        messages: Iterable[type],
        write_reference: Callable[[Any], Any],
        read_reference: Callable[[Any], Any],
        reference_type: type,
    ) -> None:
        table = tuple(dict.fromkeys(messages))
        for message in table:
            check_message_type(message)
        self.messages = frozenset(table)
        self.values = frozenset((*SCALARS, *table))
        self._write_reference = write_reference
        self._read_reference = read_reference
        self._reference_type = reference_type
        body: Any = Union[table] if table else msgspec.UnsetType  # noqa: UP007
        several: Any = tuple.__class_getitem__((Union[(*SCALARS, *table)], ...))
        value: Any = Union[(*SCALARS, *table, several)]
        kinds: list[Any] = [letter[body] for letter in MESSAGE_LETTERS] if table else []
        kinds += [letter[value] for letter in VALUE_LETTERS]
        # Made once: to find the type of so large a union again takes long.
        self._frame: Any = list[Union[(*kinds, *PLAIN_LETTERS)]]  # type: ignore[valid-type]
        # Called for every letter: the C function itself. Blobs that it meets are noted in `blobs`.
        self.write: Callable[[object], bytes] = msgspec.msgpack.Encoder(enc_hook=self._write_hook).encode
        self.blobs: list[Blob] = []
        self.transfer = 0

    def check_message(self, message: object) -> None:
        """Refuse to send what the other side could not read.

        Raises:
            FrameInvalid: the message's type is not in the table.
        """
        if type(message) not in self.messages:
            raise FrameInvalid(f"{type(message).__name__} is not in the table of messages that travel")

    def check_value(self, value: object) -> None:
        """Refuse to send an answer or item that the other side could not read.

        Raises:
            FrameInvalid: it is neither plain, nor a message of the table, nor a tuple of such.
        """
        if isinstance(value, tuple) and type(value) is tuple:
            for item in value:
                if type(item) not in self.values:
                    raise FrameInvalid(f"a tuple that holds {type(item).__name__} does not travel")
        elif type(value) not in self.values:
            raise FrameInvalid(f"{type(value).__name__} is not in the table of messages that travel")

    def encode(self, letter: object, transfer: int = 0) -> Written:
        """Write a letter; blobs in it are referred to as those of `transfer`.

        Raises:
            FrameInvalid: it holds what can't be written.
        """
        self.transfer = transfer
        try:
            data = self.write(letter)
        except WRITE_ERRORS as error:
            raise self.unwritable(error) from error
        blobs = list(self.blobs)
        self.blobs.clear()
        return Written(data, blobs)

    def unwritable(self, error: Exception) -> FrameInvalid:
        """Make the typed error of a letter that `write` refused."""
        self.blobs.clear()
        return FrameInvalid(f"a message that can't be written: {error}")

    def decoder(self, take_blob: Callable[[int, int], Blob]) -> msgspec.msgpack.Decoder[Any]:
        """Make a decoder for frames, arrays of letters, of one connection; `take_blob` finds received blobs."""

        def read(kind: type, raw: Any) -> Any:
            if kind is Blob:
                if type(raw) is not list or len(raw) != 2 or type(raw[0]) is not int or type(raw[1]) is not int:
                    raise ValueError("a blob is written as its transfer and its index")
                return take_blob(raw[0], raw[1])
            if kind is FreeForm:
                if type(raw) is not bytes:
                    raise ValueError("free-form data is written as bytes")
                return FreeForm.unpack(raw)
            if kind is self._reference_type:
                return self._read_reference(raw)
            raise NotImplementedError(kind)

        return msgspec.msgpack.Decoder(self._frame, dec_hook=read)

    def _write_hook(self, value: Any) -> Any:
        if type(value) is Blob:
            memoryview(value.data).cast("B")
            if len(self.blobs) >= MAX_BLOBS:
                raise ValueError(f"a message has more than {MAX_BLOBS} blobs")
            self.blobs.append(value)
            return (self.transfer, len(self.blobs) - 1)
        if type(value) is FreeForm:
            try:
                return value.pack()
            except FrameInvalid as error:
                raise ValueError(error.message) from error
        if isinstance(value, self._reference_type):
            return self._write_reference(value)
        raise TypeError(f"{type(value).__name__} does not travel")


def check_message_type(message: type) -> None:
    """Assert that a type can be in a table: a tagged struct that refuses unknown fields."""
    assert issubclass(message, msgspec.Struct), f"{message.__name__} is no msgspec.Struct"
    config = message.__struct_config__
    assert isinstance(config.tag, str), f"{message.__name__} has no tag; its name on the wire"
    assert config.tag_field == "kind", f"{message.__name__} must name its tag field 'kind'"
    assert config.forbid_unknown_fields, f"{message.__name__} must forbid unknown fields"
    assert config.frozen, f"{message.__name__} must be frozen: it is written after it was sent"
    assert not config.array_like, f"{message.__name__} must be written as a map"


def read_misread(body: memoryview) -> list[msgspec.Raw]:
    """Split a frame that can't be read into its letters.

    Raises:
        FrameInvalid: it is no array.
    """
    try:
        return _raws.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise FrameInvalid(f"a frame that is no array of letters: {error}") from error


_raws: msgspec.msgpack.Decoder[list[msgspec.Raw]] = msgspec.msgpack.Decoder(list[msgspec.Raw])
_number: msgspec.msgpack.Decoder[int] = msgspec.msgpack.Decoder(int)
