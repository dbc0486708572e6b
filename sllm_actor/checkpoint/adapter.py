"""A LoRA adapter's own description, as PEFT writes it: what it adapts, and how strongly.

What would be computed otherwise than by PEFT is refused by its name. Reads no tensor and knows no base model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from sllm_actor.errors import AdapterInvalid

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
ALL_LINEAR = "all-linear"
MAX_PATTERNS = 10_000
MAX_NAME_CHARACTERS = 1000
_PREFIX = "base_model.model."
_TENSOR_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]+")
Value = TypeVar("Value", int, float)
# What says nothing of how an adapter is computed with, or is read below.
_HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
})  # fmt: skip
# These change the base model itself when an adapter begins.
_HARMLESS_BEGINNINGS = frozenset({True, False, None, "eva", "gaussian", "orthogonal"})


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter's description. A pattern is the end of a module's name, or with `^` the whole of it.

    `targets` are ends of names, one regular expression (`target_regex`), or with neither all linear modules;
    `selected` says that only some of the modules that they name are adapted.
    """

    base: str
    rank: int
    alpha: float
    rank_stabilized: bool
    targets: tuple[str, ...]
    target_regex: str
    selected: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    @property
    def largest_rank(self) -> int:
        return max(self.rank, *self.rank_pattern.values(), 0)

    def rank_of(self, module: str) -> int:
        """Give the rank that a module's adapter has."""
        return _chosen(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Give the factor of what a module's adapter adds."""
        rank = self.rank_of(module)
        alpha = _chosen(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    def names(self, module: str) -> bool:
        """Tell whether a linear module is named. A regular expression may take long: run it where that can be ended."""
        if self.target_regex:
            return re.fullmatch(self.target_regex, module) is not None
        return not self.targets or any(_ends_in(module, target) for target in self.targets)


class Side(NamedTuple):
    """One of the two tensors of an adapted module: `A` leads down to the rank, `B` up again."""

    module: str
    side: str


def side_of(tensor: str) -> Side:
    """Say which module a tensor is for, by the name that the module has in the base model.

    Raises:
        AdapterInvalid: it is not one of a LoRA adapter of linear modules.
    """
    match = _TENSOR_NAME.fullmatch(tensor.removeprefix(_PREFIX))
    if match is None:
        raise AdapterInvalid(f"the tensor {tensor[:200]} is not one of a linear module's LoRA adapter")
    return Side(match["module"], match["side"])


def read_lora_config(parsed: Mapping[str, Any], place: str) -> LoraConfig:
    """Read an adapter_config.json (already parsed); `place` is for messages.

    Raises:
        AdapterInvalid: a needed field is absent or of the wrong type, or one asks for what is not computed here.
    """
    _refuse_unsupported(parsed, place)
    targets, regex = _targets(parsed.get("target_modules"), place)
    return LoraConfig(
        base=_text(parsed.get("base_model_name_or_path") or "", "base_model_name_or_path", place),
        rank=_rank(parsed.get("r"), "r", place),
        alpha=_alpha(parsed.get("lora_alpha"), "lora_alpha", place),
        rank_stabilized=parsed.get("use_rslora") is True,
        targets=targets,
        target_regex=regex,
        selected=any(parsed.get(field) not in (None, [], "") for field in ("layers_to_transform", "exclude_modules")),
        rank_pattern={
            key: _rank(rank, "rank_pattern", place) for key, rank in _patterns(parsed, "rank_pattern", place)
        },
        alpha_pattern={
            key: _alpha(alpha, "alpha_pattern", place) for key, alpha in _patterns(parsed, "alpha_pattern", place)
        },
    )


def _refuse_unsupported(parsed: Mapping[str, Any], place: str) -> None:
    if parsed.get("peft_type") != "LORA":
        raise AdapterInvalid(f"{place} has the peft_type {str(parsed.get('peft_type'))[:80]}; only LORA is served")
    if parsed.get("bias", "none") != "none":
        raise AdapterInvalid(f"{place}: bias {str(parsed['bias'])[:80]!r} is not served, only 'none'")
    beginning = parsed.get("init_lora_weights")
    if not isinstance(beginning, str | bool | None) or beginning not in _HARMLESS_BEGINNINGS:
        raise AdapterInvalid(
            f"{place}: init_lora_weights {str(beginning)[:80]!r} changes the base model; convert the adapter to a "
            "plain one (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for field, value in parsed.items():
        if value and field not in _HARMLESS:
            raise AdapterInvalid(f"{place}: {field[:80]} is not served")


def _targets(given: Any, place: str) -> tuple[tuple[str, ...], str]:
    if given == ALL_LINEAR:
        return (), ""
    if isinstance(given, str) and given:
        try:
            re.compile(_text(given, "target_modules", place))
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterInvalid(f"{place}: target_modules is not a regular expression: {error}") from None
        return (), given
    if not isinstance(given, list) or not 0 < len(given) <= MAX_PATTERNS:
        raise AdapterInvalid(f"{place}: target_modules must be a list of names, a regular expression or {ALL_LINEAR!r}")
    return tuple(_text(name, "target_modules", place) for name in given), ""


def _patterns(parsed: Mapping[str, Any], field: str, place: str) -> list[tuple[str, Any]]:
    given = parsed.get(field) or {}
    if not isinstance(given, dict) or len(given) > MAX_PATTERNS:
        raise AdapterInvalid(f"{place}: {field} must be an object of at most {MAX_PATTERNS} names")
    for key in given:
        if len(key) > MAX_NAME_CHARACTERS or not _PATTERN.fullmatch(key):
            raise AdapterInvalid(
                f"{place}: {field} has {key[:80]!r}, and only names of modules are served, no patterns"
            )
    return list(given.items())


def _text(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME_CHARACTERS:
        raise AdapterInvalid(f"{place}: {field} must be text of at most {MAX_NAME_CHARACTERS} characters")
    return value


def _rank(value: Any, field: str, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise AdapterInvalid(f"{place}: {field} must be a whole number above 0, not {str(value)[:80]}")
    return value


def _alpha(value: Any, field: str, place: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
        raise AdapterInvalid(f"{place}: {field} must be a number, not {str(value)[:80]}")
    return float(value)


def _ends_in(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _chosen(patterns: Mapping[str, Value], module: str, otherwise: Value) -> Value:
    """Give the value of the first pattern that fits, as PEFT does."""
    for pattern, value in patterns.items():
        if module == pattern[1:] if pattern.startswith("^") else _ends_in(module, pattern):
            return value
    return otherwise


def is_adapter(entries: Sequence[str]) -> bool:
    """Tell from the names in a folder whether an adapter is all that it has of weights."""
    return CONFIG_NAME in entries and not any(
        name in ("sllm.json", "model.safetensors.index.json")
        or (name.startswith("model") and name.endswith(".safetensors"))
        for name in entries
    )
