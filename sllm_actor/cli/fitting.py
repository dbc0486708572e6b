"""Tables that fit a terminal: what is less important goes before anything is folded, and nothing is cut off. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

GAP = 1


class Column(NamedTuple):
    """A column and how important it is; the first one of a table, and all at 0, are always shown."""

    name: str
    rank: int = 0
    right: bool = False


Row = Sequence[str]


def fitted(columns: Sequence[Column], rows: Sequence[Row], width: int) -> Table:
    """Give a table that is no wider than `width`: without its columns of the highest ranks, where it must be."""
    widths = [
        max(cell_len(text) for text in (column.name, *(row[at] for row in rows))) for at, column in enumerate(columns)
    ]
    kept = list(range(len(columns)))
    while sum(widths[at] + GAP for at in kept) - GAP > width:
        least = max(kept, key=lambda at: (columns[at].rank, at))
        if not columns[least].rank:
            break
        kept.remove(least)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for at in kept:
        table.add_column(columns[at].name, overflow="fold", justify="right" if columns[at].right else "left")
    for row in rows:
        # What comes from elsewhere is text, never markup.
        table.add_row(*(Text(row[at]) for at in kept))
    return table


def shares(wanted: Sequence[int], room: int, least: int) -> list[int]:
    """Divide lines among sections: each what it wants, or an equal part; where that is less than `least`, none.

    The first come first where there is not enough for all.
    """
    given = [0] * len(wanted)
    for at, want in enumerate(wanted):
        given[at] = min(want, least) if min(want, least) <= room else 0
        room -= given[at]
    while room > 0 and (short := [at for at, want in enumerate(wanted) if 0 < given[at] < want]):
        for at in short[:room]:
            given[at] += 1
            room -= 1
    return given
