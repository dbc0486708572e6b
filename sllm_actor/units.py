"""Bytes and seconds as people write them, and back. No I/O, no state."""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_BYTES = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": TIB, "tib": TIB, "tb": 1000**4,
}  # fmt: skip
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{0,3})\s*")


def _parse(text: str, scale: dict[str, int] | dict[str, float], example: str) -> float:
    match = _QUANTITY.fullmatch(text)
    factor = scale.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a quantity such as {example}")
    return float(match.group(1)) * factor


def parse_bytes(text: str) -> int:
    """Read a size such as `4GiB`, `500MB` or `1048576` as bytes.

    Raises:
        ValueError: the text is not a size.
    """
    return int(_parse(text, _BYTES, "4GiB"))


def parse_duration_s(text: str) -> float:
    """Read a duration such as `5m`, `1.5h`, `250ms` or `30` as seconds.

    Raises:
        ValueError: the text is not a duration.
    """
    return _parse(text, _SECONDS, "5m")


def format_bytes(size_bytes: float) -> str:
    """Write a size with a decimal unit, as disks and networks are sold: `2.6 GB`."""
    for factor, unit in ((1000**4, "TB"), (1000**3, "GB"), (1000**2, "MB"), (1000, "kB")):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def format_seconds(duration_s: float) -> str:
    """Write a duration with three significant figures: `183 ms`, `2.41 s`, `4.5 min`."""
    if duration_s < 0.001:
        return f"{duration_s * 1e6:.0f} µs"
    if duration_s < 0.1:
        return f"{duration_s * 1e3:.1f} ms"
    if duration_s < 1:
        return f"{duration_s * 1e3:.0f} ms"
    if duration_s < 120:
        return f"{duration_s:.2f} s"
    return f"{duration_s / 60:.1f} min"


def format_rate(size_bytes: float, duration_s: float) -> str:
    """Write a bandwidth in GB/s, or a dash where no time was spent."""
    return f"{size_bytes / duration_s / 1e9:.2f} GB/s" if duration_s > 0 else "-"
