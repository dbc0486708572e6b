"""Python's search for cycles, kept short: often through what is young, through everything only in quiet.

An answer makes no cycles, so its objects go as soon as it ends. Python begins its passes by counts, in which old
objects that go offset new ones that come: beside a thousand streams it has few, but each through all that lives, which
holds the loop up for a tenth of a second and finds nothing. By the clock each is through little.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from sllm_actor.runtime import Clock

# Beside a thousand streams a pass through what has come meanwhile takes about ten milliseconds.
YOUNG_EVERY_S = 0.2
# Between passes through everything, of a node that answers nothing just then, and of one that always does.
QUIET_S = 60.0
BUSY_S = 1800.0


async def look_for_cycles(is_quiet: Callable[[], bool], clock: Clock) -> None:
    """Look for them by the clock instead of by Python's counts, until cancelled."""
    whole_s = clock.monotonic_s()
    gc.disable()
    try:
        while True:
            await clock.sleep(YOUNG_EVERY_S)
            gc.collect(0)
            if clock.monotonic_s() - whole_s >= (QUIET_S if is_quiet() else BUSY_S):
                gc.collect()
                whole_s = clock.monotonic_s()
    finally:
        gc.enable()
