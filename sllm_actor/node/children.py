"""What the fork server imports, and what its children run. Never imported by the node's own process."""

from __future__ import annotations

import sllm_actor.node.without_triton  # noqa: F401  # isort: skip

import os
import socket
from collections.abc import Mapping, Sequence

from sllm_actor.domain.tokens import unpack_uint32
from sllm_actor.engine.process import EngineProcess
from sllm_actor.engine.warm import warm
from sllm_actor.frontend.grammar_process import GrammarProcess
from sllm_actor.frontend.text_process import TextProcess
from sllm_actor.loader.mapping import HostFile, InPlace, map_files
from sllm_actor.messages import engine, grammar, text
from sllm_actor.messages.engine import PooledFile
from sllm_actor.node.limits import ENGINE_THREADS, GRAMMAR_BYTES, GRAMMAR_MEMORY_BYTES, MAX_FRAME_BYTES
from sllm_actor.runtime.blocking import BlockingChannel
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.frames import Codec


def preload() -> None:
    """Run in the fork server before its first fork."""
    warm()


def _max_frame_bytes() -> int:
    return int(os.environ[MAX_FRAME_BYTES])


def run_engine(fds: Sequence[int]) -> int:
    """Be an engine: `fds` are its socket and the host pool."""
    sock, pool_fd = socket.socket(fileno=fds[0]), fds[1]
    channel = BlockingChannel(sock, Codec(engine.FROM_ENGINE, engine.TO_ENGINE, _max_frame_bytes()))
    threads = int(os.environ[ENGINE_THREADS]) or len(os.sched_getaffinity(0))

    def map_pooled(chunk_bytes: int, files: Sequence[PooledFile]) -> Mapping[str, memoryview]:
        wanted = [_host_file(file) for file in files]
        mapped = map_files(pool_fd, chunk_bytes, wanted, populate=threads)
        return {file.name: buffer for file, buffer in zip(wanted, mapped.buffers, strict=True)}

    return EngineProcess(channel, map_pooled, SystemClock(), threads).run()


def _host_file(file: PooledFile) -> HostFile:
    if file.path:
        return HostFile(file.name, file.size_bytes, (), InPlace(file.path, file.mtime_ns, file.inode))
    return HostFile(file.name, file.size_bytes, tuple(unpack_uint32(file.chunks)))


def run_text(fds: Sequence[int]) -> int:
    """Be a text process: `fds` is its socket."""
    channel = BlockingChannel(socket.socket(fileno=fds[0]), Codec(text.FROM_TEXT, text.TO_TEXT, _max_frame_bytes()))
    return TextProcess(channel).run()


def run_grammar(fds: Sequence[int]) -> int:
    """Be a grammar process: `fds` is its socket."""
    codec = Codec(grammar.FROM_GRAMMAR, grammar.TO_GRAMMAR, _max_frame_bytes())
    channel = BlockingChannel(socket.socket(fileno=fds[0]), codec)
    return GrammarProcess(channel, int(os.environ[GRAMMAR_MEMORY_BYTES]), int(os.environ[GRAMMAR_BYTES])).run()


ENTRIES = {"engine": run_engine, "grammar": run_grammar, "text": run_text}
