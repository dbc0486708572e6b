"""`sllm-node keys`: make, list and revoke API keys in their file; a running node reads it again by itself."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from sllm_actor.cli.fitting import Column
from sllm_actor.cli.names import nearest
from sllm_actor.cli.show import out, print_json, table
from sllm_actor.errors import ConfigInvalid
from sllm_actor.frontend.keys import KNOB, Key, digest_of, new_key, read_keys, written


def create(path: str, name: str, bounds: dict[str, Any], *, as_json: bool) -> None:
    """Add a key and print it, once: the file has its hash alone.

    Raises:
        ConfigInvalid: there is one of that name, or something is out of bounds.
    """
    key = new_key()
    given = {field: value for field, value in bounds.items() if value is not None}
    try:
        made = msgspec.convert({"name": name, "sha256": digest_of(key), **given}, Key)
    except msgspec.ValidationError as error:
        raise ConfigInvalid(str(error), param="name") from None
    with _changing(path) as keys:
        if name in {known.name for known in keys}:
            raise ConfigInvalid(f"there is a key named {name} already", param="name")
        keys.append(made)
    if as_json:
        print_json({"name": name, "key": key})
    else:
        out.print(f"{key}\nThis is the only time that it is shown; {path} has its hash.")


def revoke(path: str, name: str, *, as_json: bool) -> None:
    """Take a key out.

    Raises:
        ConfigInvalid: there is none of that name.
    """
    with _changing(path) as keys:
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            meant = nearest(name, (key.name for key in keys))
            raise ConfigInvalid(f"there is no key named {name}{meant and f'; {meant}'}", param="name")
        keys[:] = left
    print_json({"revoked": name}) if as_json else out.print(f"revoked {name}")


KEYS = (
    Column("NAME"), Column("SHA256", 2), Column("REQUESTS/MIN", 4), Column("TOKENS/MIN", 5), Column("AT ONCE", 6),
    Column("PRIORITY FROM", 7), Column("MODELS", 1, wraps=True), Column("ADMIN", 3),
)  # fmt: skip


def show(path: str, *, as_json: bool) -> None:
    """List the keys and what each may do."""
    keys = read_keys(path).keys
    if as_json:
        print_json({"keys": [{**msgspec.to_builtins(key), "sha256": key.sha256[:12]} for key in keys]})
        return
    rows = [
        (
            key.name, key.sha256[:12], _bound(key.requests_per_minute), _bound(key.tokens_per_minute),
            _bound(key.concurrent_requests), _bound(key.min_priority),
            "all" if key.models is None else " ".join(key.models), "yes" if key.admin else "no",
        )
        for key in keys
    ]  # fmt: skip
    table(KEYS, rows)


def _bound(value: int | None) -> str:
    return "any" if value is None else str(value)


@contextmanager
def _changing(path: str) -> Iterator[list[Key]]:
    """Give the keys to be changed, and write them as a whole; who comes at the same time waits."""
    target = Path(path).expanduser()
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = list(read_keys(path).keys) if target.exists() else []
        yield keys
        _replace(target, written(keys).encode())
        os.fsync(folder)
    except OSError as error:
        raise ConfigInvalid(f"{KNOB}: {path} can't be written: {error.strerror}", param=KNOB) from None
    finally:
        os.close(folder)


def _replace(target: Path, data: bytes) -> None:
    """Write the file so that it is the old or the new one whenever the machine stops."""
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(fd, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(fd)
        fresh.replace(target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
