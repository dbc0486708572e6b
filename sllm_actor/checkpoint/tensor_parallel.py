"""Which tensors of which architecture are split for tensor-parallel ranks, and along which dimension.

Pure. Only tensors that are listed here are split or replicated: an unknown one is refused by its name, because
a wrong slice gives wrong answers and no error. The split is that of Megatron-LM (Shoeybi et al., 2019): a pair of
layers is cut by columns, then by rows. A bias behind a cut by rows is whole at every rank; it is added once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from sllm_actor.checkpoint.layout import Described
from sllm_actor.checkpoint.partitions import Plan, check_count, for_ranks, in_one_file
from sllm_actor.errors import CheckpointUnsplittable


class _Table(NamedTuple):
    """Names within a layer; what stands outside the layers is by its whole name, without the model's prefix."""

    layers: str
    columns: frozenset[str]
    rows: frozenset[str]
    replicated: frozenset[str]
    outside_columns: frozenset[str]
    outside_replicated: frozenset[str]


_ATTENTION = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_LLAMA = _Table(
    layers="layers",
    columns=_ATTENTION | {"mlp.gate_proj", "mlp.up_proj"},
    rows=frozenset({"self_attn.o_proj", "mlp.down_proj"}),
    replicated=frozenset({"input_layernorm", "post_attention_layernorm", "self_attn.rotary_emb.inv_freq"}),
    outside_columns=frozenset({"lm_head"}),
    outside_replicated=frozenset({"embed_tokens", "norm"}),
)
TABLES: Mapping[str, _Table] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA._replace(replicated=_LLAMA.replicated | {"self_attn.q_norm", "self_attn.k_norm"}),
    "opt": _Table(
        layers="decoder.layers",
        columns=_ATTENTION | {"fc1"},
        rows=frozenset({"self_attn.out_proj", "fc2"}),
        replicated=frozenset({"self_attn_layer_norm", "final_layer_norm"}),
        outside_columns=frozenset({"lm_head"}),
        outside_replicated=frozenset(
            {"decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in", "decoder.project_out",
             "decoder.final_layer_norm"}
        ),
    ),
    # Its query_key_value holds q, k and v of one head side by side, so a cut between heads leaves each whole.
    "gpt_neox": _Table(
        layers="layers",
        columns=frozenset({"attention.query_key_value", "mlp.dense_h_to_4h"}),
        rows=frozenset({"attention.dense", "mlp.dense_4h_to_h"}),
        replicated=frozenset(
            {"input_layernorm", "post_attention_layernorm", "attention.rotary_emb.inv_freq", "attention.bias",
             "attention.masked_bias"}
        ),
        outside_columns=frozenset({"embed_out", "lm_head"}),
        outside_replicated=frozenset({"embed_in", "final_layer_norm"}),
    ),
}  # fmt: skip
_PREFIX = {"llama": "model", "mistral": "model", "qwen2": "model", "qwen3": "model", "opt": "model"}
_HEADS = {"q_proj": "num_attention_heads", "query_key_value": "num_attention_heads"} | dict.fromkeys(
    ("k_proj", "v_proj"), "num_key_value_heads"
)
_ROWS_OF_HEADS = {"o_proj", "out_proj", "attention.dense"}


def for_tensor_parallel(
    tensors: Sequence[Described], config: Mapping[str, Any], aliases: Mapping[str, str], ranks: int
) -> Plan:
    """Plan one file for each rank, as the table of the config's model_type says.

    Raises:
        CheckpointUnsplittable: no table for this architecture, a tensor that it does not know, or a size, a number
            of heads or of key-value heads that does not divide.
        InvalidInput: `ranks` is out of bounds.
    """
    check_count(ranks)
    if ranks == 1:
        return in_one_file(tensors)
    model_type = config.get("model_type")
    table = TABLES.get(model_type) if isinstance(model_type, str) else None
    if table is None:
        first = tensors[0].name if tensors else "none"
        raise CheckpointUnsplittable(
            f"no split of a {model_type!r} model is known (its first tensor is {first!r}); known: {', '.join(TABLES)}"
        )
    prefix = _PREFIX.get(str(model_type), str(model_type))
    dimensions = {}
    for tensor in tensors:
        dimension = _dimension(table, prefix, tensor)
        _check_heads(tensor, config, ranks)
        dimensions[tensor.name] = dimension
    by_name = {tensor.name: tensor for tensor in tensors}
    for alias, stored in aliases.items():
        # What is stored whole serves both; what is split must be split alike for both.
        wanted = _dimension(table, prefix, msgspec.structs.replace(by_name[stored], name=alias))
        if dimensions[stored] not in (None, wanted):
            raise CheckpointUnsplittable(f"tensor {alias!r} is stored as {stored!r}, which is split otherwise")
    return for_ranks(tensors, dimensions, ranks)


def _dimension(table: _Table, prefix: str, tensor: Described) -> int | None:
    """Return the dimension to split along, None for a tensor that every rank has whole."""
    name = tensor.name.removeprefix(f"{prefix}.")
    module, _, kind = name.rpartition(".")
    inside = re.fullmatch(rf"{re.escape(table.layers)}\.[0-9]+\.(.+)", module)
    columns, rows, replicated = table.outside_columns, frozenset[str](), table.outside_replicated
    if inside:
        module, columns, rows, replicated = inside[1], table.columns, table.rows, table.replicated
    dimensions = len(tensor.shape)
    if module in columns and (kind, dimensions) in (("weight", 2), ("bias", 1)):
        return 0
    if module in rows and (kind, dimensions) in (("weight", 2), ("bias", 1)):
        return 1 if kind == "weight" else None
    known_whole = module in replicated and kind in ("weight", "bias") and dimensions in (1, 2)
    # Buffers that old checkpoints hold are named whole.
    if known_whole or (f"{module}.{kind}" in replicated):
        return None
    raise CheckpointUnsplittable(f"tensor {tensor.name!r} {list(tensor.shape)} is unknown here and is not split")


def _check_heads(tensor: Described, config: Mapping[str, Any], ranks: int) -> None:
    """Refuse a cut through a head: its halves would be attended to as two."""
    module = tensor.name.rpartition(".")[0]
    field = _HEADS.get(module.rpartition(".")[2])
    if any(module.endswith(f".{rows}") for rows in _ROWS_OF_HEADS):
        field = "num_attention_heads"
    if field is None:
        return
    heads = config.get(field, config.get("num_attention_heads"))
    heads = config.get("num_attention_heads") if heads is None else heads
    if not isinstance(heads, int) or isinstance(heads, bool) or heads <= 0 or heads % ranks:
        raise CheckpointUnsplittable(
            f"tensor {tensor.name!r} can't be cut into {ranks}: config.json has {field} {heads!r}"
        )
