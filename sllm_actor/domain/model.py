"""A registered model, as the cluster knows it."""

from __future__ import annotations

import enum

import msgspec

from sllm_actor.domain.backend import Backend
from sllm_actor.domain.embedding import Embedding
from sllm_actor.domain.names import ModelName


class ModelState(enum.StrEnum):
    """Where a model's bytes are at most, and whether it can answer at once; cold: in a folder of the machine's own."""

    REMOTE = "remote"
    COLD = "cold"
    SSD = "ssd"
    LOADING = "loading"
    HOST = "host"
    RUNNING = "running"


class TierChoice(enum.StrEnum):
    """Which tiers of a node an operator means."""

    HOST = "host"
    SSD = "ssd"
    ALL = "all"


class Scaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many instances of a model the cluster runs: as many as its running requests need, within bounds.

    One is meant for `target_concurrency` of them, or for as many as an instance takes at once where that is 0. At least
    `min_instances` run also while nobody asks.
    """

    min_instances: int = 0
    max_instances: int = 1
    target_concurrency: int = 0


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A registration.

    `fingerprint` tells whether the folder is still the one that was registered. What
    begins with `default` is the model's own (generation_config.json) and holds where a request is silent;
    `default_max_tokens` of chats alone, None where the model has none.
    `source` is where it was registered from. `card` names what is kept of one that came through a network, whose `path`
    has everything but the weights; it is empty for a folder. `host_bytes` is what it takes of a host pool, in whole
    chunks. `keep_alive_s` may be infinite. `embedding` says how it embeds texts; one that does not `generate` does only
    that. A registration of an earlier version says nothing of it. A LoRA adapter has the name of its `base`, on
    whose instances it runs, and that model's folder as `text_path`; both are empty for any other model.
    `backend` says whose engine computes it.
    """

    name: ModelName
    path: str
    source: str = ""
    card: str = ""
    fingerprint: str
    architecture: str
    dtype: str
    size_bytes: int
    host_bytes: int
    context_tokens: int
    vocabulary_tokens: int
    eos_token_ids: tuple[int, ...]
    default_temperature: float
    default_top_p: float
    chat: bool
    keep_alive_s: float
    registered_wall_s: float
    # Registrations that were stored before these were known lack them.
    default_top_k: int = 0
    default_min_p: float = 0.0
    default_repetition_penalty: float = 1.0
    default_max_tokens: int | None = None
    generates: bool = True
    embedding: Embedding | None = None
    base: str = ""
    text_path: str = ""
    scaling: Scaling = Scaling()
    backend: Backend = Backend.SLLM

    @property
    def texts(self) -> str:
        """The folder of its tokenizer and chat template: an adapter speaks as its base does."""
        return self.text_path or self.path
