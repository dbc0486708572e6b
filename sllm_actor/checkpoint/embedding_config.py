"""How a checkpoint embeds texts: what its files say, and what holds where they are silent.

Then, as in vLLM: the last token's state of a model that generates, the first one's of an encoder, of length 1.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sllm_actor.checkpoint.model_config import ModelConfig
from sllm_actor.checkpoint.sentence_layout import SentenceLayout
from sllm_actor.domain import Embedding, Pooling
from sllm_actor.errors import CheckpointConfigInvalid

# These count positions from behind the padding token's, and have as many fewer.
_LATE_POSITIONS = frozenset({"roberta", "xlm-roberta", "mpnet"})
# What families call the length of their states, the one that counts first.
_WIDTHS = ("word_embed_proj_dim", "hidden_size", "dim", "n_embd")
Size = Annotated[int, Meta(gt=0, lt=2**31)]


class _Config(msgspec.Struct, frozen=True):
    model_type: str = ""
    pad_token_id: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    # As in `_WIDTHS`.
    word_embed_proj_dim: Size | None = None
    hidden_size: Size | None = None
    dim: Size | None = None
    n_embd: Size | None = None
    is_matryoshka: bool = False
    matryoshka_dimensions: Annotated[list[Size], Meta(max_length=1024)] | None = None


def names_width(config: dict[str, Any]) -> bool:
    """Tell whether config.json says how long the model's states are; transformers has a default where none does."""
    return any(config.get(name) is not None for name in _WIDTHS)


def embedding_of(
    config: dict[str, Any], facts: ModelConfig, layout: SentenceLayout | None, *, encodes: bool
) -> Embedding:
    """Say how a checkpoint embeds, from config.json (already parsed) and the layout that it has, if it has one.

    Raises:
        CheckpointConfigInvalid: a field is absent, or of the wrong type, or they do not go together.
    """
    try:
        known = msgspec.convert(config, _Config)
    except msgspec.ValidationError as error:
        raise CheckpointConfigInvalid(f"config.json: {error}") from error
    dimensions = known.word_embed_proj_dim or known.hidden_size or known.dim or known.n_embd
    if dimensions is None:
        raise CheckpointConfigInvalid("config.json has no hidden_size")
    longest = facts.context_tokens
    if known.model_type in _LATE_POSITIONS:
        longest -= (1 if known.pad_token_id is None else known.pad_token_id) + 1
    if longest < 1:
        raise CheckpointConfigInvalid(f"config.json leaves {longest} positions for a text")
    default = Pooling.CLS if encodes else Pooling.LAST
    asked = layout.max_tokens if layout is not None else None
    return Embedding(
        pooling=layout.pooling if layout is not None else default,
        normalize=layout.normalize if layout is not None else True,
        dimensions=dimensions,
        max_tokens=min(asked or longest, longest),
        lower_case=layout is not None and layout.lower_case,
        matryoshka=known.is_matryoshka or bool(known.matryoshka_dimensions),
        matryoshka_dimensions=tuple(sorted(known.matryoshka_dimensions or ())),
    )
