"""Run an async test on uvloop and on asyncio's own loop, each with an end to its patience."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

LIMIT_S = 60.0
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def on_both_loops(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[LoopFactory], None]:
    """Make a test that pytest runs twice; the wrapped one takes no fixtures."""

    @pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    def run(loop_factory: LoopFactory) -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(asyncio.wait_for(test(), LIMIT_S))

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run
