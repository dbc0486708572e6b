"""`sllm-node start`: run a node until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal

import uvloop

from sllm_actor.cli import logs
from sllm_actor.cli.collecting import look_for_cycles
from sllm_actor.cli.show import err, out, print_json
from sllm_actor.config import Config
from sllm_actor.node import Node
from sllm_actor.runtime.tasks import TaskScope


async def _serve(config: Config, as_json: bool) -> None:
    """Run until SIGTERM or SIGINT. A signal during the start, or a second one, ends the node at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    serving = False
    current = asyncio.current_task()
    assert current is not None

    def on_signal() -> None:
        if stop.is_set() or not serving:
            current.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    tasks = TaskScope("start")
    try:
        node = Node(config)
        tasks.spawn(look_for_cycles(lambda: node.is_quiet, node.clock), "cycles")
        async with node:
            serving = True
            # What a start has made stays. No pass need go through it.
            gc.freeze()
            if as_json:
                ready = {"ready": True, "url": node.url, "pid": os.getpid(), "node": config.node_id}
                print_json({**ready, "address": node.address})
            else:
                out.print(f"node [bold]{config.node_id}[/bold] is ready at [bold]{node.url}[/bold]")
                if node.address:
                    out.print(f"other nodes find it as [bold]{node.address}[/bold]")
            await stop.wait()
            if not as_json:
                out.print("stopping: running answers are being finished")
    except asyncio.CancelledError:
        err.print("stopped at once")
    finally:
        await tasks.close()


def run(config: Config, *, as_json: bool, log_level: str) -> None:
    """Run a node in this process until a signal ends it."""
    logs.configure(log_level, config.log_format)
    # Every client's connection is an open file.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.collect()
    uvloop.run(_serve(config, as_json))
