"""Read what `sllm deploy --config` of ServerlessLLM takes, and say it in this project's terms.

Pure but for one bounded read. What has no counterpart here is refused where an answer or its cost would differ, and
told as a warning where none would; nothing is dropped in silence. docs/integrations/serverlessllm.md has the table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec

from sllm_actor.domain import Backend
from sllm_actor.errors import ConfigInvalid

MAX_CONFIG_BYTES = 1_000_000
MAX_ADAPTERS = 256
OWNER_AND_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
DTYPES = {"float16": "F16", "half": "F16", "bfloat16": "BF16", "float32": "F32", "float": "F32", "auto": ""}
MODEL_CLASSES = ("AutoModelForCausalLM", "AutoModel")

_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Places = list[str | int] | str


class _AutoScaling(msgspec.Struct, forbid_unknown_fields=True):
    metric: str = "concurrency"
    target: Annotated[int, msgspec.Meta(ge=1)] = 1
    min_instances: _Count = 0
    max_instances: Annotated[int, msgspec.Meta(ge=1)] = 10
    keep_alive: _Seconds = 0


class _Placement(msgspec.Struct, forbid_unknown_fields=True):
    target_nodes: _Places | None = None
    local_disk: _Places | None = None
    memory_pool: _Places | None = None


class _RouterConfig(msgspec.Struct, forbid_unknown_fields=True):
    migration_delta: float | None = None


class _SchedulerConfig(msgspec.Struct, forbid_unknown_fields=True):
    alpha: float | None = None
    beta: float | None = None


class _Backend(msgspec.Struct, forbid_unknown_fields=True):
    pretrained_model_name_or_path: str = ""
    device_map: str | dict[str, Any] | int = "auto"
    torch_dtype: str = "float16"
    hf_model_class: str = "AutoModelForCausalLM"
    enable_lora: bool = False
    lora_adapters: Annotated[dict[str, str], msgspec.Meta(max_length=MAX_ADAPTERS)] | None = None
    quantization_config: dict[str, Any] | None = None
    precision: str | None = None
    tensor_parallel_size: Annotated[int, msgspec.Meta(ge=1)] = 1
    task: str = "auto"
    load_format: str | None = None
    enforce_eager: bool | None = None
    enable_prefix_caching: bool | None = None
    trace_debug: bool | None = None


class _Config(msgspec.Struct, forbid_unknown_fields=True):
    model: Annotated[str, msgspec.Meta(min_length=1)]
    # Theirs is vllm where none is named; that alone is no wish for it.
    backend: str = ""
    num_gpus: _Count = 1
    auto_scaling_config: _AutoScaling = msgspec.field(default_factory=_AutoScaling)
    backend_config: _Backend = msgspec.field(default_factory=_Backend)
    placement_config: _Placement | None = None
    router_config: _RouterConfig | None = None
    scheduler_config: _SchedulerConfig | None = None


class Deployment(msgspec.Struct, frozen=True):
    """Bodies of registrations, the model's before its adapters'; `dtype` is what was asked for, empty for any."""

    model: dict[str, Any]
    adapters: tuple[dict[str, Any], ...]
    dtype: str
    warnings: tuple[str, ...]


def read_deployment(path: Path, over: Mapping[str, Any], *, named: bool) -> Deployment:
    """Read a file of ServerlessLLM's; `over` stands above what it says of the model, its name only where `named`.

    Raises:
        ConfigInvalid: it can't be read, is none, or asks for what is not here; `param` names the field.
    """
    try:
        with path.open("rb") as opened:
            raw = opened.read(MAX_CONFIG_BYTES + 1)
    except OSError as wrong:
        raise ConfigInvalid(f"{path} can't be read: {wrong.strerror}", param="config") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigInvalid(f"{path} is longer than {MAX_CONFIG_BYTES} bytes", param="config")
    plan = parse_deployment(raw, over.get("backend"))
    changed = plan.model | {key: value for key, value in over.items() if key != "name" or named}
    adapters = tuple(adapter | {"base": changed["name"]} for adapter in plan.adapters)
    return msgspec.structs.replace(plan, model=changed, adapters=adapters)


def parse_deployment(raw: bytes, backend_instead: Backend | None = None) -> Deployment:
    """Put a configuration into this project's terms; `backend_instead` stands above the backend that it names.

    Raises:
        ConfigInvalid: as `read_deployment`.
    """
    config = _parse(raw)
    backend, scaling = config.backend_config, config.auto_scaling_config
    _check_backend(config)
    chosen = backend_instead or (Backend.VLLM if config.backend == "vllm" else Backend.SLLM)
    if chosen is Backend.VLLM:
        _check_for_vllm(backend)
    if scaling.metric != "concurrency":
        _refuse("auto_scaling_config.metric", f"{scaling.metric!r}: instances are scaled by concurrency alone")
    if scaling.max_instances < scaling.min_instances:
        _refuse("auto_scaling_config.max_instances", f"{scaling.max_instances} is less than min_instances")
    place = "backend_config.pretrained_model_name_or_path"
    model = {
        "name": config.model,
        "source": source_of(backend.pretrained_model_name_or_path or config.model, place),
        "keep_alive": scaling.keep_alive,
        "min_instances": scaling.min_instances,
        "max_instances": scaling.max_instances,
        "target_concurrency": scaling.target,
        "backend": chosen,
    }
    adapters = (backend.lora_adapters or {}).items() if backend.enable_lora else ()
    return Deployment(
        model,
        tuple(
            {"name": name, "source": source_of(path, f"backend_config.lora_adapters.{name}"), "base": config.model}
            for name, path in adapters
        ),
        DTYPES[backend.torch_dtype.removeprefix("torch.")],
        tuple(_warnings(config, is_told=backend_instead is not None)),
    )


def source_of(given: str, param: str) -> str:
    """Give a source as `deploy` takes it: a folder that is there, or a repository of the Hub.

    Raises:
        ConfigInvalid: it is neither.
    """
    folder = Path(given).expanduser()
    if given.startswith(("/", ".", "~")) or folder.is_dir():
        return str(folder.absolute())
    if not OWNER_AND_NAME.fullmatch(given):
        _refuse(param, f"{given!r} is neither a folder nor OWNER/NAME of the Hub")
    return f"hf://{given}"


def _parse(raw: bytes) -> _Config:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key, _ in pairs if [other for other, _ in pairs].count(key) > 1)
            _refuse(twice, "given twice")
        return found

    try:
        return msgspec.convert(json.loads(raw.decode("utf-8"), object_pairs_hook=unique), _Config)
    except msgspec.ValidationError as wrong:
        what, _, where = str(wrong).partition(" - at ")
        unknown = re.search(r"field `([^`]+)`", what)
        parts = [where.strip("`").removeprefix("$").strip("."), unknown[1] if unknown else ""]
        _refuse(".".join(filter(None, parts)) or "config", what)
    except RecursionError:
        _refuse("config", "nested too deeply")
    except ValueError as wrong:
        _refuse("config", f"not JSON: {wrong}")


def _check_backend(config: _Config) -> None:
    backend = config.backend_config
    if config.backend not in ("", "transformers", "vllm"):
        _refuse("backend", f"{config.backend!r}: transformers or vllm")
    if config.num_gpus > 1:
        _refuse("num_gpus", f"{config.num_gpus}: an instance has one device at most")
    if backend.tensor_parallel_size > 1:
        _refuse("backend_config.tensor_parallel_size", "an instance has one device at most")
    if backend.device_map != "auto":
        _refuse("backend_config.device_map", "'auto' alone: an instance is not spread over devices")
    if backend.torch_dtype.removeprefix("torch.") not in DTYPES:
        _refuse("backend_config.torch_dtype", f"{backend.torch_dtype!r}: one of {', '.join(DTYPES)}")
    if backend.hf_model_class not in MODEL_CLASSES:
        _refuse("backend_config.hf_model_class", f"{backend.hf_model_class!r}: {' or '.join(MODEL_CLASSES)}")
    if backend.quantization_config is not None:
        _refuse(
            "backend_config.quantization_config",
            "weights are not quantised while they load; deploy a checkpoint that is stored quantised",
        )
    if backend.precision is not None:
        _refuse("backend_config.precision", "weights are served in the form in which they are stored")
    if backend.task not in ("auto", "generate", "embed"):
        _refuse("backend_config.task", f"{backend.task!r}: auto, generate or embed; the checkpoint decides")


def _check_for_vllm(backend: _Backend) -> None:
    """Refuse what the node would refuse later, when the model is registered and its adapters are not."""
    if backend.enable_lora and backend.lora_adapters:
        _refuse("backend_config.lora_adapters", "not with vLLM as the backend; --backend sllm serves them")
    if backend.task == "embed":
        _refuse("backend_config.task", "'embed': not with vLLM as the backend; --backend sllm serves it")


def _warnings(config: _Config, *, is_told: bool) -> list[str]:
    backend = config.backend_config
    said = []
    if not config.backend and not is_told:
        said.append("backend: none is named, and this project's own engine serves it; --backend vllm has vLLM do so")
    if config.num_gpus:
        said.append("num_gpus: not reserved; the Scheduler gives an instance what its node has")
    if backend.lora_adapters and not backend.enable_lora:
        said.append("backend_config.lora_adapters: not registered, as enable_lora is false")
    named = ("task", "load_format", "enforce_eager", "enable_prefix_caching", "trace_debug")
    said += [
        f"backend_config.{name}: of no effect here" for name in named if getattr(backend, name) not in (None, "auto")
    ]
    if config.placement_config is not None:
        said.append("placement_config: of no effect; nodes say themselves what they hold, and the Scheduler chooses")
    if config.router_config is not None:
        said.append("router_config: of no effect; a move ends when few tokens are missing (docs/migration.md)")
    if config.scheduler_config is not None:
        said.append("scheduler_config: of no effect; costs are measured and learned (docs/scheduling.md)")
    return said


def _refuse(param: str, what: str) -> NoReturn:
    raise ConfigInvalid(f"{param}: {what}", param=param)
