"""Find the kind of source that a user's words name. A new kind is a line in the table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from sllm_actor.errors import SourceInvalid
from sllm_actor.sources.folder import resolve
from sllm_actor.sources.http import HttpSource
from sllm_actor.sources.hub import HubSource
from sllm_actor.sources.s3 import S3Source
from sllm_actor.sources.source import Source, SourceOptions

OpenRemote = Callable[[str, SourceOptions], Source]
REMOTE: Mapping[str, OpenRemote] = {
    "hf": HubSource,
    "http": HttpSource,
    "https": HttpSource,
    "s3": S3Source,
}
NONE: Mapping[str, OpenRemote] = {}
LOCAL = ("builtin", "file")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31})(?=://)|hf(?=:)")


def is_local(text: str) -> bool:
    """Tell whether a source is a folder of this machine: a path, `file:///path` or `builtin:NAME`."""
    return _scheme_of(text) in ("", *LOCAL)


def open_source(
    text: str,
    options: SourceOptions,
    builtin: Mapping[str, Path],
    open_folder: Callable[[Path], Source],
    others: Mapping[str, OpenRemote] = NONE,
) -> Source:
    """Return the source that `text` names; nothing of it is opened or asked yet, and the caller closes it.

    `others` has the kinds that take more than options, by scheme.

    Raises:
        SourceInvalid: no source has such a name; the message repeats nothing that may be a password.
    """
    scheme = _scheme_of(text)
    if scheme in ("", *LOCAL):
        return open_folder(resolve(text, builtin))
    kinds = {**REMOTE, **others}
    if scheme not in kinds:
        known = ", ".join(sorted((*kinds, *LOCAL)))
        raise SourceInvalid(f"there is no kind of source {scheme}://; there are: {known}, and a path", param="source")
    return kinds[scheme](text, options)


def _scheme_of(text: str) -> str:
    match = _SCHEME.match(text)
    return match.group().lower() if match else ""
