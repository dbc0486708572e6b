"""An asyncio event loop on virtual time: when nothing is ready, it jumps to the next timer.

It knows no sockets, threads, signals or real clock, so everything that happens on it follows from the code alone.
Source of the ideas: trio's autojump clock, FoundationDB's simulator.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import os
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextvars import Context, copy_context
from typing import Any, NoReturn, TypeVar, TypeVarTuple, cast

from sllm_actor.runtime.calls import wake
from sllm_actor.testing.virtual_calls import Call, Scheduled, Timer

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
# Not 0, which no real clock shows: a time that is mistaken for "none" is to be found here.
START_S = 1_000.0
WALL_START_S = 1_700_000_000.0
LIMIT_S = 3_600.0
LIMIT_TURNS = 2_000_000
# What cancelled tasks may still take.
WIND_UP_S = 600.0
WIND_UP_ROUNDS = 10
NAMED_TASKS = 20
MAX_AWAIT_DEPTH = 50
# So many cancelled timers may lie among the others, as with the base class.
MANY_CANCELLED = 100


class SimulationError(Exception):
    """A simulation ended in a way that no simulation may."""


class SimulationStuck(SimulationError):
    """Nothing is ready and no timer runs: whoever waits would wait for ever."""


class SimulationTooLong(SimulationError):
    """The bound on virtual time or on turns of the loop was reached."""


class SimulationFailed(SimulationError):
    """A callback or a task failed and nobody looked at its error, which is the cause of this one."""


class VirtualClock:
    """A `Clock` that shows a virtual loop's time, also while the loop does not run."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._virtual = loop

    def monotonic_s(self) -> float:
        return self._virtual.now_s

    def wall_s(self) -> float:
        return WALL_START_S + self._virtual.now_s

    async def sleep(self, duration_s: float) -> None:
        if duration_s <= 0.0:
            await asyncio.sleep(0)
            return
        future = self._virtual.create_future()
        timer = self._virtual.call_later(duration_s, wake, future)
        try:
            await future
        finally:
            timer.cancel()


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks in order at virtual moments. It is cheap: it has no file descriptor.

    `now_s` is the time, and `turns` counts the rounds of the loop: one that sleeps takes a turn, not time.
    """

    # The base class's own, which its type stubs do not name.
    _closed: bool
    _ready: deque[Call]
    _scheduled: list[Scheduled]
    _stopping: bool
    _timer_cancelled_count: int
    _asyncgens: weakref.WeakSet[AsyncGenerator[Any, Any]]

    def __init__(self, *, limit_s: float = LIMIT_S, limit_turns: int = LIMIT_TURNS) -> None:
        super().__init__()
        self.now_s = START_S
        self.turns = 0
        self.last_s = START_S + limit_s
        self.last_turn = limit_turns
        self.winding_up = False
        self.failures: list[dict[str, Any]] = []
        self._timers = 0
        self._note_cancelled = self._count_cancelled
        self._hinders = False
        self._begun = 0
        # In the order of their start. Weak, as the base class's: a task that nobody keeps is to be found lost.
        self._begun_tasks: list[weakref.ref[asyncio.Task[Any]]] = []
        self._sweep_at = 64
        # Weak, too, as the base class's set of them, which takes longer.
        self._generators: set[weakref.ref[AsyncGenerator[Any, Any]]] = set()
        self._forget_generator = self._generators.discard
        self.set_exception_handler(_keep_failure)

    @staticmethod
    def running() -> VirtualLoop:
        """Give the loop that runs, which must be a virtual one."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop), "this needs a virtual loop"
        return loop

    @property
    def clock(self) -> VirtualClock:
        """A clock with this loop's time."""
        return VirtualClock(self)

    def time(self) -> float:
        return self.now_s

    # As the base class's, without what looks for mistakes of threads. One request of a cluster needs some 100.

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        if self._closed:
            self._check_closed()
        call = Call(callback, args, copy_context() if context is None else context)
        self._ready.append(call)
        return call  # type: ignore[return-value]  # It has the face of one.

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        if self._closed:
            self._check_closed()
        context = copy_context() if context is None else context
        timer = Timer(callback, args, context, at_s=when, note_cancelled=self._note_cancelled)
        self._timers += 1
        heapq.heappush(self._scheduled, (when, self._timers, timer))
        return timer  # type: ignore[return-value]  # It has the face of one.

    def _run_once(self) -> None:
        """Take turns until it is to stop, each as the base class's, without what only files, threads and people need.

        Instead of waiting for a file it moves the time.
        """
        scheduled, pop = self._scheduled, heapq.heappop
        while True:
            self.turns += 1
            if self.turns > self.last_turn or self.failures:
                self._look_at_bounds()
            if not self._ready and not self._stopping:
                self._jump()
            if self._hinders:
                self._take_aside()
            ready, now_s = self._ready, self.now_s
            while scheduled and scheduled[0][0] <= now_s:
                timer = pop(scheduled)[2]
                timer.is_scheduled = False
                if timer.is_cancelled:
                    self._timer_cancelled_count -= 1
                else:
                    ready.append(timer)
            # What these make ready has its turn in the next one.
            for _ in range(len(ready)):
                call = ready.popleft()
                if not call.is_cancelled:
                    try:
                        call.context.run(call.callback, *call.args)
                    except (SystemExit, KeyboardInterrupt):
                        raise
                    except BaseException as error:
                        self._note_failure(call, error)
            if self._stopping:
                return

    def _count_cancelled(self) -> None:
        self._timer_cancelled_count += 1

    def _note_failure(self, call: Call, error: BaseException) -> None:
        name = getattr(call.callback, "__qualname__", repr(call.callback))
        self.call_exception_handler({"message": f"Exception in callback {name}", "exception": error, "handle": name})

    def _sweep_timers(self) -> None:
        """Let cancelled timers go: they are many."""
        scheduled = self._scheduled
        for _, _, timer in scheduled:
            timer.is_scheduled = not timer.is_cancelled
        # In place: a turn that looks at it goes on.
        scheduled[:] = [one for one in scheduled if one[2].is_scheduled]
        heapq.heapify(scheduled)
        self._timer_cancelled_count = 0

    def _look_at_bounds(self) -> None:
        if self.turns > self.last_turn:
            raise SimulationTooLong(f"more than {self.last_turn} turns of the loop; {self.describe_tasks()}")
        if self.failures and not self.winding_up:
            self.raise_failure()

    def _take_aside(self) -> None:
        """Take from what is ready or due what may not run in this turn; asked where something is so (`_hinders`)."""

    def _jump(self) -> None:
        """Move the time to the next timer."""
        scheduled, cancelled = self._scheduled, self._timer_cancelled_count
        if cancelled > MANY_CANCELLED and 2 * cancelled > len(scheduled):
            self._sweep_timers()
        while scheduled and scheduled[0][2].is_cancelled:
            heapq.heappop(scheduled)[2].is_scheduled = False
            self._timer_cancelled_count -= 1
        if not scheduled:
            raise SimulationStuck(f"nothing can happen any more; {self.describe_tasks()}")
        next_s = scheduled[0][0]
        if next_s > self.last_s:
            raise SimulationTooLong(f"it is {self.now_s:.3f} s and nothing is done; {self.describe_tasks()}")
        self.now_s = max(self.now_s, next_s)

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: object = None,
        context: Context | None = None,
        **options: Any,
    ) -> asyncio.Task[T]:
        if self._closed:
            self._check_closed()
        self._begun += 1
        # asyncio counts its tasks per process; a name that is traced must be the same in each run.
        label = f"Task-{self._begun}" if name is None else str(name)
        task: asyncio.Task[T] = asyncio.Task(coro, loop=self, name=label, context=context, **options)
        self._begun_tasks.append(weakref.ref(task))
        if len(self._begun_tasks) >= self._sweep_at:
            self._begun_tasks = [weakref.ref(pending) for pending in self.pending_tasks()]
            self._sweep_at = 64 + 2 * len(self._begun_tasks)
        return task

    def pending_tasks(self) -> list[asyncio.Task[Any]]:
        """List the tasks that have not ended, oldest first."""
        tasks = [reference() for reference in self._begun_tasks]
        return [task for task in tasks if task is not None and not task.done()]

    def describe_tasks(self) -> str:
        """Say which tasks wait, and where."""
        tasks = self.pending_tasks()
        lines = [f"  {task.get_name()}: {_where(task.get_coro())}" for task in tasks[:NAMED_TASKS]]
        if len(tasks) > NAMED_TASKS:
            lines.append(f"  and {len(tasks) - NAMED_TASKS} more")
        return "\n".join([f"{len(tasks)} tasks wait:", *lines])

    def raise_failure(self) -> NoReturn:
        """Raise what was kept of the first failure.

        Raises:
            SimulationFailed: always.
        """
        context = self.failures[0]
        parts = [f"{key}={context[key]!r}" for key in sorted(context) if key not in ("message", "exception")]
        raise SimulationFailed(f"{context.get('message')} {', '.join(parts)}") from context.get("exception")

    def wind_up(self) -> None:
        """Cancel the tasks that are left, oldest first, until none is, and close the generators.

        Raises:
            SimulationStuck, SimulationTooLong: a task does not end.
        """
        self.winding_up = True
        self.last_s = self.now_s + WIND_UP_S
        self.last_turn = self.turns + LIMIT_TURNS
        for _ in range(WIND_UP_ROUNDS):
            tasks = self.pending_tasks()
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.wait(tasks))
            for task in tasks:
                error = None if task.cancelled() else task.exception()
                if error is not None:
                    self.failures.append({"message": "a cancelled task failed:", "exception": error, "task": task})
        else:
            raise SimulationStuck(f"tasks start tasks while they are cancelled; {self.describe_tasks()}")
        self._asyncgens.update(found for reference in self._generators if (found := reference()) is not None)
        self._generators.clear()
        self.run_until_complete(self.shutdown_asyncgens())

    def call_soon_threadsafe(self, callback: object, *args: object, context: object = None) -> NoReturn:
        raise SimulationError("a simulation has one thread: no other can call into it")

    def run_in_executor(self, executor: object, func: object, *args: object) -> NoReturn:
        raise SimulationError(f"a simulation has one thread: {func!r} can't run in another")

    def _asyncgen_firstiter_hook(self, agen: AsyncGenerator[Any, Any]) -> None:
        self._generators.add(weakref.ref(agen, self._forget_generator))

    def _asyncgen_finalizer_hook(self, agen: AsyncGenerator[Any, Any]) -> None:
        if not self.is_closed():
            self.call_soon(self._begin, agen.aclose())

    def _begin(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.Task(work, loop=self, name="close a generator")
        self._begun_tasks.append(weakref.ref(task))

    def _check_closed(self) -> None:
        if self.is_closed():
            raise RuntimeError("Event loop is closed")

    def _write_to_self(self) -> None:
        """No other thread wakes this loop."""


def _keep_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # An error raised here would only be logged: the next turn raises it.
    cast(VirtualLoop, loop).failures.append(context)


def _where(awaited: Any) -> str:
    """Say where the coroutines of a task stand, outermost first."""
    places = []
    for _ in range(MAX_AWAIT_DEPTH):
        for prefix in ("cr", "gi", "ag"):
            frame = getattr(awaited, f"{prefix}_frame", None)
            if frame is not None:
                code = frame.f_code
                places.append(f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{frame.f_lineno})")
                awaited = getattr(awaited, "gi_yieldfrom" if prefix == "gi" else f"{prefix}_await")
                break
        else:
            break
    return " > ".join(places) or repr(awaited)


def run_virtual(
    main: Callable[[], Coroutine[Any, Any, T]],
    *,
    limit_s: float = LIMIT_S,
    limit_turns: int = LIMIT_TURNS,
    kind: type[VirtualLoop] = VirtualLoop,
) -> T:
    """Run `main()` on a virtual loop of its own, of that `kind`, cancel what it leaves behind, and give its result.

    Raises:
        SimulationStuck: nothing can happen any more.
        SimulationTooLong: `limit_s` virtual seconds or `limit_turns` turns did not suffice.
        SimulationFailed: an error came up in a callback, or in a task whose result nobody took.
    """
    loop = kind(limit_s=limit_s, limit_turns=limit_turns)
    # Garbage collected at a moment of its own choosing would make two runs of one seed differ.
    collects = gc.isenabled()
    gc.disable()
    try:
        result = _run(loop, main)
        # Whatever was made since the start is in the youngest generation; lost errors are told of by what goes.
        gc.collect(0)
        if loop.failures:
            loop.raise_failure()
        return result
    finally:
        loop.close()
        if collects:
            gc.enable()


def _run(loop: VirtualLoop, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    try:
        result = loop.run_until_complete(main())
    except BaseException as error:
        try:
            loop.wind_up()
        except SimulationError as second:
            error.add_note(f"And then, while its tasks were cancelled: {second}")
        raise
    loop.wind_up()
    return result
