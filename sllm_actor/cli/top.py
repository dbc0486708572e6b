"""`sllm-node top`: a node and its cluster, live in the terminal, from what the page is told too (`/admin/events`)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from sllm_actor.cli.asking import Json, Key, Url, ask
from sllm_actor.cli.client import DEFAULT_URL, Look, NodeClient, NodeRefused, NodeUnreachable
from sllm_actor.cli.show import PIPE_CHARACTERS, out, print_json
from sllm_actor.cli.token_rates import TokenRates, rates_between, rates_so_far
from sllm_actor.cli.top_view import Glance, draw
from sllm_actor.errors import AccessDenied, KeyInvalid
from sllm_actor.runtime.clock import Clock, SystemClock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.units import format_seconds

# A node that has nothing to tell says so each heartbeat_interval_s, 4 s by default.
SILENCE_S = 15.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 5.0
# What `--json` has of a part that a node could not look up yet.
NOTHING: dict[str, Any] = {"models": [], "nodes": [], "instances": [], "requests": [], "tiers": None, "problems": {}}
FOR_GOOD = (KeyInvalid.code, AccessDenied.code)
Interval = Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks, which rates are of.")]


def top(
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    interval: Interval = 1.0, url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Show nodes, starts, instances and streams, live in the terminal; Ctrl-C ends it. In a pipe: one look.

    Tokens and streams are those of the node that is asked, which the cluster's other gateways do not see.

    Example: sllm-node top

    Example: sllm-node top --once --json
    """
    console = Console(highlight=False)
    is_live = as_json or (console.is_terminal and not console.is_dumb_terminal)

    async def work(client: NodeClient) -> None:
        watch = _Watch(client, SystemClock())
        if once or not is_live:
            await _look_once(watch, as_json=as_json)
        else:
            await _look_on(watch, interval, None if as_json else console)

    ask(url, api_key, work, as_json=as_json)


class _Watch:
    """What is known of the node by its last word, and why there is none newer. Owns the connection to it."""

    def __init__(self, client: NodeClient, clock: Clock) -> None:
        self.client = client
        # Something is to be shown before the interval is over.
        self.due = asyncio.Event()
        self.failure: Exception | None = None
        self._clock = clock
        self._look: Look | None = None
        self._looked_s = 0.0
        self._lost_for = ""
        self._before: dict[str, int] | None = None
        self._before_s = 0.0

    async def follow(self) -> None:
        """Listen for ever, whatever becomes of the node, once it has said anything."""
        wait_s = FIRST_WAIT_S
        while True:
            try:
                async with aclosing(self.client.looks(SILENCE_S)) as looks:
                    async for look in looks:
                        self.take(look)
                        wait_s = FIRST_WAIT_S
                self._lose("it has ended the connection")
            except (NodeRefused, NodeUnreachable) as error:
                if self._look is None or (isinstance(error, NodeRefused) and error.code in FOR_GOOD):
                    self.failure = error
                    self.due.set()
                    return
                self._lose(str(error))
            await self._clock.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def take(self, look: Look) -> None:
        if self._look is None or self._lost_for:
            self.due.set()
        self._look, self._looked_s = look, self._clock.monotonic_s()
        self._lost_for = ""

    def _lose(self, why: str) -> None:
        self._lost_for = why
        # A node that comes back may count anew.
        self._before = None
        self.due.set()

    @property
    def has_look(self) -> bool:
        """Tell whether it has ever said anything."""
        return self._look is not None

    @property
    def parts(self) -> dict[str, Any]:
        """Give what was told, as it was told."""
        assert self._look is not None
        return NOTHING | self._look.parts

    def glance(self) -> Glance:
        """Give what is known now, with the rates since the last glance."""
        assert self._look is not None
        seen = self._look.seen
        silent_s = self._clock.monotonic_s() - self._looked_s
        now_s = self._look.moment.monotonic_s
        if self._lost_for:
            trouble = f"no news for {format_seconds(silent_s)}: {self._lost_for}"
            return Glance(self.client.url, seen, TokenRates(0.0, 0.0, {}, {}), now_s, trouble)
        now_s += silent_s
        if self._before is None or now_s <= self._before_s:
            rates = rates_so_far(seen.requests, now_s)
        else:
            rates = rates_between(self._before, seen.requests, now_s - self._before_s)
        self._before = {one.request_id: one.generated_tokens for one in seen.requests}
        self._before_s = now_s
        return Glance(self.client.url, seen, rates, now_s)


async def _look_once(watch: _Watch, *, as_json: bool) -> None:
    async with aclosing(watch.client.looks(SILENCE_S)) as looks:
        async for look in looks:
            watch.take(look)
            break
        else:
            raise NodeRefused("the answer ended before it was complete", "stream_cut")
    if as_json:
        print_json(_written(watch.glance(), watch.parts))
    else:
        out.print(draw(watch.glance(), _width(), None), soft_wrap=False)


async def _look_on(watch: _Watch, interval_s: float, console: Console | None) -> None:
    """Draw each interval, and at once when the terminal has another size, until Ctrl-C; without one print JSON."""
    stop, resized = asyncio.Event(), asyncio.Event()
    tasks = TaskScope("top")

    def end() -> None:
        stop.set()
        watch.due.set()

    def resize() -> None:
        resized.set()
        watch.due.set()

    with _signals({signal.SIGINT: end, signal.SIGTERM: end, signal.SIGWINCH: resize}):
        try:
            tasks.spawn(watch.follow(), "follow")
            while not (watch.has_look or watch.failure or stop.is_set()):
                await _wait(watch.due, interval_s)
                watch.due.clear()
            if console is None:
                await _print_on(watch, interval_s, stop)
            elif watch.failure is None:
                with Live(console=console, screen=True, auto_refresh=False) as live:
                    await _draw_on(watch, interval_s, stop, resized, live)
        finally:
            await tasks.close()
    if watch.failure is not None:
        raise watch.failure


async def _draw_on(watch: _Watch, interval_s: float, stop: asyncio.Event, resized: asyncio.Event, live: Live) -> None:
    glance: Glance | None = None
    while not (stop.is_set() or watch.failure):
        # A terminal of another size shows the same, drawn anew.
        if glance is None or not resized.is_set():
            glance = watch.glance()
        resized.clear()
        live.update(draw(glance, live.console.width, live.console.height), refresh=True)
        await _wait(watch.due, interval_s)
        watch.due.clear()


async def _print_on(watch: _Watch, interval_s: float, stop: asyncio.Event) -> None:
    while not (stop.is_set() or watch.failure):
        print_json(_written(watch.glance(), watch.parts))
        await _wait(stop, interval_s)


async def _wait(due: asyncio.Event, longest_s: float) -> None:
    try:
        async with asyncio.timeout(longest_s):
            await due.wait()
    except TimeoutError:
        return


@contextmanager
def _signals(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


def _written(glance: Glance, parts: dict[str, Any]) -> dict[str, Any]:
    return {
        **parts,
        "monotonic_s": glance.now_s,
        "trouble": glance.trouble,
        "rates": {
            "over_s": glance.rates.over_s, "tokens_per_s": glance.rates.in_all,
            "instances": glance.rates.instances, "requests": glance.rates.requests,
        },
    }  # fmt: skip


def _width() -> int:
    """Give the terminal's width; a pipe has none, and whoever reads it does not want lines that are folded."""
    return out.width if out.is_terminal else PIPE_CHARACTERS
