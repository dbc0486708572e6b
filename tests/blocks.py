"""The code blocks of the pages: where they are, why one is not run, and which commands stand in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(sllm-node [^`\n]+)`")


class Block(NamedTuple):
    """A block of a page; `reason` says why it is not run, where it is not."""

    page: Path
    number: int
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page.name}-{self.number}-{self.language}"


def blocks(pages: list[Path], *languages: str) -> list[Block]:
    return [
        Block(page, number, language, text, reason or "")
        for page in pages
        for number, (reason, language, text) in enumerate(BLOCK.findall(page.read_text()))
        if not languages or language in languages
    ]


def commands(text: str) -> Iterator[list[str]]:
    """Give the words behind each `sllm-node` of a shell's text."""
    text = re.sub(r"(?:^|\s)#[^\n]*", "", text.replace("\\\n", " "))
    for part in re.split(r"\n|;|&&|\|\||\||&(?!&)", text):
        try:
            words = shlex.split(part)
        except ValueError:
            words = part.split()
        for place, word in enumerate(words):
            if word.rpartition("/")[2] == "sllm-node":
                yield words[place + 1 :]
                break
