"""LoRA adapters beside a model: views of mapped bytes, added to the linear modules of those tokens that ask for them.

`out = base(x) + scale * B(A(x))` (Hu et al. 2021) on the tokens of each adapter, so that requests of several adapters
and of the bare model share a pass (S-LoRA, Punica). A module is wrapped while a pass needs it and is else untouched:
where no adapter is asked for, nothing is slower. The model's weights are never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sllm_actor.checkpoint.adapter import LoraConfig, side_of
from sllm_actor.checkpoint.layout import is_pad
from sllm_actor.checkpoint.safetensors_header import Tensor
from sllm_actor.engine.quantized import QuantizedLinear
from sllm_actor.engine.skeleton import COMPUTE_DTYPES
from sllm_actor.errors import AdapterInvalid

Forward = Callable[..., torch.Tensor]


class Pair(NamedTuple):
    """One adapted module: `down` `[rank, in]`, `up` `[out, rank]`."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


class Adapter(NamedTuple):
    """An adapter's pairs, by the name of the module."""

    pairs: Mapping[str, Pair]


class Span(NamedTuple):
    """`size` tokens of a pass, from its token `begin` on, that an adapter is for."""

    adapter: Adapter
    begin: int
    size: int


class Placed(NamedTuple):
    """The two tensors of an adapted module as its file has them."""

    down: Tensor
    up: Tensor


def match(model: PreTrainedModel, config: LoraConfig, tensors: Iterable[Tensor]) -> dict[str, Placed]:
    """Pair an adapter's tensors with the model's modules, by the names of these.

    Raises:
        AdapterInvalid: a tensor has no place in the model, or not this shape; the message names it and both.
    """
    modules, prefix = linear_modules(model), f"{model.base_model_prefix}."
    sides: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        if is_pad(tensor.name):
            continue
        named, side = side_of(tensor.name)
        name = next((name for name in (named, prefix + named, named.removeprefix(prefix)) if name in modules), None)
        if name is None:
            raise AdapterInvalid(
                f"the tensor {tensor.name} is for {named}, and {type(model).__name__} has no such linear module that "
                "can be adapted"
            )
        if sides.setdefault(name, {}).setdefault(side, tensor) is not tensor:
            raise AdapterInvalid(f"the tensors {tensor.name} and {sides[name][side].name} are for the same module")
    if not sides:
        raise AdapterInvalid("the adapter has no tensors")
    placed: dict[str, Placed] = {}
    for name, both in sides.items():
        for side in "AB":
            if side not in both:
                raise AdapterInvalid(f"the adapter of {name} lacks its lora_{side}.weight")
        into, out = modules[name]
        rank = config.rank_of(name)
        _check(both["A"], (rank, into), rank, name)
        _check(both["B"], (out, rank), rank, name)
        placed[name] = Placed(both["A"], both["B"])
    return placed


def _check(tensor: Tensor, wanted: tuple[int, int], rank: int, module: str) -> None:
    if tuple(tensor.shape) != wanted:
        raise AdapterInvalid(
            f"the tensor {tensor.name} has shape {list(tensor.shape)}, and {module} of the base model with rank {rank} "
            f"takes {list(wanted)}: this is the adapter of another base"
        )
    if tensor.dtype not in COMPUTE_DTYPES:
        raise AdapterInvalid(f"the tensor {tensor.name} has type {tensor.dtype}; F32, F16 and BF16 are served")


def check_targets(model: PreTrainedModel, config: LoraConfig, adapted: Iterable[str]) -> None:
    """Compare the modules that have tensors with those that the description names. May take long: a pattern is run.

    Raises:
        AdapterInvalid: they differ.
    """
    has = set(adapted)
    named = {name for name in linear_modules(model) if config.names(name)}
    for name in sorted(has - named):
        raise AdapterInvalid(f"the adapter has tensors for {name}, which its target_modules do not name")
    for name in sorted(named - has):
        if not config.selected:
            raise AdapterInvalid(f"target_modules names {name}, and the adapter has no tensors for it")


def linear_modules(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """List the modules that can be adapted, and how many numbers go in and out of each.

    Neither the head, which sees other tokens than the rest, nor experts, which see those that were sent to them.
    """
    head, found = model.get_output_embeddings(), dict[str, tuple[int, int]]()
    for name, module in model.named_modules():
        if module is head or ".experts." in name:
            continue
        if isinstance(module, torch.nn.Linear | QuantizedLinear):
            found[name] = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            found[name] = module.nx, module.nf
    return found


def make(
    config: LoraConfig, placed: Mapping[str, Placed], view: Callable[[Tensor], torch.Tensor], device: torch.device
) -> Adapter:
    """Make an adapter of where its tensors are; each is looked at once.

    Raises:
        AdapterInvalid: a number in it is not finite.
    """
    pairs: dict[str, Pair] = {}
    for name, (down, up) in placed.items():
        both = view(down).to(device), view(up).to(device)
        for tensor, value in zip((down, up), both, strict=True):
            # One pass without a copy: any number that is not finite makes the sum so.
            if not bool(value.sum(dtype=torch.float32).isfinite()):
                raise AdapterInvalid(f"the tensor {tensor.name} has numbers that are not finite")
        pairs[name] = Pair(*both, config.scale_of(name))
    return Adapter(pairs)


class Adapters:
    """Owns the adapters of a model, by key, and puts them in the way of a pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = dict(model.named_modules())
        self._adapters: dict[str, Adapter] = {}

    def put(self, key: str, adapter: Adapter) -> None:
        """Have an adapter from now on."""
        self._adapters[key] = adapter

    def drop(self, key: str) -> None:
        """Forget an adapter; no pass may need it any more."""
        self._adapters.pop(key, None)

    def has(self, key: str) -> bool:
        """Tell whether tokens can be computed with it; the empty key is the bare model's."""
        return not key or key in self._adapters

    def spans(self, keys: Sequence[str], sizes: Sequence[int]) -> list[Span]:
        """Say which tokens of a pass have which adapter; neighbours of one adapter are one span."""
        spans: list[Span] = []
        begin, before = 0, ""
        for key, size in zip(keys, sizes, strict=True):
            if key and key == before:
                spans[-1] = spans[-1]._replace(size=spans[-1].size + size)
            elif key:
                spans.append(Span(self._adapters[key], begin, size))
            begin, before = begin + size, key
        return spans

    @contextmanager
    def applied(self, spans: Sequence[Span]) -> Iterator[None]:
        """Compute with these adapters in the block. Without spans nothing is touched."""
        concerned: dict[str, list[tuple[Pair, int, int]]] = {}
        for adapter, begin, size in spans:
            for name, pair in adapter.pairs.items():
                concerned.setdefault(name, []).append((pair, begin, size))
        wrapped: list[tuple[torch.nn.Module, Forward | None]] = []
        try:
            for name, parts in concerned.items():
                module = self._modules[name]
                wrapped.append((module, module.__dict__.get("forward")))
                # Beside torch's own bookkeeping, which is for parameters and modules.
                module.__dict__["forward"] = _adapted(module.forward, parts)
            yield
        finally:
            for module, before in wrapped:
                if before is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = before


def _adapted(base: Forward, parts: Sequence[tuple[Pair, int, int]]) -> Forward:
    """Wrap a module's forward: `[..., tokens, in]` in, `[..., tokens, out]` out."""

    def forward(given: torch.Tensor) -> torch.Tensor:
        out = base(given)
        for (down, up, scale), begin, size in parts:
            # In the adapter's own type, as PEFT computes; the sum has the model's.
            part = given.narrow(-2, begin, size).to(down.dtype)
            out.narrow(-2, begin, size).add_(linear(linear(part, down), up), alpha=scale)
        return out

    return forward
