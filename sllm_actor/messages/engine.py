"""InferenceWorker and its engine process, over a Unix socket pair."""

from __future__ import annotations

from sllm_actor.domain import Embedding, EngineLimits, RequestId, Resume, Span
from sllm_actor.messages.declare import message
from sllm_actor.messages.embedding import Embed, Embedded
from sllm_actor.messages.generation import Finished, Generate, PromptLogprobs, Tokens


@message("engine.hello")
class EngineHello:
    """The engine's first word: it is warm and waits for a model."""


@message("engine.prepare")
class PrepareModel:
    """Build the model of the folder `path` without its weights. The bytes may still be on their way.

    `aliases` has the stored name of each tensor that is stored under another one. A model that does not `generate` is
    built without its head.
    """

    path: str
    dtype: str
    eos_token_ids: tuple[int, ...]
    context_tokens: int
    aliases: dict[str, str]
    generates: bool = True
    embedding: Embedding | None = None


@message("engine.check")
class CheckModel:
    """Compare the prepared model with the headers of its folder's files; no weight is read.

    Answered by `ModelChecked` or `EngineFailed`.
    """


@message("engine.checked")
class ModelChecked:
    """The checkpoint brings every tensor that its config implies, in the right shape."""


@message("engine.file")
class PooledFile:
    """A weight file in the host pool: its chunks in order, as indexes (little-endian uint32).

    One that has a `path` lies in the page cache instead, and is mapped as it lies there, if it is still the one
    of this mtime and inode.
    """

    name: str
    size_bytes: int
    chunks: bytes = b""
    path: str = ""
    mtime_ns: int = 0
    inode: int = 0


@message("engine.map")
class MapWeights:
    """Map the files. Their bytes may still be on their way: mapping takes as long as some of them."""

    chunk_bytes: int
    files: tuple[PooledFile, ...]


@message("engine.attach")
class AttachWeights:
    """The bytes are there: make the mapped files the model's weights. Answered by `EngineReady` or `EngineFailed`."""

    limits: EngineLimits


@message("engine.check_adapter")
class CheckAdapter:
    """Compare the adapter of the folder `path` with the prepared model, by headers; no weight is read.

    Answered by `ModelChecked` or `EngineFailed`.
    """

    path: str


@message("engine.load_adapter")
class LoadAdapter:
    """Have the adapter of the folder `path`, whose bytes are there, for requests that name `key`; others go on.

    Answered by `AdapterLoaded` or `AdapterRefused`.
    """

    key: str
    path: str
    chunk_bytes: int
    files: tuple[PooledFile, ...]


@message("engine.adapter_loaded")
class AdapterLoaded:
    """Requests may name `key` now."""

    key: str


@message("engine.adapter_refused")
class AdapterRefused:
    """The adapter can't be used; nothing of it is mapped any more, and the engine goes on."""

    key: str
    code: str
    text: str


@message("engine.drop_adapter")
class DropAdapter:
    """Let go of an adapter's memory; no request that names it runs any more. Answered by `AdapterDropped`."""

    key: str


@message("engine.adapter_dropped")
class AdapterDropped:
    """Nothing of the adapter is mapped any more."""

    key: str


@message("engine.ready")
class EngineReady:
    """The model can generate. `late_imports` names modules of torch and their like imported since the fork."""

    spans: tuple[Span, ...]
    late_imports: tuple[str, ...]


@message("engine.failed")
class EngineFailed:
    """The model can't be made to run; the engine leaves after this."""

    code: str
    text: str


@message("engine.prefilled")
class Prefilled:
    """The prompt of a request has been computed; its first token follows."""

    request_id: RequestId
    span: Span


@message("engine.generation_failed")
class GenerationError:
    """One request failed; the engine goes on with the others."""

    request_id: RequestId
    code: str
    text: str


@message("engine.cancel")
class CancelGeneration:
    """Forget a request; nothing more is said of it."""

    request_id: RequestId


@message("engine.park")
class Park:
    """Hold the keys and values of a request's tokens, packed as in `Generate`, for one that will go on with them.

    Answered by `Parked`, again behind each `ExtendParked`, or by `GenerationError`; ended by `CancelGeneration`, or by
    the `Generate` that names it.
    """

    request_id: RequestId
    prompt: bytes
    generated: bytes
    resume: Resume
    adapter: str
    priority: int


@message("engine.extend_parked")
class ExtendParked:
    """Hold these tokens as well, packed like the others; nothing is said where nobody is parked under this id."""

    request_id: RequestId
    token_ids: bytes


@message("engine.parked")
class Parked:
    """Of so many tokens, prompt included, all that can be computed before it goes on has been."""

    request_id: RequestId
    known_tokens: int


@message("engine.shutdown")
class ShutDown:
    """Leave, with exit status 0."""


TO_ENGINE = (
    PrepareModel,
    CheckModel,
    CheckAdapter,
    MapWeights,
    AttachWeights,
    LoadAdapter,
    DropAdapter,
    Generate,
    Embed,
    Park,
    ExtendParked,
    CancelGeneration,
    ShutDown,
)
FROM_ENGINE = (
    EngineHello,
    ModelChecked,
    EngineReady,
    AdapterLoaded,
    AdapterRefused,
    AdapterDropped,
    EngineFailed,
    Prefilled,
    Parked,
    PromptLogprobs,
    Tokens,
    Embedded,
    Finished,
    GenerationError,
)
