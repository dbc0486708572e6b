"""Tables that fit a terminal: prose is folded between words, then what matters less goes; nothing is cut off. Pure.

What people copy has no blank in it, so that no name is ever folded but by a terminal that is narrower than the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

GAP = 1


class Column(NamedTuple):
    """A column and how important it is; the first one of a table, and all at 0, are always shown.

    One that `wraps` has prose or several names, which may be on lines of their own.
    """

    name: str
    rank: int = 0
    right: bool = False
    wraps: bool = False


Cell = str | Text
Row = Sequence[Cell]


def fitted(columns: Sequence[Column], rows: Sequence[Row], width: int, *, may_fold: bool = True) -> Table:
    """Give a table that is no wider than `width`: without its columns of the highest ranks, where it must be.

    What is still too wide is folded, or left for the terminal to go on with in its next line unless it `may_fold`.
    """
    cells = [[column.name, *(_plain(row[at]) for row in rows)] for at, column in enumerate(columns)]
    wanted = [max(map(cell_len, texts)) for texts in cells]
    least = [_least(cells[at]) if column.wraps else wanted[at] for at, column in enumerate(columns)]
    kept = list(range(len(columns)))
    while sum(least[at] + GAP for at in kept) - GAP > width:
        last = max(kept, key=lambda at: (columns[at].rank, at))
        if not columns[last].rank:
            break
        kept.remove(last)
    room = width - (len(kept) - 1) * GAP - sum(least[at] for at in kept)
    widths = _widened([least[at] for at in kept], [wanted[at] for at in kept], room)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for at, characters in zip(kept, widths, strict=True):
        table.add_column(
            columns[at].name, overflow="fold", justify="right" if columns[at].right else "left",
            width=characters if room >= 0 or not may_fold else None,
        )  # fmt: skip
    for row in rows:
        # What comes from elsewhere is text, never markup.
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in (row[at] for at in kept)))
    return table


def _plain(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell.plain


def _least(texts: Sequence[str]) -> int:
    return max((cell_len(word) for text in texts for word in text.split()), default=0)


def _widened(least: Sequence[int], wanted: Sequence[int], room: int) -> list[int]:
    """Give each as much more of the room as it wants, those first that want little; the others share the rest."""
    widths = list(least)
    short = sorted(range(len(least)), key=lambda at: wanted[at] - least[at])
    for place, at in enumerate(short):
        more = min(wanted[at] - least[at], max(0, room) // (len(short) - place))
        widths[at] += more
        room -= more
    return widths


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
