"""Where each knob's value comes from: flags over `SLLM_*` variables over one TOML file over defaults."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from sllm_actor.config.bounds import check
from sllm_actor.config.knobs import Config
from sllm_actor.errors import ConfigInvalid
from sllm_actor.units import parse_bytes, parse_duration_s

PREFIX = "SLLM_"
MAX_FILE_BYTES = 1024 * 1024
# Variables of ours that are not knobs of a node.
NOT_KNOBS = frozenset({"SLLM_NO_NATIVE", "SLLM_URL", "SLLM_API_KEY", "SLLM_CONFIG", "SLLM_TEMPLATE"})


class Resolved(msgspec.Struct, frozen=True):
    """A checked configuration; `origin` names, for each knob, `default`, a file, a variable or `flag`."""

    config: Config
    origin: dict[str, str]


class Knob(msgspec.Struct, frozen=True):
    """One knob as `doctor` and the documentation show it."""

    name: str
    unit: str
    default: Any
    description: str


def _flat(annotation: Any) -> tuple[Any, list[msgspec.Meta]]:
    metas: list[msgspec.Meta] = []
    while get_origin(annotation) is not None and hasattr(annotation, "__metadata__"):
        metas = [meta for meta in annotation.__metadata__ if isinstance(meta, msgspec.Meta)] + metas
        annotation = get_args(annotation)[0]
    return annotation, metas


def knobs() -> list[Knob]:
    """List every knob with its unit, default and description, in the order of `Config`."""
    hints = get_type_hints(Config, include_extras=True)
    found = []
    for field in msgspec.structs.fields(Config):
        _, metas = _flat(hints[field.name])
        unit = next((meta.title for meta in metas if meta.title), "")
        description = next((meta.description for meta in metas if meta.description), "")
        found.append(Knob(field.name, unit, field.default, description))
    return found


def _from_text(knob: Knob, text: str) -> Any:
    """Read a flag's or variable's text as the knob's type; sizes and durations may carry units."""
    if isinstance(knob.default, bool):
        lowered = text.strip().lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
        raise ValueError(f"{text!r} is not true or false")
    parsers: dict[str, Callable[[str], Any]] = {"bytes": parse_bytes, "s": _duration}
    if knob.unit in parsers:
        value = parsers[knob.unit](text)
        return int(value) if isinstance(knob.default, int) and value == value // 1 else value
    return int(text) if isinstance(knob.default, int) else text


def _duration(text: str) -> float:
    return float("inf") if text.strip().lower() in ("inf", "forever") else parse_duration_s(text)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        # A pipe or a device could give bytes for ever, or none.
        if not path.is_file():
            raise ConfigInvalid(f"there is no configuration file {path}")
        with path.open("rb") as opened:
            raw = opened.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigInvalid(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        return tomllib.loads(raw.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigInvalid(f"can't read the configuration file {path}: {error}") from error


def resolve(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, str | int | float | bool] | None = None,
) -> Resolved:
    """Put the layers together and check every value.

    Raises:
        ConfigInvalid: a knob is unknown, of a wrong type or out of bounds; the message names it and its origin.
    """
    known = {knob.name: knob for knob in knobs()}
    annotations = get_type_hints(Config, include_extras=True)
    values: dict[str, Any] = {}
    origin = dict.fromkeys(known, "default")

    def put(name: str, value: Any, where: str) -> None:
        if name not in known:
            near = difflib.get_close_matches(name[:64], known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigInvalid(f"{where}: there is no knob {name[:64]!r}{hint}", param=name[:64])
        try:
            values[name] = _from_text(known[name], value) if isinstance(value, str) else value
            check(name, values[name], annotations[name])
        except ConfigInvalid as error:
            raise ConfigInvalid(f"{where}: {error.message}", param=name) from error
        except ValueError as error:
            raise ConfigInvalid(f"{where}: {name}: {error}", param=name) from error
        origin[name] = where

    if file is not None:
        for name, value in _read_file(file).items():
            put(name, value, str(file))
    for variable, text in sorted((environment or {}).items()):
        if variable.startswith(PREFIX) and variable not in NOT_KNOBS:
            put(variable.removeprefix(PREFIX).lower(), text, variable)
    for name, value in (flags or {}).items():
        put(name, value, "flag")
    try:
        return Resolved(config=msgspec.convert(values, Config), origin=origin)
    except ConfigInvalid as error:
        # Knobs that are right one by one and wrong together.
        where = origin[error.param or ""]
        raise ConfigInvalid(f"{where}: {error.message}", param=error.param) from error
