"""Turn what a user names as a source into a local folder. Opens nothing, nor asks whether it exists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sllm_actor.errors import SourceInvalid

MAX_SOURCE_CHARS = 4096
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def resolve(source: str, builtin: Mapping[str, Path]) -> Path:
    """Return the absolute folder that `source` names: `builtin:NAME`, `file:///path` or a path.

    Raises:
        SourceInvalid: it names nothing, or something that is not a local folder.
    """
    _check_text(source)
    if source.startswith("builtin:"):
        return _builtin(source.removeprefix("builtin:"), builtin)
    scheme = _SCHEME.match(source)
    if scheme is None:
        return _absolute(source)
    if scheme.group().lower() != "file":
        raise SourceInvalid(
            f"{source!r}: only folders are supported in this version, not {scheme.group()}://", param="source"
        )
    return _absolute(_path_of_url(source))


def _check_text(source: str) -> None:
    if not source.strip():
        raise SourceInvalid("the source is empty", param="source")
    if len(source) > MAX_SOURCE_CHARS:
        raise SourceInvalid(f"the source is longer than {MAX_SOURCE_CHARS} characters", param="source")
    if _CONTROL.search(source):
        raise SourceInvalid("the source holds a control character", param="source")


def _builtin(name: str, builtin: Mapping[str, Path]) -> Path:
    if name not in builtin:
        known = ", ".join(sorted(builtin)) or "none"
        raise SourceInvalid(f"there is no builtin model {name!r}; there are: {known}", param="source")
    return builtin[name].resolve()


def _path_of_url(source: str) -> str:
    url = urlsplit(source)
    if url.netloc not in ("", "localhost") or url.query or url.fragment or not url.path:
        raise SourceInvalid(f"{source!r} is not of the form file:///folder", param="source")
    path = unquote(url.path)
    _check_text(path)
    return path


def _absolute(path: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as wrong:
        raise SourceInvalid(f"{path!r} can't be resolved: {wrong}", param="source") from None
