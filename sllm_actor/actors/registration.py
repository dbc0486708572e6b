"""Check a checkpoint from every side before it is registered: files, config, tokenizer, model class."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from sllm_actor.actors.for_vllm import architecture_for_vllm, refuse_adapters
from sllm_actor.actors.preparing import prepare_of
from sllm_actor.checkpoint.adapter import LoraConfig
from sllm_actor.checkpoint.embedding_config import embedding_of, names_width
from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.checkpoint.model_config import read_model_config
from sllm_actor.checkpoint.sentence_layout import read_sentence_layout
from sllm_actor.domain import Backend, Model, Scaling
from sllm_actor.engine.architectures import ENCODERS, MODULES, choose
from sllm_actor.engine.pool import Engines
from sllm_actor.errors import AdapterInvalid, InvalidRequest, ModelTooLarge, TokenizerInvalid
from sllm_actor.loader.cards import Card
from sllm_actor.messages.models import RegisterModel
from sllm_actor.sources.folder import resolve
from sllm_actor.sources.open import is_local
from sllm_actor.units import format_bytes

CHECK_TIMEOUT_S = 60.0

FindBase = Callable[[LoraConfig], Awaitable[Model]]
"""Gives the model that an adapter is for, its folder whole."""


class TokenizerFacts(NamedTuple):
    """What the gateway's text process found in the folder."""

    vocabulary_tokens: int
    chat: bool


class Examiner:
    """Turns a registration's source into a checked `Model`. Owns nothing."""

    def __init__(
        self,
        engines: Mapping[Backend, Engines],
        inspect_tokenizer: Callable[[str], Awaitable[TokenizerFacts]],
        builtin: Mapping[str, Path],
        describe: Callable[[str], Awaitable[Card]],
        *,
        max_adapter_rank: int,
        max_adapter_bytes: int,
        pool_bytes: int,
        chunk_bytes: int,
        keep_alive_s: float,
        stop_timeout_s: float,
    ) -> None:
        self._engines = engines
        self._inspect_tokenizer = inspect_tokenizer
        self._builtin = builtin
        self._describe = describe
        self._max_adapter_rank = max_adapter_rank
        self._max_adapter_bytes = max_adapter_bytes
        self._pool_bytes = pool_bytes
        self._chunk_bytes = chunk_bytes
        self._keep_alive_s = keep_alive_s
        self._stop_timeout_s = stop_timeout_s

    async def examine(
        self, message: RegisterModel, now_wall_s: float, find_base: FindBase
    ) -> tuple[Model, Checkpoint | Card]:
        """Read the folder, or the card of what is elsewhere, and try everything but its weights.

        Raises:
            SourceInvalid, SourceError, CheckpointInvalid, ModelTooLarge: the message names what is wrong.
        """
        wanted = await self._find(message.source)
        checkpoint = wanted.checkpoint if isinstance(wanted, Card) else wanted
        if checkpoint.adapter is not None:
            return await self._examine_adapter(message, wanted, await find_base(checkpoint.adapter), now_wall_s), wanted
        if message.base:
            raise InvalidRequest(f"{message.source} is not a LoRA adapter, so that it has no base", param="base")
        loop = asyncio.get_running_loop()
        layout = await loop.run_in_executor(None, read_sentence_layout, checkpoint.path)
        # A checkpoint of sentence-transformers is one that embeds, whatever else its class could do.
        by_vllm = message.backend is Backend.VLLM
        if by_vllm:
            architecture = architecture_for_vllm(checkpoint, embeds=layout is not None)
        else:
            architecture = choose(checkpoint.architectures, generates=layout is None)
        generates = by_vllm or architecture in MODULES
        facts = await loop.run_in_executor(None, read_model_config, checkpoint.path, checkpoint.config)
        # What generates need not be able to embed, too.
        embeds = not by_vllm and (not generates or names_width(checkpoint.config))
        encodes = architecture in ENCODERS
        embedding = embedding_of(checkpoint.config, facts, layout, encodes=encodes) if embeds else None
        host_bytes = self._host_bytes(checkpoint)
        model = Model(
            name=message.name,
            path=str(checkpoint.path),
            source=wanted.url if isinstance(wanted, Card) else str(checkpoint.path),
            card=wanted.key if isinstance(wanted, Card) else "",
            fingerprint=checkpoint.fingerprint,
            architecture=architecture,
            dtype=checkpoint.dtype,
            size_bytes=checkpoint.size_bytes,
            host_bytes=host_bytes,
            context_tokens=facts.context_tokens if embedding is None or generates else embedding.max_tokens,
            vocabulary_tokens=facts.vocabulary_tokens,
            eos_token_ids=facts.eos_token_ids,
            default_temperature=facts.default_temperature,
            default_top_p=facts.default_top_p,
            default_top_k=facts.default_top_k,
            default_min_p=facts.default_min_p,
            default_repetition_penalty=facts.default_repetition_penalty,
            default_max_tokens=facts.default_max_tokens,
            chat=False,  # Until the tokenizer has said so.
            keep_alive_s=self._keep_alive_s if message.keep_alive_s is None else message.keep_alive_s,
            registered_wall_s=now_wall_s,
            scaling=message.scaling,
            generates=generates,
            embedding=embedding,
            backend=message.backend,
        )
        await self._try_model(model, checkpoint)
        tokenizer = await self._inspect_tokenizer(str(checkpoint.path))
        if tokenizer.vocabulary_tokens > facts.vocabulary_tokens:
            raise TokenizerInvalid(
                f"the tokenizer has {tokenizer.vocabulary_tokens} tokens, the model an embedding for "
                f"{facts.vocabulary_tokens}"
            )
        return msgspec.structs.replace(model, chat=tokenizer.chat and generates), wanted

    async def _examine_adapter(
        self, message: RegisterModel, wanted: Checkpoint | Card, base: Model, now_wall_s: float
    ) -> Model:
        """Hold an adapter against the bounds and against its base; it is served as that is."""
        checkpoint = wanted.checkpoint if isinstance(wanted, Card) else wanted
        assert checkpoint.adapter is not None
        refuse_adapters(base)
        if not base.generates:
            raise AdapterInvalid(f"{base.name} does not generate, and only what does can have adapters", param="base")
        if checkpoint.adapter.largest_rank > self._max_adapter_rank:
            raise AdapterInvalid(
                f"the adapter has rank {checkpoint.adapter.largest_rank}, and {self._max_adapter_rank} may be: "
                "raise max_adapter_rank"
            )
        if checkpoint.size_bytes > self._max_adapter_bytes:
            raise ModelTooLarge(
                f"the adapter has {format_bytes(checkpoint.size_bytes)}, "
                f"{format_bytes(self._max_adapter_bytes)} may be: raise max_adapter_bytes"
            )
        host_bytes = self._host_bytes(checkpoint)
        if base.host_bytes + host_bytes > self._pool_bytes:
            raise ModelTooLarge(
                f"the adapter needs {format_bytes(host_bytes)} of host memory beside {base.name}'s "
                f"{format_bytes(base.host_bytes)}, the pool has {format_bytes(self._pool_bytes)}: raise host_pool_bytes"
            )
        await self._try_adapter(base, checkpoint)
        return msgspec.structs.replace(
            base,
            name=message.name,
            embedding=None,
            path=str(checkpoint.path),
            source=wanted.url if isinstance(wanted, Card) else str(checkpoint.path),
            card=wanted.key if isinstance(wanted, Card) else "",
            fingerprint=checkpoint.fingerprint,
            dtype=checkpoint.dtype,
            size_bytes=checkpoint.size_bytes,
            host_bytes=host_bytes,
            registered_wall_s=now_wall_s,
            base=base.name,
            text_path=base.path,
            scaling=Scaling(),
        )

    async def _find(self, source: str) -> Checkpoint | Card:
        if is_local(source):
            return await read_off_loop(resolve(source, self._builtin))
        return await self._describe(source)

    def _host_bytes(self, checkpoint: Checkpoint) -> int:
        """Count what it takes of the host pool, where each file begins on a chunk of its own."""
        chunks = sum(-(-file.size_bytes // self._chunk_bytes) for file in checkpoint.files)
        if chunks * self._chunk_bytes > self._pool_bytes:
            raise ModelTooLarge(
                f"the checkpoint needs {format_bytes(chunks * self._chunk_bytes)} of host memory, the pool has "
                f"{format_bytes(self._pool_bytes)}: raise host_pool_bytes"
            )
        return chunks * self._chunk_bytes

    async def _try_model(self, model: Model, checkpoint: Checkpoint) -> None:
        """Let a warm engine build the model and compare it with the files' headers; no weight is read."""
        engine = await self._engines[model.backend].take()
        try:
            engine.prepare(prepare_of(model, checkpoint))
            await engine.check()
        finally:
            await engine.leave(self._stop_timeout_s)

    async def _try_adapter(self, base: Model, checkpoint: Checkpoint) -> None:
        """Let a warm engine build the base and compare the adapter with it; no weight is read."""
        engine = await self._engines[base.backend].take()
        try:
            engine.prepare(prepare_of(base))
            # A pattern of module names may run for ever; the engine is ended with it.
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await engine.check_adapter(str(checkpoint.path))
        except TimeoutError:
            engine.kill()
            raise AdapterInvalid(f"comparing it with its base took longer than {CHECK_TIMEOUT_S:g} s") from None
        finally:
            await engine.leave(self._stop_timeout_s)


async def read_off_loop(path: Path) -> Checkpoint:
    """Read a checkpoint folder on a thread.

    Raises:
        CheckpointInvalid: it can't be served.
    """
    return await asyncio.get_running_loop().run_in_executor(None, read_folder, path)
