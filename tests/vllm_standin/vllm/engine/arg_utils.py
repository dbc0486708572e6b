"""The arguments of an engine: those of the real ones that our calls use, by name; others are refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class AsyncEngineArgs:
    """What an engine is made of."""

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    load_format: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    enable_prefix_caching: bool | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    max_logprobs: int = 20
    disable_log_stats: bool = False
    enforce_eager: bool = False
    model_loader_extra_config: dict[str, Any] = field(default_factory=dict)
    scheduling_policy: str = "fcfs"
    generation_config: str = "auto"
    enable_log_requests: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "half", "float16", "bfloat16", "float", "float32"):
            raise ValueError(f"dtype {self.dtype}")
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise ValueError(f"scheduling_policy {self.scheduling_policy}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization {self.gpu_memory_utilization}")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < (self.max_num_seqs or 1):
            raise ValueError("max_num_batched_tokens is less than max_num_seqs")
