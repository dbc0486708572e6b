"""What a checkpoint says of itself beside its weights: context, vocabulary, end tokens, sampling defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from sllm_actor.errors import CheckpointConfigInvalid

MAX_BYTES = 1_000_000
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Size = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]


class _Config(msgspec.Struct, frozen=True):
    vocab_size: Size
    max_position_embeddings: Size | None = None
    n_positions: Size | None = None
    eos_token_id: TokenId | list[TokenId] | None = None


class _Generation(msgspec.Struct, frozen=True):
    """generation_config.json; what it does not name has transformers' defaults, which are not ours to assume."""

    eos_token_id: TokenId | list[TokenId] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    max_new_tokens: Size | None = None


class ModelConfig(msgspec.Struct, frozen=True):
    """The facts a server needs. Temperature 0 means greedy, top-k 0 all tokens."""

    context_tokens: int
    vocabulary_tokens: int
    eos_token_ids: tuple[int, ...]
    default_temperature: float
    default_top_p: float
    default_top_k: int
    default_min_p: float
    default_repetition_penalty: float
    default_max_tokens: int | None


def read_model_config(folder: Path, config: dict[str, Any]) -> ModelConfig:
    """Read the facts from config.json (already parsed) and, where there is one, generation_config.json.

    Raises:
        CheckpointConfigInvalid: a needed field is absent, or one is of the wrong type or absurd.
    """
    try:
        known = msgspec.convert(config, _Config)
    except msgspec.ValidationError as error:
        raise CheckpointConfigInvalid(f"{folder / 'config.json'}: {error}") from error
    context_tokens = known.max_position_embeddings or known.n_positions
    if context_tokens is None:
        raise CheckpointConfigInvalid(f"{folder / 'config.json'} has no max_position_embeddings and no n_positions")
    generation = _read_generation(folder / "generation_config.json")
    eos = generation.eos_token_id if generation.eos_token_id is not None else known.eos_token_id
    greedy = generation.do_sample is False
    return ModelConfig(
        context_tokens=context_tokens,
        vocabulary_tokens=known.vocab_size,
        eos_token_ids=_as_tuple(eos),
        default_temperature=0.0 if greedy else _or(generation.temperature, 1.0),
        default_top_p=1.0 if greedy else _or(generation.top_p, 1.0),
        default_top_k=0 if greedy else max(generation.top_k or 0, 0),
        default_min_p=0.0 if greedy else _or(generation.min_p, 0.0),
        default_repetition_penalty=_or(generation.repetition_penalty, 1.0),
        default_max_tokens=generation.max_new_tokens,
    )


def _read_generation(path: Path) -> _Generation:
    try:
        if not path.is_file():
            return _Generation()
        with path.open("rb") as opened:
            raw = opened.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise CheckpointConfigInvalid(f"{path} is longer than {MAX_BYTES} bytes")
        return msgspec.json.decode(raw, type=_Generation)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointConfigInvalid(f"{path} can't be used: {error}") from error


def _as_tuple(eos: int | list[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
