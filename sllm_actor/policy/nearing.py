"""When a download is so near its end that whatever should be ready by then has to be begun. Pure."""

from __future__ import annotations


def is_near(
    left_bytes: int, arrived_bytes: int, elapsed_s: float, *, under_way_bytes: int, bytes_per_s: float, ahead_s: float
) -> bool:
    """Tell whether what is left, beyond what is under way, comes within `ahead_s`.

    Pieces that are under way may all arrive at the next moment. `bytes_per_s` is believed until something has arrived.
    """
    seen_bytes_per_s = arrived_bytes / elapsed_s if arrived_bytes and elapsed_s > 0 else bytes_per_s
    return left_bytes <= under_way_bytes + ahead_s * seen_bytes_per_s
