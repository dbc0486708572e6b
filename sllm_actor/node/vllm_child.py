"""The program that an engine process with vLLM runs. Never imported by the node's own process."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import version

import msgspec

from sllm_actor.engine.vllm_options import VllmOptions
from sllm_actor.runtime.clock import SystemClock


def main(arguments: Sequence[str]) -> int:
    """Be an engine: socket, host pool, longest frame, the node's version and what the operator says of vLLM."""
    sock_fd, pool_fd, max_frame_bytes, wanted, options = arguments
    if version("sllm_actor") != wanted:
        print(f"vllm_python has sllm_actor {version('sllm_actor')}, and the node is {wanted}", file=sys.stderr)
        return 1
    # What is imported here is vLLM, which takes its time.
    from sllm_actor.engine.vllm_process import VllmProcess

    process = VllmProcess(int(pool_fd), msgspec.json.decode(options, type=VllmOptions), SystemClock())
    return asyncio.run(process.run(socket.socket(fileno=int(sock_fd)), int(max_frame_bytes)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
