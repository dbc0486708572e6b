"""Learn a tier's bandwidth from the loads that were seen. Pure."""

from __future__ import annotations

WEIGHT = 0.3
SMALLEST_BYTES = 4 * 1024 * 1024


def corrected(estimate_bytes_per_s: float, size_bytes: int, duration_s: float) -> float:
    """Move the estimate towards an observed load (exponential average).

    Loads too small to tell bandwidth from latency leave it as it is.
    """
    if size_bytes < SMALLEST_BYTES or duration_s <= 0:
        return estimate_bytes_per_s
    return (1 - WEIGHT) * estimate_bytes_per_s + WEIGHT * size_bytes / duration_s
