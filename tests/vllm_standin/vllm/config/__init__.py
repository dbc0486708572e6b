"""The configurations that loaders are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class LoadConfig:
    """How weights are loaded."""

    load_format: str = "auto"
    download_dir: str | None = None
    model_loader_extra_config: dict[str, Any] = field(default_factory=dict)
    device: str | None = None


@dataclass(kw_only=True)
class ModelConfig:
    """What is loaded."""

    model: str
    dtype: str = "auto"
    max_model_len: int | None = None
    quantization: str | None = None
    revision: str | None = None
