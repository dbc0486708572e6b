"""Traces that others have published, as requests: Azure's functions and LLM inferences, Mooncake's conversations.

Each row is checked, and one that is wrong is named by its line. A trace is an input from outside: its size is bounded.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from sllm_actor.errors import InvalidInput
from sllm_actor.testing.workloads import Arrival, Length, bounded
from sllm_actor.units import MIB

MAX_BYTES = 1024 * MIB
MAX_ROWS = 5_000_000
MAX_LINE_CHARACTERS = 1_000_000
# What a row has too much of is under this name, which no column can have: a line ends with it.
SURPLUS = "\n"


class MooncakeRow(msgspec.Struct, frozen=True):
    """A line of Mooncake's traces: milliseconds from the beginning, and lengths in tokens."""

    timestamp: float
    input_length: int
    output_length: int


def function_minutes(path: Path, minutes: int) -> Iterator[list[float]]:
    """Give how often each function of Azure's functions trace (2019) is invoked in each of its first so many minutes.

    Raises:
        InvalidInput: it is no such trace, or a shorter one.
    """
    names = [f"minute_{number}" for number in range(1, minutes + 1)]
    for number, row in _rows(path):
        has = _minutes(path, row)
        if missing := [name for name in names if name not in row]:
            raise InvalidInput(f"{path} has {len(has)} minutes, and {minutes} are needed: no column is {missing[0]}")
        yield [_number(path, number, row, name) for name in names]


def function_counts(path: Path) -> list[float]:
    """Count the invocations of each function of Azure's functions trace (2019), one function a line.

    Raises:
        InvalidInput: it is no such trace.
    """
    counts = []
    for number, row in _rows(path):
        counts.append(sum(_number(path, number, row, name) for name in _minutes(path, row)))
    if not sum(counts):
        raise InvalidInput(f"{path}: nothing is invoked in it")
    return counts


def _minutes(path: Path, row: dict[str, Any]) -> list[str]:
    minutes = [name for name in row if name.startswith("minute_")]
    if not minutes:
        raise InvalidInput(f"{path}: no column is called minute_1, minute_2, …; is it of Azure's functions?")
    return minutes


def azure_inferences(path: Path) -> list[Arrival]:
    """Read Azure's LLM inference traces (2023): all of them are asked of one model.

    Raises:
        InvalidInput: it is no such trace.
    """
    found, first_s = list[Arrival](), None
    for number, row in _rows(path):
        try:
            # Its fractions have seven digits, of which Python takes six.
            at_s = datetime.fromisoformat(str(row.get("TIMESTAMP"))[:26]).timestamp()
        except ValueError:
            raise InvalidInput(f"{path}, line {number}: TIMESTAMP {row.get('TIMESTAMP')!r} is no time") from None
        first_s = at_s if first_s is None else first_s
        length = _length(path, number, row, "ContextTokens", "GeneratedTokens")
        found.append(Arrival(at_s - first_s, 0, *length))
    return _in_order(path, found)


def mooncake(path: Path) -> list[Arrival]:
    """Read a trace of Mooncake's form: a JSON object a line.

    Raises:
        InvalidInput: it is no such trace.
    """
    found, decoder = list[Arrival](), msgspec.json.Decoder(MooncakeRow)
    for number, line in enumerate(_lines(path), 1):
        try:
            row = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeEncodeError) as error:
            raise InvalidInput(f"{path}, line {number}: {error}") from None
        if row.timestamp < 0 or row.input_length < 0 or row.output_length < 0:
            raise InvalidInput(f"{path}, line {number}: a number below 0")
        found.append(Arrival(row.timestamp / 1000, 0, *bounded(row.input_length, row.output_length)))
    return _in_order(path, found)


def seen_lengths(path: Path) -> list[Length]:
    """Read the lengths of a trace of either form, by what its name ends with.

    Raises:
        InvalidInput: it is neither.
    """
    return [Length(one.prompt_tokens, one.new_tokens) for one in read_trace(path)]


def read_trace(path: Path) -> list[Arrival]:
    """Read `.csv` as Azure's inferences, `.jsonl` as Mooncake's.

    Raises:
        InvalidInput: it is neither.
    """
    if path.suffix == ".csv":
        return azure_inferences(path)
    if path.suffix == ".jsonl":
        return mooncake(path)
    raise InvalidInput(f"{path}: a trace's name ends with .csv or .jsonl")


def _lines(path: Path) -> Iterator[str]:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_BYTES:
            raise InvalidInput(f"{path} has {size_bytes:,} bytes, more than {MAX_BYTES:,}")
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_CHARACTERS), ""), 1):
                if number > MAX_ROWS:
                    raise InvalidInput(f"{path} has more than {MAX_ROWS:,} lines")
                if line.strip():
                    yield line
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: {error}") from None


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        for number, row in enumerate(csv.DictReader(_lines(path), restkey=SURPLUS), 2):
            if SURPLUS in row:
                raise InvalidInput(f"{path}, line {number}: it has more columns than the first line names")
            yield number, row
    except csv.Error as error:
        raise InvalidInput(f"{path}: {error}") from None


def _number(path: Path, line: int, row: dict[str, Any], name: str) -> float:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        raise InvalidInput(f"{path}, line {line}: {name} is {json.dumps(row.get(name))}, no number") from None
    if not 0 <= value < 1e12:
        raise InvalidInput(f"{path}, line {line}: {name} is {value}")
    return value


def _length(path: Path, line: int, row: dict[str, Any], prompt: str, new: str) -> Length:
    return bounded(int(_number(path, line, row, prompt)), int(_number(path, line, row, new)))


def _in_order(path: Path, arrivals: list[Arrival]) -> list[Arrival]:
    if not arrivals:
        raise InvalidInput(f"{path}: it has no request")
    return sorted(arrivals)
