"""How a checkpoint wants its texts made into vectors: the files that sentence-transformers writes beside the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from sllm_actor.checkpoint.bounded import read_bounded
from sllm_actor.domain import Pooling
from sllm_actor.errors import CheckpointConfigInvalid, UnsupportedArchitecture

MODULES_NAME = "modules.json"
MAX_BYTES = 100_000
MAX_MODULES = 16
T = TypeVar("T")
# The file's name tells the family; which one it is makes no difference.
_LENGTH_NAMES = tuple(
    f"sentence_{family}_config.json" for family in ("bert", "roberta", "distilbert", "mpnet", "xlm-roberta")
)
_MODES = {
    "cls": Pooling.CLS, "mean": Pooling.MEAN, "mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN, "max": Pooling.MAX,
    "lasttoken": Pooling.LAST,
}  # fmt: skip
_FLAGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}  # fmt: skip
_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


class _Module(msgspec.Struct, frozen=True):
    type: str
    path: str = ""


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
    modules = _read(folder / MODULES_NAME, Annotated[list[_Module], Meta(max_length=MAX_MODULES)])
    kinds = [module.type.rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedArchitecture(
            f"{folder / MODULES_NAME} names the modules {', '.join(kinds)[:200]}; this version computes Transformer, "
            "Pooling and, after these, Normalize"
        )
    if modules[0].path or not _FOLDER.fullmatch(modules[1].path):
        raise CheckpointConfigInvalid(
            f"{folder / MODULES_NAME}: the Transformer has to be in the folder itself, the Pooling in one below it"
        )
    lengths = next((folder / name for name in _LENGTH_NAMES if (folder / name).exists()), None)
    known = _read(lengths, _Lengths) if lengths is not None else _Lengths()
    return SentenceLayout(
        pooling=_pooling(folder / modules[1].path / "config.json"),
        normalize="Normalize" in kinds,
        max_tokens=known.max_seq_length,
        lower_case=known.do_lower_case,
    )


def _pooling(path: Path) -> Pooling:
    if not path.is_file():
        raise CheckpointConfigInvalid(
            f"{path} is missing, which says how the model pools: deploy the folder as it was published; neither a "
            "source on a network nor `convert` brings folders below it"
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
    raw = read_bounded(path, MAX_BYTES, CheckpointConfigInvalid)
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointConfigInvalid(f"{path} can't be used: {error}") from error
