"""What a process does to an SSD tier until it is killed, and what another one finds there afterwards.

Small models with known bytes; two users that pull, pause, drop, evict and pin at random within a quota that holds a
few; and a witness that reads every byte. `kill_storm` runs both, in processes of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from sllm_actor.checkpoint.digests import ChunkDigests, digest
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Origin,
    OriginFormat,
    OtherRecord,
    Partition,
    PartitionKind,
    encode,
    make_manifest,
)
from sllm_actor.errors import Conflict, ModelNotFound, NoCapacity
from sllm_actor.loader.cards import card_key
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.loader.ssd_record import PlannedFile, make_plan, make_record
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.sources.source import SourceFile

CHUNK_BYTES = 8192
MODELS = 12
_CONFIG = b'{"model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 8, "max_position_embeddings": 8}'
_OURS = {".sllm-tier.json", ".sllm-pinned"}
# Told to whoever watches, before and after each thing that is done.
Tell = Callable[[str], None]


class KnownModel(msgspec.Struct, frozen=True):
    """A checkpoint of which every byte and the id are known."""

    number: int
    model_id: str
    files: dict[str, bytes]
    smalls: dict[str, bytes]

    @property
    def size_bytes(self) -> int:
        """What it takes of a quota."""
        return sum(map(len, self.files.values())) + sum(map(len, self.smalls.values()))

    @property
    def planned(self) -> list[PlannedFile]:
        """Its weight files as a source would list them."""
        return [PlannedFile(name, len(raw), f"v-{digest(raw).hex()}") for name, raw in self.files.items()]

    @property
    def keys(self) -> list[str]:
        """What a download of it may go by: two that are made up, and the identity that its card would have."""
        listed = [SourceFile(file.name, file.size_bytes, file.validator) for file in self.planned]
        listed += [SourceFile(name, len(raw), "v") for name, raw in self.smalls.items()]
        identity = self.model_id if MANIFEST_NAME in self.smalls else card_key(self.url, listed)
        return [f"near:{self.number}", f"far:{self.number}", identity]

    @property
    def url(self) -> str:
        """The place that it is registered from."""
        return f"known://{self.number}"

    def chunk(self, place: ChunkPlace) -> bytes:
        """Return the bytes of one chunk."""
        raw = list(self.files.values())[place.file]
        return raw[place.chunk * CHUNK_BYTES : (place.chunk + 1) * CHUNK_BYTES]


def known_models(seed: int) -> list[KnownModel]:
    """Make models of a few chunks: stock ones, some in two files, and converted ones of two digest sizes."""
    draw = random.Random(seed)
    return [_known_model(number, draw) for number in range(MODELS)]


def _known_model(number: int, draw: random.Random) -> KnownModel:
    parts = 2 if number % 4 == 1 else 1
    files, header_digests = {}, []
    for part in range(1, parts + 1):
        name = "model.safetensors" if parts == 1 else f"model-{part:05}-of-{parts:05}.safetensors"
        files[name], header_digest = _weights(f"w.{part}", draw.randbytes(draw.randrange(2000, 40_000)))
        header_digests.append(header_digest)
    smalls = {"config.json": _CONFIG}
    if number % 2 == 0:
        smalls[MANIFEST_NAME] = _manifest(files, header_digests, smalls, (4096, 32768)[number // 2 % 2])
    planned = [PlannedFile(name, len(raw)) for name, raw in files.items()]
    plan, manifest = make_plan("any", planned, smalls, CHUNK_BYTES)
    digests = {
        ChunkPlace(file, at // CHUNK_BYTES): b"".join(
            digest(raw[at + piece : min(at + piece + plan.digest_bytes, at + CHUNK_BYTES)])
            for piece in range(0, min(CHUNK_BYTES, len(raw) - at), plan.digest_bytes)
        )
        for file, raw in enumerate(files.values())
        for at in range(0, len(raw), CHUNK_BYTES)
    }
    return KnownModel(number, make_record(plan, manifest, digests).model_id, files, smalls)


def _weights(tensor: str, data: bytes) -> tuple[bytes, str]:
    header = json.dumps({tensor: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    head = len(header).to_bytes(8, "little") + header
    return head + data, digest(head).hex()


def _manifest(files: dict[str, bytes], header_digests: list[str], smalls: dict[str, bytes], chunk_bytes: int) -> bytes:
    records = []
    for (name, raw), header_digest in zip(files.items(), header_digests, strict=True):
        digests = ChunkDigests(chunk_bytes)
        digests.update(raw)
        records.append(FileRecord(name, len(raw), header_digest, tuple(part.hex() for part in digests.finish())))
    others = [OtherRecord(name, len(raw), digest(raw).hex()) for name, raw in smalls.items()]
    kind = PartitionKind.NONE if len(files) == 1 else PartitionKind.LAYERS
    partition = Partition(kind, len(files))
    origin = Origin(OriginFormat.SAFETENSORS, "0" * 32)
    return encode(make_manifest(chunk_bytes, records, others, {}, partition, origin))


def quota_of(models: list[KnownModel]) -> int:
    """Give a quota that holds a few of them, and the largest in any case."""
    sizes = sorted(model.size_bytes for model in models)
    return sum(sizes) // 2 + sizes[-1]


async def use(tier: SsdTier, models: list[KnownModel], draw: random.Random, tell: Tell) -> None:
    """Use the tier, until somebody puts an end to it."""
    # Each has models of its own, so that what becomes of one is told in order; the quota is for both.
    users = [_User(tier, models[k::2], random.Random(draw.random()), tell).act(steps=40) for k in range(2)]
    await asyncio.gather(*users)


class _User:
    def __init__(self, tier: SsdTier, models: list[KnownModel], draw: random.Random, tell: Tell) -> None:
        self._tier = tier
        self._models = models
        self._draw = draw
        self._tell = tell

    async def act(self, steps: int) -> None:
        acts: list[Callable[[KnownModel], Awaitable[None]]] = [
            self._pull,
            self._evict,
            self._pin,
            self._unpin,
            self._lease,
        ]
        for _ in range(steps):
            act = self._draw.choices(acts, [10, 2, 1, 2, 1])[0]
            with contextlib.suppress(NoCapacity, Conflict, ModelNotFound):
                await act(self._draw.choice(self._models))

    async def _pull(self, model: KnownModel) -> None:
        key = self._draw.choice(model.keys[:2])
        self._tell(f"beginning {model.model_id}")
        try:
            partial = await self._tier.begin(key, model.planned, model.smalls, CHUNK_BYTES)
        finally:
            self._tell(f"begun {model.model_id}")
        fate = self._draw.choices(["publish", "pause", "drop"], [8, 3, 1])[0]
        await fill(partial, model, self._draw, whole=fate == "publish")
        if fate == "publish":
            self._tell(f"publishing {model.model_id}")
            await partial.publish()
            self._tell(f"published {model.model_id}")
        else:
            await (partial.pause() if fate == "pause" else partial.drop())

    async def _evict(self, model: KnownModel) -> None:
        self._tell(f"evicting {model.model_id}")
        await self._tier.evict(model.model_id)
        self._tell(f"evicted {model.model_id}")

    async def _pin(self, model: KnownModel) -> None:
        await self._tier.pin(model.model_id)
        self._tell(f"pinned {model.model_id}")

    async def _unpin(self, model: KnownModel) -> None:
        self._tell(f"unpinning {model.model_id}")
        await self._tier.unpin(model.model_id)

    async def _lease(self, model: KnownModel) -> None:
        lease = self._tier.lease(model.model_id)
        if lease is not None:
            await asyncio.sleep(0)
            lease.release()


async def fill(partial: SsdPartial, model: KnownModel, draw: random.Random, *, whole: bool) -> None:
    """Write what is missing, or some of it, in any order and two chunks at a time."""
    places = list(partial.missing())
    draw.shuffle(places)
    if not whole:
        places = places[: draw.randrange(len(places) + 1)]
    for at in range(0, len(places), 2):
        await asyncio.gather(*(partial.write(*place, memoryview(model.chunk(place))) for place in places[at : at + 2]))


async def witness(
    tier: SsdTier, models: list[KnownModel], draw: random.Random, tell: Tell,
    present: set[str], absent: set[str], pinned: set[str],
) -> str:  # fmt: skip
    """Look at what a killed process has left, compare all of it with what may be, and complete some of the partials."""
    folder = tier.folder
    known = {model.model_id: model for model in models}
    entries = tier.entries()
    whole = {entry.model_id for entry in entries if not entry.partial}
    partials = [entry for entry in entries if entry.partial]
    same(set(os.listdir(folder)), {"tier.lock", "models", "partial", "trash"}, "the tier's folder")
    same(set(os.listdir(folder / "trash")), set(), "the trash")
    same(set(os.listdir(folder / "models")), whole, "models")
    same(set(os.listdir(folder / "partial")), {entry.path.name for entry in partials}, "partials")
    assert present <= whole, f"lost: {present - whole}"
    assert not absent & whole, f"evicted, and there again: {absent & whole}"
    kept = {entry.model_id for entry in entries if entry.pinned}
    assert pinned <= kept, f"no longer pinned: {pinned - kept}"
    for model_id in whole:
        check_model(folder / "models" / model_id, known[model_id])
    sizes = [known[model_id].size_bytes for model_id in whole]
    by_key = {key: model for model in models for key in model.keys}
    sizes += [by_key[entry.model_id].size_bytes for entry in partials]
    same(tier.used_bytes, sum(sizes), "used bytes")
    assert tier.used_bytes <= tier.quota_bytes
    resumed = kept_chunks = 0
    for entry in partials:
        same(set(os.listdir(entry.path)), {"model", "plan.json", "journal"}, str(entry.path))
        if draw.random() < 0.5:
            kept_chunks += await _complete(tier, entry.model_id, by_key[entry.model_id], draw, tell)
            resumed += 1
    return f"{len(whole)} {len(partials)} {resumed} {kept_chunks}"


async def _complete(tier: SsdTier, key: str, model: KnownModel, draw: random.Random, tell: Tell) -> int:
    partial = await tier.begin(key, model.planned, model.smalls, CHUNK_BYTES)
    missing = set(partial.missing())
    places = [
        ChunkPlace(file, chunk)
        for file, raw in enumerate(model.files.values())
        for chunk in range(-(-len(raw) // CHUNK_BYTES))
    ]
    for place in places:
        if place not in missing:
            into = bytearray(len(model.chunk(place)))
            await partial.read(*place, memoryview(into))
            same(bytes(into), model.chunk(place), f"{key} {place}")
    await fill(partial, model, draw, whole=True)
    tell(f"publishing {model.model_id}")
    entry = await partial.publish()
    same(entry.model_id, model.model_id, "the model id")
    tell(f"published {model.model_id}")
    check_model(entry.path, model)
    return len(places) - len(missing)


def check_model(path: Path, model: KnownModel) -> None:
    """Compare a published model with what it should be, byte by byte."""
    expected = model.files | model.smalls
    assert set(os.listdir(path)) - _OURS == set(expected), f"{path} holds {os.listdir(path)}"
    for name, raw in expected.items():
        assert (path / name).read_bytes() == raw, f"torn: {path / name}"
    read_folder(path)


def same(found: object, expected: object, what: str) -> None:
    """Fail, saying what differs, unless both are equal."""
    assert found == expected, f"{what}: {found!r}, and should be {expected!r}"
