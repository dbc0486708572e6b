"""The exit codes of every verb, and what each means; docs/cli.md has the same table."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What a program learns from a verb's end."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    NO_NODE = 3
    WARNINGS = 4
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.DONE: "done; of `top`: it was ended with Ctrl-C",
    ExitCode.REFUSED: "the node, a file or this machine refused; of `doctor`: a node would not start",
    ExitCode.USAGE: "wrong usage: no such verb, flag or value",
    ExitCode.NO_NODE: "no node answers, or the one that did has gone",
    ExitCode.WARNINGS: "`doctor` alone: a node would start, and something makes it slower or smaller",
    ExitCode.INTERRUPTED: "ended with Ctrl-C before it was done",
}
