"""What `load` measures, and which ratios come of it. Pure: names and arithmetic.

A case is one measurement; a part is the cases that belong together, by which a person can choose them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

COLD, CACHED, POOL, TWO, WATCHED = "cold", "page-cached", "host pool", "two at once", "cold, watched"
STOCK, SHARDED, OPTIMIZED, BIN, TENSORS = "stock", "sharded", "optimized", "bin", "tensors"
OURS, SMALL, LIMIT, MEMCPY, STEP = "ours", "ours, small pages", "limit", "memcpy", "step"
MAIN, MANY = "opt-1.3b", "many"
OTHERS = ("opt-125m", "llama-1gb", "lora")
SHARDS = 3
LIMIT_BLOCKS_MIB = (4, 8, 16)
MMAP = "safetensors"
READERS = (MMAP, "from_pretrained", "fastsafetensors", "runai-model-streamer")
FORMATS = {"tensorizer": TENSORS, "torch.load": BIN, "torch.load mmap": BIN}
PEERS = (*READERS, *FORMATS)


class Case(NamedTuple):
    """One measurement: a system brings a shape, in a layout of files, out of a state."""

    state: str
    shape: str
    layout: str
    system: str
    # Of a limit its block or threads, of the ablation its step.
    variant: str = ""

    @property
    def folder(self) -> str:
        """The name of the folder that it reads."""
        return self.shape if self.layout == STOCK else f"{self.shape}-{self.layout}"

    @property
    def label(self) -> str:
        """The system, as the report names it."""
        parts = [self.system, self.variant, self.layout if self.system in (OURS, SMALL) else ""]
        return ", ".join(part for part in parts if part)


# What was measured of each case in one repeat, and in all of them.
Found = Mapping[Case, Mapping[str, Any]]
Run = Sequence[Found]
Ratio = Callable[[Run], list[float]]


def _ours(state: str, shape: str, *layouts: str) -> list[Case]:
    return [Case(state, shape, layout, OURS) for layout in layouts]


def _peers(state: str, shape: str, systems: Sequence[str]) -> list[Case]:
    return [Case(state, shape, FORMATS.get(system, STOCK), system) for system in systems]


def _limit(block_mib: int) -> Case:
    return Case(COLD, MAIN, OPTIMIZED, LIMIT, f"O_DIRECT, 4 threads, {block_mib} MiB")


LIMITS = {_limit(block_mib): block_mib for block_mib in LIMIT_BLOCKS_MIB}
COPIES = {Case(CACHED, MAIN, OPTIMIZED, MEMCPY, f"{n} thread{'s' * (n > 1)}"): n for n in (1, 2)}
# The names are `load_steps`'; the last two steps are ours with overlap off and on.
STEPS = ("by tensor", "bulk", "direct", "threads", "pool", "pipeline")
ABLATION = [Case(COLD, MAIN, OPTIMIZED, STEP, f"{k}. {name}") for k, name in enumerate(STEPS, start=1)]
OPTIMIZED_COLD, STOCK_COLD, SHARDED_COLD = _ours(COLD, MAIN, OPTIMIZED, STOCK, SHARDED)
OPTIMIZED_CACHED, STOCK_CACHED, SHARDED_CACHED = _ours(CACHED, MAIN, OPTIMIZED, STOCK, SHARDED)
IN_POOL, MANY_IN_POOL = Case(POOL, MAIN, OPTIMIZED, OURS), Case(POOL, MANY, OPTIMIZED, OURS)
IN_SMALL_POOL, INTO_SMALL_POOL = Case(POOL, MAIN, OPTIMIZED, SMALL), Case(COLD, MAIN, OPTIMIZED, SMALL)
BOTH = Case(TWO, MAIN, OPTIMIZED, OURS)
BEYOND_POOL = Case(WATCHED, MAIN, OPTIMIZED, OURS)
MANY_MMAP, MANY_CACHED = Case(CACHED, MANY, STOCK, MMAP), Case(CACHED, MANY, OPTIMIZED, OURS)
PEERS_CACHED = _peers(CACHED, MAIN, PEERS)


def _of_shape(state: str, shape: str) -> list[Case]:
    # An adapter is no model, and of a mixture's small experts transformers would make other tensors.
    readers = [system for system in READERS if system != "from_pretrained" or shape not in ("lora", MANY)]
    return [*_ours(state, shape, OPTIMIZED, STOCK), *_peers(state, shape, readers)]


# The limits stand between the others, so that none is far from one.
PARTS: dict[str, list[Case]] = {
    "cold": [
        OPTIMIZED_COLD, _limit(8), STOCK_COLD, *_peers(COLD, MAIN, READERS), _limit(16), INTO_SMALL_POOL, SHARDED_COLD,
        *_peers(COLD, MAIN, tuple(FORMATS)), _limit(4),
    ],
    "pagecached": [OPTIMIZED_CACHED, SHARDED_CACHED, STOCK_CACHED, *PEERS_CACHED, *COPIES],
    "pool": [IN_POOL, IN_SMALL_POOL, *PEERS_CACHED],
    "memory": [BEYOND_POOL],
    "two": [BOTH, *LIMITS],
    "ablation": ABLATION,
    "shapes": [case for state in (COLD, CACHED) for shape in OTHERS for case in _of_shape(state, shape)],
    "many": [*_of_shape(COLD, MANY), *_of_shape(CACHED, MANY), MANY_IN_POOL],
}  # fmt: skip
STATES = (COLD, WATCHED, TWO, CACHED, POOL)


def chosen(parts: Sequence[str]) -> list[Case]:
    """List the cases of these parts, each once, in the order of the states."""
    cases = dict.fromkeys(case for part in parts for case in PARTS[part])
    return sorted(cases, key=lambda case: STATES.index(case.state))


def in_turn(cases: Sequence[Case], repeat: int, repeats: int) -> list[Case]:
    """Order the cases of a repeat: within each state everyone begins where the one before has not."""
    ordered: list[Case] = []
    for state in STATES:
        own = [case for case in cases if case.state == state]
        first = repeat * max(1, len(own) // repeats) % max(1, len(own))
        ordered += own[first:] + own[:first]
    return ordered


def _fastest(run: Run, cases: Iterable[Case]) -> Case | None:
    """Pick the case of the lowest median: the lowest of single measurements would be the luckiest."""
    times = {case: [found[case]["s"] for found in run if case in found] for case in cases}
    medians = {case: statistics.median(values) for case, values in times.items() if values}
    return min(medians, key=medians.__getitem__, default=None)


def _over(run: Run, best_of: Iterable[Case], case: Case) -> list[float]:
    """Divide the fastest of `best_of` by `case`, in each repeat in which both were measured."""
    best = _fastest(run, best_of)
    if best is None:
        return []
    return [found[best]["s"] / found[case]["s"] for found in run if best in found and case in found]


def _two(run: Run) -> list[float]:
    """Divide the rate of two loads at once by that of the limit."""
    best = _fastest(run, LIMITS)
    if best is None:
        return []
    return [_rate(found[BOTH]) / _rate(found[best]) for found in run if best in found and BOTH in found]


def _rate(measured: Mapping[str, Any]) -> float:
    return float(measured["size_bytes"] / measured["s"])


def _copying(run: Run) -> list[Case]:
    """Tell which peers have copied, which the peers' own processes found out: none of their tensors is in a file."""
    return [case for case in PEERS_CACHED if any(case in found and not found[case]["maps_files"] for found in run)]


def _in_huge_pages(run: Run) -> Run:
    """Give the repeats in which the pool that was mapped from lay in huge pages altogether."""
    return [found for found in run if IN_POOL in found and found[IN_POOL]["in_huge_pages"]]


def _of_ours(name: str, case: Case, per_gb: bool = False) -> Ratio:
    def values(run: Run) -> list[float]:
        measured = [found[case] for found in run if case in found]
        return [float(each[name] / (each["size_bytes"] / 1e9 if per_gb else 1)) for each in measured]

    return values


# One value for each repeat. The best peer is the one of the lowest median in this run, and so is the best limit.
RATIOS: dict[str, Ratio] = {
    "cold.share_of_limit": lambda run: _over(run, LIMITS, OPTIMIZED_COLD),
    "cold.over_best_safetensors_reader": lambda run: _over(run, _peers(COLD, MAIN, READERS), OPTIMIZED_COLD),
    "cold.over_best_peer": lambda run: _over(run, _peers(COLD, MAIN, PEERS), OPTIMIZED_COLD),
    "stock.share_of_optimized": lambda run: _over(run, [OPTIMIZED_COLD], STOCK_COLD),
    "pagecached.over_best_peer": lambda run: _over(run, PEERS_CACHED, OPTIMIZED_CACHED),
    "pool.over_best_copying_peer": lambda run: _over(run, _copying(run), IN_SMALL_POOL),
    "pool_huge.over_mmap": lambda run: _over(_in_huge_pages(run), _peers(CACHED, MAIN, [MMAP]), IN_POOL),
    "cold.cpu_s_per_gb": _of_ours("cpu_s", OPTIMIZED_COLD, per_gb=True),
    "cold_small.share_of_limit": lambda run: _over(run, LIMITS, INTO_SMALL_POOL),
    "cold_small.cpu_s_per_gb": _of_ours("cpu_s", INTO_SMALL_POOL, per_gb=True),
    "cold.memory_beyond_pool_mib": _of_ours("beyond_pool_mib", BEYOND_POOL),
    "many.attach_over_load_file": lambda run: _over(run, [MANY_IN_POOL], MANY_MMAP),
    "many.cached_over_load_file": lambda run: _over(run, [MANY_CACHED], MANY_MMAP),
    "two.share_of_limit": _two,
}
