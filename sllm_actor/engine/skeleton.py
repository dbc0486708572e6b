"""A model without its weights, and the weights put in place: views of mapped bytes, no copy."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sllm_actor.checkpoint.layout import is_pad
from sllm_actor.checkpoint.safetensors_header import Tensor
from sllm_actor.engine import attention, quantized
from sllm_actor.engine.architectures import ENCODERS, EVERY, choose
from sllm_actor.engine.experts import unpack_experts
from sllm_actor.engine.mapped_tensors import DTYPES
from sllm_actor.engine.quantization import weight_bits
from sllm_actor.errors import CheckpointConfigInvalid, CheckpointInvalid, UnsupportedArchitecture

COMPUTE_DTYPES = frozenset({"F32", "F16", "BF16"})
# Each layer is built before it can be compared with what the checkpoint brings: so their number has a bound.
MAX_LAYERS = 1024
# GPT-NeoX's checkpoints have the head under its own name.
RENAMED = {"embed_out.": "lm_head."}
# The oldest checkpoints have the names of TensorFlow.
RENAMED_ENDS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
POOLED = frozenset({"BertModel", "MPNetModel", "RobertaModel", "XLMRobertaModel"})
# What transformers' configs and constructors raise at values that nobody has tried before.
CONFIG_FAULTS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, OSError,
    ImportError, StrictDataclassError,
)  # fmt: skip


def build(path: str, dtype: str, *, generates: bool = True) -> PreTrainedModel:
    """Build the model of a folder on the meta device: every module, no storage; its head, where it is to generate.

    Raises:
        UnsupportedArchitecture, CheckpointConfigInvalid: its config can't be served.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        name = choose(config.architectures or (), generates=generates)
    except CONFIG_FAULTS as error:
        raise CheckpointConfigInvalid(f"config.json is not one that transformers reads: {error}") from error
    model_class = getattr(importlib.import_module(EVERY[name]), name)
    _check(config, name, model_class.config_class)
    before = torch.get_default_dtype()
    torch.set_default_dtype(_compute_dtype(config, dtype))
    try:
        with torch.device("meta"), no_init_weights():
            # The pooler of BERT and its kin is for another task, and many checkpoints lack it.
            options = {"add_pooling_layer": False} if name in POOLED else {}
            model: PreTrainedModel = model_class(config, **options)
            unpack_experts(model)
    except CONFIG_FAULTS as error:
        raise CheckpointConfigInvalid(f"no {name} can be built from config.json: {error}") from error
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def _check(config: Any, name: str, config_class: type) -> None:
    """Refuse what the engine would compute wrongly, and overrule what a config may not choose."""
    if type(config).__name__ != config_class.__name__:
        raise CheckpointConfigInvalid(f"config.json has the model type {config.model_type} and names {name}")
    layers = config.num_hidden_layers
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        raise CheckpointConfigInvalid(f"config.json asks for {layers} layers; 1 to {MAX_LAYERS} can be served")
    # An attention of another name would be fetched from the Hub and run.
    config._attn_implementation = attention.NAME
    if name in ENCODERS:
        _check_encoder(config, name)
    elif getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedArchitecture(f"config.json asks for a {name} that looks both ways, which is not served")
    config.return_dict = True
    config.output_attentions = False
    config.output_hidden_states = False


def _check_encoder(config: Any, name: str) -> None:
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedArchitecture(f"config.json asks for a {name} that is a decoder, which is not served")
    if (kind := getattr(config, "position_embedding_type", "absolute")) != "absolute":
        raise UnsupportedArchitecture(f"config.json asks for positions of the type {kind!r}, which are not served")
    # MPNet computes its own attention, which goes by this name.
    config._attn_implementation = "eager" if name == "MPNetModel" else "sdpa"


def _compute_dtype(config: Any, dtype: str) -> torch.dtype:
    """Most of a quantized checkpoint is of a type that can't be computed with: its config says which one to take."""
    named = getattr(config, "dtype", None)
    if getattr(config, "quantization_config", None):
        weight_bits(config.quantization_config)
        if isinstance(named, torch.dtype) and named in {DTYPES[known] for known in COMPUTE_DTYPES}:
            return named
    if dtype not in COMPUTE_DTYPES:
        raise UnsupportedArchitecture(f"weights of type {dtype} can't be computed with; use F32, F16 or BF16")
    return DTYPES[dtype]


def match(
    model: PreTrainedModel, tensors: Iterable[Tensor], aliases: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Pair the model's tensor names with the checkpoint's; `aliases` has the stored name of each that is not stored.

    A base model's checkpoint lacks the head's prefix (`wte.weight` for `transformer.wte.weight`), and
    the other way round; what the model has no place for is left out.

    Raises:
        CheckpointInvalid: a tensor is missing, or has another shape than config.json says.
        UnsupportedArchitecture: a tensor is of a type that its place can't take.
    """
    prefix = f"{model.base_model_prefix}."
    found: dict[str, Tensor] = {}
    stored = {tensor.name: tensor for tensor in tensors if not is_pad(tensor.name)}
    aliased = {alias: stored[name] for alias, name in (aliases or {}).items() if name in stored}
    quantization = getattr(model.config, "quantization_config", None)
    if quantization:
        bits = weight_bits(quantization)
        quantized.place(model, bits, aliased | stored, lambda known: _possible_names(known, prefix))
    wanted = model.state_dict()
    for known, tensor in (aliased | stored).items():
        for name in _possible_names(quantized.inner_name(known), prefix):
            if name in wanted:
                found[name] = tensor
                break
    for name, place in wanted.items():
        if not found.keys() & {name, *_tied_to(model, name)}:
            raise CheckpointInvalid(
                f"the checkpoint lacks the tensor {name} {list(place.shape)} that its config.json implies"
            )
    for name, tensor in found.items():
        if tuple(tensor.shape) != tuple(wanted[name].shape):
            raise CheckpointInvalid(
                f"the tensor {tensor.name} has shape {list(tensor.shape)}, config.json implies "
                f"{list(wanted[name].shape)}"
            )
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None or dtype.is_floating_point != wanted[name].is_floating_point():
            raise UnsupportedArchitecture(
                f"the tensor {tensor.name} has type {tensor.dtype}, which the engine can't use"
            )
    return found


def _possible_names(known: str, prefix: str) -> Iterator[str]:
    called = (known, *_renamed(known))
    yield from (*called, *(prefix + name for name in called), *(name.removeprefix(prefix) for name in called))


def _renamed(name: str) -> tuple[str, ...]:
    """Say how a tensor is called today that a family's checkpoints have under an older name."""
    return (
        *(today + name.removeprefix(old) for old, today in RENAMED.items() if name.startswith(old)),
        *(name.removesuffix(old) + today for old, today in RENAMED_ENDS.items() if name.endswith(old)),
    )


def _tied_to(model: PreTrainedModel, name: str) -> set[str]:
    """List the tensors of which any one is enough for this one: those that the config ties to it."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.get(name, name)
    return {source, *(target for target, its_source in tied.items() if its_source == source)}


def put_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Make `weights` the model's own, tie what is tied, rebuild the buffers that no checkpoint holds.

    Raises:
        UnsupportedArchitecture: something of the model is still without storage.
        CheckpointInvalid: what is said of quantized weights is not so.
    """
    places = model.state_dict()
    # A mixed checkpoint is computed in one type, as its dominant one says.
    own = {name: value.to(places[name].dtype) for name, value in weights.items()}
    missing = set(model.load_state_dict(own, strict=False, assign=True).missing_keys)
    # As `from_pretrained` does: either of two tied tensors is enough, and two that differ stay two.
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            _rebuild_buffers(model, module)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta:
            raise UnsupportedArchitecture(f"{type(model).__name__}: {name} can't be rebuilt from a checkpoint")
    model.requires_grad_(False)
    quantized.settle(model)


def _rebuild_buffers(model: PreTrainedModel, module: torch.nn.Module) -> None:
    """Compute a module's buffers (rotary frequencies, causal masks) as its constructor would."""
    fresh: dict[str, Any] = {}
    if type(model).__name__ in ENCODERS:
        # Known without a constructor, which would make the whole vocabulary's embedding anew.
        length = model.config.max_position_embeddings
        positions = torch.arange(length).expand((1, -1))
        fresh = {"position_ids": positions, "token_type_ids": torch.zeros((1, length), dtype=torch.long)}
    elif hasattr(module, "config"):
        fresh = dict(type(module)(config=module.config).named_buffers(recurse=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_meta and name in fresh:
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, fresh[name], persistent=persistent)
