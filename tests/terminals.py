"""A program in a real pseudo-terminal of a chosen size, and what a person would see there (pyte interprets it)."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyte

PATIENCE_S = 120.0


class Terminal:
    """`screen` is what is seen; `ended` waits for the program's end and gives its exit status."""

    def __init__(self, process: subprocess.Popen[bytes], end: int, columns: int, lines: int) -> None:
        self._process = process
        self._end = end
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""

    @property
    def lines(self) -> list[str]:
        """What is seen, line by line."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def until(self, seen: Callable[[str], bool]) -> str:
        """Read until the screen is so; give what is on it then."""
        while not seen(self.text):
            assert self._read(), f"the program has ended; on the screen is\n{self.text}"
        return self.text

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size; the kernel tells the program."""
        self._screen.resize(lines, columns)
        _set_size(self._end, columns, lines)

    def type(self, keys: bytes) -> None:
        os.write(self._end, keys)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def ended(self) -> int:
        while self._read():
            pass
        return self._process.wait(PATIENCE_S)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._end], [], [], PATIENCE_S)
        assert ready, f"nothing more is written; on the screen is\n{self.text}"
        # Linux says EIO when nobody has the other end open any more.
        data = b""
        with suppress(OSError):
            data = os.read(self._end, 65536)
        self.raw += data
        self._stream.feed(data)
        return bool(data)


def _set_size(end: int, columns: int, lines: int) -> None:
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


@contextmanager
def in_terminal(
    words: list[str | Path], columns: int, lines: int, environment: dict[str, str] | None = None
) -> Iterator[Terminal]:
    """Run a program in a terminal of its own, from whose keys its signals come."""
    ours, theirs = pty.openpty()
    _set_size(ours, columns, lines)
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    try:
        with subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=known | {"TERM": "xterm-256color"} | (environment or {}),
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        ) as process:  # fmt: skip
            os.close(theirs)
            try:
                yield Terminal(process, ours, columns, lines)
            finally:
                process.kill()
    finally:
        os.close(ours)
