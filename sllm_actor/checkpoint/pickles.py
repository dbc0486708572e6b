"""Find the pickled weights of a folder, and have a child process read them.

Nothing is unpickled here: the child (`pickle_child.py`) says what tensors there are, then sends their bytes.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import xxhash

from sllm_actor.checkpoint.folder import MAX_INDEX_BYTES, MAX_SHARDS, read_json
from sllm_actor.checkpoint.layout import Described, is_pad
from sllm_actor.checkpoint.manifest import OriginFormat
from sllm_actor.checkpoint.originals import BLOCK_BYTES
from sllm_actor.checkpoint.partitions import Runs
from sllm_actor.checkpoint.pickle_child import Answer, Load, Question, Read, Refused, receive, send
from sllm_actor.errors import CheckpointChanged, CheckpointInvalid, ConversionFailed, PickleInvalid, ReadFailed

SILENCE_TIMEOUT_S = 1800.0
LEAVE_TIMEOUT_S = 30.0
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}\.(?:bin|pt|pth)")
_SHARD_OF_SET = re.compile(r"pytorch_model-[0-9]{5}-of-([0-9]{5})\.bin")
# What a training leaves beside the weights.
_NO_WEIGHTS = re.compile(r"training_args.*|optimizer.*|scheduler.*|scaler.*|rng_state.*|trainer_state.*")
_PICKLE = re.compile(r".*\.(?:bin|pt|pth)")
_MAX_SAID_BYTES = 65536
# A zip file's directory, with a checksum of every record, is at its end; the pickle itself is at its beginning.
_ENDS_BYTES = 2**20


class PickledFiles:
    """The tensors of pickled files, read by a child process that lives until `close`."""

    format = OriginFormat.PICKLE

    def __init__(self, folder: Path) -> None:
        names, weight_map = _find(folder)
        self._paths = [folder / name for name in names]
        self._stats = [_stat(path) for path in self._paths]
        self.generation = _generation(self._paths)
        self.metadata: Mapping[str, str] = {}
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        self._channel, theirs = socket.socketpair()
        self._said, said = os.pipe()
        try:
            self._process = _start(theirs, said)
        except OSError as wrong:
            self._channel.close()
            os.close(self._said)
            raise ConversionFailed(f"no process can be started to read pickles: {wrong.strerror}") from wrong
        finally:
            theirs.close()
            os.close(said)
        try:
            self._channel.settimeout(SILENCE_TIMEOUT_S)
            self.tensors, self.aliases = self._load(folder, names, weight_map)
        except BaseException:
            self.close()
            raise

    def _load(
        self, folder: Path, names: Sequence[str], weight_map: Mapping[str, str]
    ) -> tuple[Sequence[Described], Mapping[str, str]]:
        self._ask(Load(tuple(map(str, self._paths))))
        with self._watched():
            body = receive(self._channel)
        if body is None:
            raise self._ended()
        answer: Answer = msgspec.msgpack.decode(body, type=Answer)
        if isinstance(answer, Refused):
            raise PickleInvalid(f"{folder} can't be converted: {answer.reason}")
        place = dict(zip((tensor.name for tensor in answer.tensors), (names[k] for k in answer.files), strict=True))
        place |= {alias: place[stored] for alias, stored in answer.aliases.items()}
        for name in place:
            if is_pad(name):
                raise PickleInvalid(f"{folder}: tensor {name!r} has a name that only pads may have")
        for name, shard in weight_map.items():
            if place.get(name) != shard:
                raise PickleInvalid(f"{folder}: the index puts tensor {name!r} in {shard}, it is not there")
        return answer.tensors, answer.aliases

    def read(self, name: str, runs: Runs) -> Iterator[memoryview]:
        """Give the bytes of `runs` of a tensor."""
        self._ask(Read(name, runs))
        left = runs.size_bytes
        while left:
            with self._watched():
                got = self._channel.recv_into(self._buffer[: min(left, BLOCK_BYTES)])
            if got == 0:
                raise self._ended()
            left -= got
            yield self._buffer[:got]

    def finish(self) -> None:
        """Check that no file has changed."""
        for path, before in zip(self._paths, self._stats, strict=True):
            if _stat(path) != before:
                raise CheckpointChanged(f"{path} has changed while it was read")

    def close(self) -> None:
        """End the process."""
        self._channel.close()
        self._process.kill()
        self._process.wait()
        if self._said >= 0:
            os.close(self._said)
            self._said = -1

    def _ask(self, question: Question) -> None:
        with self._watched():
            send(self._channel, question)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise ConversionFailed(f"the process that reads pickles was silent for {SILENCE_TIMEOUT_S:.0f} s") from None
        except OSError:
            raise self._ended() from None

    def _ended(self) -> ConversionFailed:
        # It has closed its end: what remains is to print why, and to leave.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE_TIMEOUT_S)
        self._process.kill()
        status = self._process.wait()
        lines = os.read(self._said, _MAX_SAID_BYTES).decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return ConversionFailed(f"the process that reads pickles {how}: {lines[-1] if lines else 'it said nothing'}")


def _start(theirs: socket.socket, said: int) -> subprocess.Popen[bytes]:
    # What it says is read when it has ended; if that is more than the pipe holds, the rest is lost, not waited for.
    os.set_blocking(said, False)
    # Nothing of this process's environment is the child's business but how to find and run Python.
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR") if name in os.environ}
    return subprocess.Popen(
        [
            sys.executable,
            "-B",
            "-P",
            "-m",
            "sllm_actor.checkpoint.pickle_child",
            str(theirs.fileno()),
            str(os.getpid()),
        ],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=said,
        env={**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"},
    )


def _find(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the files that hold the weights, and where there is an index, which tensor is in which."""
    index = folder / "pytorch_model.bin.index.json"
    present = sorted(entry.name for entry in folder.iterdir())
    if "pytorch_model.bin" in present:
        return ["pytorch_model.bin"], {}
    if index.name in present:
        return _read_index(index)
    shards = [match for match in map(_SHARD_OF_SET.fullmatch, present) if match]
    if shards:
        count = int(shards[0].group(1))
        names = [match.group() for match in shards]
        if names != [f"pytorch_model-{k:05}-of-{count:05}.bin" for k in range(1, min(count, MAX_SHARDS) + 1)]:
            raise CheckpointInvalid(f"{folder} has {len(names)} of {count} shards and no index to go by")
        return names, {}
    candidates = [name for name in present if _PICKLE.fullmatch(name) and not _NO_WEIGHTS.fullmatch(name)]
    if len(candidates) != 1:
        raise CheckpointInvalid(f"{folder} has {len(candidates)} files that may be its weights: {candidates[:4]}")
    return candidates, {}


def _read_index(index: Path) -> tuple[list[str], dict[str, str]]:
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointInvalid(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise CheckpointInvalid(f"{index} puts tensor {tensor!r} in a file of an impossible name")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointInvalid(f"{index} names {len(names)} files and at most {MAX_SHARDS} are allowed")
    return names, weight_map


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        if not path.is_file():
            raise CheckpointInvalid(f"{path} is missing, or not a regular file")
        found = path.stat()
    except OSError as wrong:
        raise ReadFailed(f"{path} can't be looked at: {wrong.strerror}") from wrong
    return found.st_size, found.st_mtime_ns, found.st_ino


def _generation(paths: Sequence[Path]) -> str:
    generation = xxhash.xxh3_128()
    for path in paths:
        try:
            with path.open("rb") as opened:
                first = opened.read(_ENDS_BYTES)
                size_bytes = opened.seek(0, os.SEEK_END)
                opened.seek(max(0, size_bytes - _ENDS_BYTES))
                ends = xxhash.xxh3_128(first + opened.read(_ENDS_BYTES))
        except OSError as wrong:
            raise ReadFailed(f"{path} can't be read: {wrong.strerror}") from wrong
        generation.update(f"{path.name}:{size_bytes}:{ends.hexdigest()};".encode())
    return generation.hexdigest()
