"""API keys and what each may do, as a file keeps them: hashes, not keys.

A key that `new_key` makes has 256 random bits, which nobody finds by trying, so plain SHA-256 keeps it as safe as a
slow hash would, and a request is checked in microseconds. A key that a person has thought of belongs in no such file.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from sllm_actor.config.private_files import read_private_file
from sllm_actor.errors import ConfigInvalid

KNOB = "api_key_file"
MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_KEYS = 10_000
MAX_KEY_CHARACTERS = 4096
HEAD = "# API keys of a node: 'sllm-node keys' writes this file, which has their hashes.\n"

Bound = Annotated[int, Meta(ge=1, le=2**53)] | None


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key. A bound that is absent bounds nothing; `models` absent allows all, `admin` what `/admin` offers."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    requests_per_minute: Bound = None
    tokens_per_minute: Bound = None
    concurrent_requests: Bound = None
    # Its requests are taken as of no lower number: the lowest is served first.
    min_priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    models: Annotated[tuple[str, ...], Meta(max_length=1000)] | None = None
    admin: bool = False


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: Annotated[tuple[Key, ...], Meta(max_length=MAX_KEYS)] = ()


class Keyring:
    """The keys that are known, found by what a client presents."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self.keys = tuple(keys)
        self._by_hash = {key.sha256: key for key in self.keys}

    def find(self, presented: str) -> Key | None:
        """Find the key.

        The time that this takes tells of the hash alone, which tells nothing of the key.
        """
        if len(presented) > MAX_KEY_CHARACTERS:
            return None
        digest = digest_of(presented)
        key = self._by_hash.get(digest)
        return key if key is not None and hmac.compare_digest(key.sha256, digest) else None


def digest_of(key: str) -> str:
    """Give the hash under which a key is kept."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> str:
    """Make a key of 256 random bits."""
    return f"sllm-{secrets.token_urlsafe(32)}"


def read_keys(path: str) -> Keyring:
    """Read a file of keys, or one with a single plain key on its only line, which may do all. Blocks.

    Raises:
        ConfigInvalid: it can't be read, or is neither.
    """
    text = read_private_file(path, KNOB, MAX_FILE_BYTES)
    if not text.lstrip().startswith(("#", "[")):
        plain = text.strip()
        if len(plain.splitlines()) != 1:
            raise ConfigInvalid(f"{KNOB}: {path} has neither one key nor a [[keys]] table", param=KNOB)
        return Keyring([Key(name="default", sha256=digest_of(plain), admin=True)])
    try:
        keys = msgspec.convert(tomllib.loads(text), _File).keys
    except (ValueError, RecursionError) as error:
        raise ConfigInvalid(f"{KNOB}: {path}: {error}", param=KNOB) from None
    for field in ("name", "sha256"):
        if len({getattr(key, field) for key in keys}) < len(keys):
            raise ConfigInvalid(f"{KNOB}: {path}: two keys have the same {field}", param=KNOB)
    return Keyring(keys)


def written(keys: Iterable[Key]) -> str:
    """Write the file's text; `read_keys` reads it back."""
    parts = [HEAD]
    for key in keys:
        lines = [f"{name} = {_toml(value)}" for name, value in msgspec.to_builtins(key).items()]
        parts.append("\n".join(["\n[[keys]]", *lines, ""]))
    return "".join(parts)


def _toml(value: object) -> str:
    # TOML's basic strings, numbers, booleans and arrays of strings are written as JSON writes them.
    return msgspec.json.encode(value).decode()
