"""How a checkpoint wants its texts made into vectors: the files that sentence-transformers writes beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from sllm_actor.checkpoint.bounded import read_bounded
from sllm_actor.domain import Pooling
from sllm_actor.domain.sentence_modules import (
    LENGTH_NAMES,
    MAX_MODULES_BYTES,
    MODULES_NAME,
    Modules,
    are_computed,
    pooling_name_in,
    pooling_name_of,
)
from sllm_actor.errors import CheckpointConfigInvalid, UnsupportedArchitecture

T = TypeVar("T")
_MODES = {
    "cls": Pooling.CLS, "mean": Pooling.MEAN, "mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN, "max": Pooling.MAX,
    "lasttoken": Pooling.LAST,
}  # fmt: skip
_FLAGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}  # fmt: skip


class _Lengths(msgspec.Struct, frozen=True):
    max_seq_length: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    do_lower_case: bool = False


class SentenceLayout(msgspec.Struct, frozen=True):
    """What modules.json and the files that it names say."""

    pooling: Pooling
    normalize: bool
    max_tokens: int | None
    lower_case: bool


def read_sentence_layout(folder: Path) -> SentenceLayout | None:
    """Read the layout of a folder; None where there is none.

    Raises:
        CheckpointConfigInvalid: a file is missing, or is not what it should be.
        UnsupportedArchitecture: the texts go through something that this version does not compute.
    """
    if not (folder / MODULES_NAME).exists():
        return None
    modules: Modules = _read(folder / MODULES_NAME, Modules)
    kinds = [module.kind for module in modules]
    if not are_computed(modules):
        raise UnsupportedArchitecture(
            f"{folder / MODULES_NAME} names the modules {', '.join(kinds)[:200]}; this version computes Transformer, "
            "Pooling and, after these, Normalize"
        )
    pooling_name = pooling_name_of(modules)
    if pooling_name is None:
        raise CheckpointConfigInvalid(
            f"{folder / MODULES_NAME}: the Transformer has to be in the folder itself, the Pooling in one below it"
        )
    lengths = next((folder / name for name in LENGTH_NAMES if (folder / name).exists()), None)
    known = _read(lengths, _Lengths) if lengths is not None else _Lengths()
    return SentenceLayout(
        pooling=_pooling(folder / pooling_name),
        normalize="Normalize" in kinds,
        max_tokens=known.max_seq_length,
        lower_case=known.do_lower_case,
    )


def find_pooling(folder: Path) -> str | None:
    """Give the name of the file that a folder's modules.json names for the pooling; None where it is not there.

    Raises:
        OSError: it can't be looked at.
    """
    path = folder / MODULES_NAME
    if not path.is_file() or path.stat().st_size > MAX_MODULES_BYTES:
        return None
    name = pooling_name_in(read_bounded(path, MAX_MODULES_BYTES, CheckpointConfigInvalid))
    return name if name is not None and (folder / name).is_file() else None


def _pooling(path: Path) -> Pooling:
    if not path.is_file():
        raise CheckpointConfigInvalid(
            f"{path} is missing, which says how the model pools: deploy the folder as it was published"
        )
    config = _read(path, dict[str, Any])
    modes = [mode for flag, mode in _FLAGS.items() if config.get(flag) is True]
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise UnsupportedArchitecture(
            f"{path} asks for the pooling {' and '.join(modes)[:200] or 'of no kind'}; this version knows, one at a "
            f"time, {', '.join(_MODES)}"
        )
    return _MODES[modes[0]]


def _read(path: Path, kind: type[T] | Any) -> Any:
    raw = read_bounded(path, MAX_MODULES_BYTES, CheckpointConfigInvalid)
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointConfigInvalid(f"{path} can't be used: {error}") from error
