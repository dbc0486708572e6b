"""A virtual loop that many processes share, each of which can be stopped at any moment, as SIGSTOP does.

Whatever runs in a context belongs to the process that the context names. While a process is stopped, its callbacks
and the timers that come due wait; what others do goes on. One that is never let go on has crashed: nothing of it ran
after that moment, not a `finally` either.
"""

from __future__ import annotations

import heapq
from collections import deque
from contextvars import Context, ContextVar, copy_context
from math import inf
from typing import Any

from sllm_actor.testing.virtual_calls import Call, Scheduled
from sllm_actor.testing.virtual_loop import VirtualLoop

PROCESS: ContextVar[str] = ContextVar("process", default="")


def context_of(process: str) -> Context:
    """Give a context whose callbacks and tasks belong to a process."""
    context = copy_context()
    context.run(PROCESS.set, process)
    return context


class ProcessLoop(VirtualLoop):
    """Holds back what belongs to stopped processes. What names no process runs always."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(**limits)
        self._held: dict[str, list[Call]] = {}
        self._continued_s: dict[str, float] = {}
        # Stands in a turn where something was to run that was stopped.
        self._nothing = Call(lambda: None, (), Context())
        self._nothing.cancel()

    def stop_process(self, process: str) -> None:
        """Let nothing of a process run from now on: not what was to run in this turn, either."""
        held, ready = self._held.setdefault(process, []), self._ready
        self._hinders = True
        for index, call in enumerate(ready):
            if _process_of(call) == process:
                held.append(call)
                ready[index] = self._nothing

    def continue_process(self, process: str) -> None:
        """Let it go on: everything that came due meanwhile does so at once, in its order."""
        self._ready.extend(self._held.pop(process, []))
        self._hinders = bool(self._held)
        self._continued_s[process] = self.now_s

    def is_stopped(self, process: str, within_s: float = 0.0) -> bool:
        """Tell whether nothing of a process runs, or nothing did so short a while ago."""
        return process in self._held or self.now_s - self._continued_s.get(process, -inf) < within_s

    def wind_up(self) -> None:
        for process in list(self._held):
            self.continue_process(process)
        super().wind_up()

    def _take_aside(self) -> None:
        ready, self._ready = self._ready, deque()
        for call in ready:
            self._sort(call, self._ready)
        scheduled, due = self._scheduled, list[Scheduled]()
        while scheduled and scheduled[0][0] <= self.now_s:
            one = heapq.heappop(scheduled)
            if one[2].is_cancelled or _process_of(one[2]) not in self._held:
                due.append(one)
            else:
                one[2].is_scheduled = False
                self._held[_process_of(one[2])].append(one[2])
        for one in due:
            heapq.heappush(scheduled, one)

    def _sort(self, call: Call, ready: deque[Call]) -> None:
        self._held.get(_process_of(call), ready).append(call)


def _process_of(call: Call) -> str:
    return call.context.get(PROCESS, "")
