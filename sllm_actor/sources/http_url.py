"""Read the URL of a folder of files, believing nothing of it; never repeats what may be a password."""

from __future__ import annotations

import re
from urllib.parse import unquote

from yarl import URL

from sllm_actor.errors import SourceInvalid

MAX_URL_CHARS = 4096
_TEXT = re.compile(r"[\x21-\x7e]+")
_PARTS = re.compile(r"https?://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)", re.IGNORECASE)
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_MAX_HOST_CHARS = 253


def parse_folder(text: str) -> URL:
    """Return `http(s)://host[:port]/path/` in its one canonical form, with a slash at its end.

    Raises:
        SourceInvalid: it is none, or has credentials, a query or a fragment in it.
    """
    if len(text) > MAX_URL_CHARS:
        raise SourceInvalid(f"the source is longer than {MAX_URL_CHARS} characters", param="source")
    parts = _PARTS.fullmatch(text) if _TEXT.fullmatch(text) and "\\" not in text else None
    if parts is None:
        raise SourceInvalid("the source is no URL in printable ASCII, as http://host/folder/", param="source")
    if "@" in parts["authority"]:
        raise SourceInvalid("the source has credentials in its URL; put them into ~/.netrc instead", param="source")
    if parts["rest"]:
        raise SourceInvalid("the source has a query or a fragment in its URL, which a folder has not", param="source")
    if any(unquote(part) in (".", "..") for part in parts["path"].split("/")):
        raise SourceInvalid("the source has . or .. in its path", param="source")
    try:
        url = URL(text if parts["path"].endswith("/") else text + "/")
        named = is_reachable(url)
    except ValueError:
        named = False
    if not named:
        raise SourceInvalid("the source names no host that could be asked", param="source")
    return url.with_port(None) if url.is_default_port() else url


def is_reachable(url: URL) -> bool:
    """Tell whether a URL names a host, by an address or by a name that a resolver can be asked for, and a port."""
    host = url.raw_host or ""
    named = ":" in host or (len(host) <= _MAX_HOST_CHARS and _HOST.fullmatch(host) is not None)
    return url.scheme in ("http", "https") and named and url.port not in (None, 0)


def is_same_origin(one: URL, other: URL) -> bool:
    """Tell whether two URLs are of the same scheme, host and port."""
    return (one.scheme, one.raw_host, one.port) == (other.scheme, other.raw_host, other.port)


def place_of(url: URL) -> str:
    """Return a URL for messages: without a query, which may be a signature."""
    return str(url.with_query(None).with_fragment(None).with_user(None))
