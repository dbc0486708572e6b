"""Read pickled tensors in a process of its own: `python -m sllm_actor.checkpoint.pickle_child FD PARENT`.

The only module that unpickles, and only with `weights_only=True`: tensors and containers, no code. It is beside the
process that asked, because a hostile or damaged file may still crash or fill whoever reads it: it dies with its
parent, can write no file, and has a bound on memory and on processor time. It answers on a socket: first what
tensors there are, then their bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import sys
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from sllm_actor.checkpoint.layout import Described
from sllm_actor.checkpoint.partitions import Runs
from sllm_actor.errors import PickleInvalid
from sllm_actor.runtime.forkserver import die_with_parent, name_process

LENGTH_BYTES = 8
MAX_FRAME_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
# Beside the files themselves: what torch holds anyway, and one strided view at a time made contiguous.
SPARE_MEMORY_BYTES = 4 * 2**30
MAX_PROCESSOR_S = 6 * 3600
MAX_OPEN_FILES = 4096


class Load(msgspec.Struct, frozen=True, tag="load", forbid_unknown_fields=True):
    """Read these files, in order."""

    paths: tuple[str, ...]


class Read(msgspec.Struct, frozen=True, tag="read", forbid_unknown_fields=True):
    """Send the bytes of runs of a tensor, without a frame: as many as the runs have."""

    name: str
    runs: Runs


class Loaded(msgspec.Struct, frozen=True, tag="loaded", forbid_unknown_fields=True):
    """What the files hold: tensors in order, the file of each, and other names for the same bytes and view."""

    tensors: tuple[Described, ...]
    files: tuple[int, ...]
    aliases: dict[str, str]


class Refused(msgspec.Struct, frozen=True, tag="refused", forbid_unknown_fields=True):
    """The files are not converted, and why."""

    reason: str


Question = Load | Read
Answer = Loaded | Refused


def send(channel: socket.socket, message: Question | Answer) -> None:
    """Send one message: 8 bytes of length, then MessagePack."""
    body = msgspec.msgpack.encode(message)
    channel.sendall(len(body).to_bytes(LENGTH_BYTES, "little") + body)


def receive(channel: socket.socket) -> bytes | None:
    """Receive the body of one message; None where the other end has gone."""
    prefix = receive_exactly(channel, LENGTH_BYTES)
    if prefix is None:
        return None
    length = int.from_bytes(prefix, "little")
    if length > MAX_FRAME_BYTES:
        raise PickleInvalid(f"a message of {length} bytes about a pickle is longer than any may be")
    body = receive_exactly(channel, length)
    return None if body is None else bytes(body)


def receive_exactly(channel: socket.socket, length: int) -> bytearray | None:
    """Receive `length` bytes; None where the other end goes before."""
    data = bytearray(length)
    view, at = memoryview(data), 0
    while at < length:
        got = channel.recv_into(view[at:])
        if got == 0:
            return None
        at += got
    return data


class Tensors:
    """The tensors of the files, and how each is sent."""

    def __init__(self) -> None:
        self._stored: dict[str, Any] = {}
        self._by_view: dict[tuple[Any, ...], str] = {}
        self._sent_name = ""
        self._sent: Any = None

    def load(self, paths: Sequence[str]) -> Loaded:
        """Read the files.

        Raises:
            PickleInvalid: one holds something that can't be converted; or whatever torch raises at it.
        """
        described: list[Described] = []
        files: list[int] = []
        aliases: dict[str, str] = {}
        for number, path in enumerate(paths):
            for name, tensor in _read_file(path).items():
                dtype = _check(path, name, tensor)
                if name in self._stored or name in aliases:
                    raise PickleInvalid(f"tensor {name!r} is in {os.path.basename(path)} and in a file before it")
                stored = self._by_view.setdefault(_view_of(tensor), name) if tensor.numel() else name
                if stored != name:
                    aliases[name] = stored
                    continue
                self._stored[name] = tensor
                size_bytes = tensor.numel() * tensor.element_size()
                described.append(Described(name, dtype, tuple(tensor.shape), size_bytes))
                files.append(number)
                if len(described) > MAX_TENSORS:
                    raise PickleInvalid(f"there are more than {MAX_TENSORS} tensors")
        return Loaded(tuple(described), tuple(files), aliases)

    def blocks(self, name: str, runs: Runs) -> Iterator[memoryview]:
        """Give the bytes of runs of a tensor."""
        data = self._bytes_of(name)
        for begin, length in runs.ranges():
            yield data[begin : begin + length]

    def _bytes_of(self, name: str) -> memoryview:
        # One materialised view is kept: a tensor is asked for once for each rank, and usually in one go.
        if self._sent_name != name:
            self._sent = None
            self._sent = self._stored[name].resolve_conj().resolve_neg().contiguous()
            self._sent_name = name
        size_bytes = self._sent.numel() * self._sent.element_size()
        if size_bytes == 0:
            return memoryview(b"")
        # `sent` is held above for as long as anything looks at its bytes.
        return memoryview((ctypes.c_ubyte * size_bytes).from_address(self._sent.data_ptr())).cast("B")


def _read_file(path: str) -> dict[str, Any]:
    import torch

    # Files from before torch 1.6 are not zip files and can't be mapped; they are read into memory.
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(found, dict):
        raise PickleInvalid(f"{os.path.basename(path)} holds a {type(found).__name__}, not a dictionary of tensors")
    for name, value in found.items():
        if not isinstance(name, str):
            raise PickleInvalid(f"{os.path.basename(path)}: the key {name!r} is no name of a tensor")
        if not isinstance(value, torch.Tensor):
            raise PickleInvalid(f"{os.path.basename(path)}: {name!r} is a {type(value).__name__}, not a tensor")
    return found


def _dtypes() -> dict[Any, str]:
    import torch

    names = {
        "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
        "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
        "complex64": "C64", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
        "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    }  # fmt: skip
    return {getattr(torch, ours): theirs for ours, theirs in names.items() if hasattr(torch, ours)}


def _check(path: str, name: str, tensor: Any) -> str:
    """Return the dtype as safetensors calls it, or refuse the tensor by its name."""
    import torch

    kind = ""
    if tensor.is_quantized:
        kind = "quantised"
    elif tensor.is_nested or tensor.layout is not torch.strided:
        kind = "sparse or nested"
    elif tensor.device.type != "cpu":
        kind = f"without bytes (on the {tensor.device.type} device)"
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        kind = f"a {type(tensor).__name__}"
    dtype = _dtypes().get(tensor.dtype)
    if not kind and dtype is None:
        kind = f"of type {tensor.dtype}, which safetensors does not have"
    if kind:
        raise PickleInvalid(f"{os.path.basename(path)}: tensor {name!r} is {kind} and can't be converted")
    assert dtype is not None, "refused above"
    return dtype


def _view_of(tensor: Any) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())


def _limit(paths: Sequence[str]) -> None:
    """Bound what this process may take; set once torch is imported, because that needs more than a file would."""
    file_bytes = sum(os.stat(path).st_size for path in paths)
    with open("/proc/self/statm", encoding="ascii") as opened:
        data_bytes = int(opened.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    # Files are mapped privately and count as data; one of the old kind is read and then copied.
    limits = {
        resource.RLIMIT_DATA: data_bytes + 2 * file_bytes + SPARE_MEMORY_BYTES,
        resource.RLIMIT_CPU: MAX_PROCESSOR_S,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bounded, bounded))


def _serve(channel: socket.socket) -> None:
    decoder: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
    tensors = Tensors()
    while (body := receive(channel)) is not None:
        question = decoder.decode(body)
        if isinstance(question, Read):
            for block in tensors.blocks(question.name, question.runs):
                channel.sendall(block)
            continue
        import torch

        torch.set_num_threads(1)
        _limit(question.paths)
        answer = load_answer(tensors, question.paths)
        send(channel, answer)
        if isinstance(answer, Refused):
            return


def load_answer(tensors: Tensors, paths: Sequence[str]) -> Answer:
    """Read the files, or say why they are not converted."""
    try:
        return tensors.load(paths)
    except PickleInvalid as refused:
        return Refused(refused.message)
    except Exception as error:
        # Whatever torch raises at a file that lies is that file's fault, and all that is left to say.
        return Refused(_reason(error))


def main(arguments: Sequence[str]) -> None:
    die_with_parent(int(arguments[1]))
    name_process("sllm-unpickle")
    channel = socket.socket(fileno=int(arguments[0]))
    with channel, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _serve(channel)


def _reason(error: Exception) -> str:
    """Say what was wrong, without torch's advice to load it with `weights_only=False`."""
    said = [line.strip() for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
    return f"{type(error).__name__}: {' '.join(said[:2])}"[:1000]


if __name__ == "__main__":
    main(sys.argv[1:])
