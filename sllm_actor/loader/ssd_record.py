"""What a partial is to become (`plan.json`), and what a model in the SSD tier consists of (`.sllm-tier.json`).

Checks names, sizes and digests, and computes the id of a model that brings none. Reads and writes nothing itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from sllm_actor.checkpoint.digests import DIGEST_BYTES, chunk_count, digest
from sllm_actor.checkpoint.manifest import (
    DEFAULT_CHUNK_BYTES,
    MANIFEST_NAME,
    MAX_CHUNK_BYTES,
    MAX_DIGESTS,
    MAX_MANIFEST_BYTES,
    MAX_OTHER_FILES,
    MIN_CHUNK_BYTES,
    Digest,
    Manifest,
    Name,
    OtherRecord,
    Sha256,
    Size,
    parse_manifest,
)
from sllm_actor.domain.sentence_modules import is_pooling_name, wrong_below
from sllm_actor.errors import CheckpointCorrupt, CheckpointInvalid, CheckpointTruncated, ConfigInvalid, InvalidName
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.sources.source import MAX_FILES, SourceFile, is_file_name

FORMAT_VERSION = 1
RECORD_NAME = ".sllm-tier.json"
MAX_KEY_CHARS = 4096
MAX_PLAN_BYTES = 32 * 2**20
MAX_RECORD_BYTES = MAX_MANIFEST_BYTES
MAX_SMALL_BYTES = MAX_MANIFEST_BYTES
MAX_SMALLS_BYTES = 2 * MAX_MANIFEST_BYTES
_MODEL_ID = re.compile(r"[0-9a-f]{64}")

ChunkBytes = Annotated[int, Meta(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)]
Others = Annotated[tuple[OtherRecord, ...], Meta(max_length=MAX_OTHER_FILES + 1)]


class PlannedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A weight file that is to come; `validator` is its source's, and tells this version of it from any other.

    `sha256` is what its source says that it has; empty where it does not say.
    """

    name: Name
    size_bytes: Size
    validator: Annotated[str, Meta(max_length=4096)] = ""
    sha256: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a partial is to become. A digest covers `digest_bytes`, of which a chunk is a multiple."""

    format_version: int
    key: Annotated[str, Meta(min_length=1, max_length=MAX_KEY_CHARS)]
    chunk_bytes: ChunkBytes
    digest_bytes: ChunkBytes
    files: Annotated[tuple[PlannedFile, ...], Meta(min_length=1, max_length=MAX_FILES)]
    others: Others

    @property
    def size_bytes(self) -> int:
        """What the files will take."""
        return sum(file.size_bytes for file in self.files) + sum(other.size_bytes for other in self.others)

    @property
    def pieces(self) -> int:
        """How many digests a whole chunk has."""
        return self.chunk_bytes // self.digest_bytes

    @property
    def chunks(self) -> int:
        """How many chunks the files have."""
        return sum(chunk_count(file.size_bytes, self.chunk_bytes) for file in self.files)

    def length(self, place: ChunkPlace) -> int:
        """Return how many bytes a chunk has; 0 where there is no such chunk."""
        if not 0 <= place.file < len(self.files) or place.chunk < 0:
            return 0
        left = self.files[place.file].size_bytes - place.chunk * self.chunk_bytes
        return max(0, min(self.chunk_bytes, left))

    def digests(self, chunk: memoryview) -> bytes:
        """Digest a chunk, piece by piece; the digests follow each other."""
        step = self.digest_bytes
        return b"".join(digest(chunk[at : at + step]) for at in range(0, len(chunk), step))

    def continues(self, other: Plan, *, of_any_version: bool) -> bool:
        """Tell whether chunks that were written for `other` may be chunks of this one.

        `of_any_version`: also of files with other validators, because digests tell which are.
        """
        if (self.key, self.chunk_bytes, self.digest_bytes) != (other.key, other.chunk_bytes, other.digest_bytes):
            return False
        if of_any_version:
            return [(file.name, file.size_bytes) for file in self.files] == [
                (file.name, file.size_bytes) for file in other.files
            ]
        return self.files == other.files


class StoredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A weight file with the digest of each `digest_bytes` of it."""

    name: Name
    size_bytes: Size
    digests: tuple[Digest, ...]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole model in the tier: its bytes are these."""

    format_version: int
    model_id: Sha256
    digest_bytes: ChunkBytes
    files: Annotated[tuple[StoredFile, ...], Meta(min_length=1, max_length=MAX_FILES)]
    others: Others

    @property
    def size_bytes(self) -> int:
        """What the files take."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each file by its name."""
        found = {file.name: file.size_bytes for file in self.files}
        return found | {other.name: other.size_bytes for other in self.others}


PlanOrRecord = TypeVar("PlanOrRecord", Plan, Record)


def check_model_id(model_id: str) -> str:
    """Accept 64 hexadecimal characters.

    Raises:
        InvalidName: anything else.
    """
    if not _MODEL_ID.fullmatch(model_id):
        raise InvalidName(f"{model_id[:80]!r} is not a model id: 64 characters of 0-9 and a-f", param="model_id")
    return model_id


def is_model_id(name: str) -> bool:
    """Tell whether a folder of this name can be a model or a partial of ours."""
    return bool(_MODEL_ID.fullmatch(name))


def folder_name(key: str) -> str:
    """Return the name of the folder of a partial: any text may be a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def make_plan(
    key: str, files: Sequence[SourceFile | PlannedFile], smalls: Mapping[str, bytes], chunk_bytes: int
) -> tuple[Plan, Manifest | None]:
    """Check what a partial is to become; with the manifest, where there is one among the small files.

    Raises:
        InvalidName: a key or the name of a file is impossible, or comes twice.
        ConfigInvalid: `chunk_bytes` is not a power of two within bounds.
        CheckpointInvalid: too many files or digests, or a manifest that disagrees with the files.
        CheckpointTruncated, CheckpointCorrupt: the manifest names a small file that is missing, or is another one.
    """
    if not 1 <= len(key) <= MAX_KEY_CHARS:
        raise InvalidName(f"a key of the SSD tier has 1 to {MAX_KEY_CHARS} characters", param="key")
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes & (chunk_bytes - 1):
        raise ConfigInvalid(f"chunk_bytes {chunk_bytes} is not a power of two from {MIN_CHUNK_BYTES} on", param="chunk")
    if not 1 <= len(files) <= MAX_FILES or len(smalls) > MAX_OTHER_FILES + 1:
        raise CheckpointInvalid(f"{len(files)} weight files and {len(smalls)} small ones are too few or too many")
    names = [*(file.name for file in files), *smalls]
    wrong = wrong_below(names)
    for name in names:
        if not is_file_name(name) and (name == wrong or name not in smalls or not is_pooling_name(name)):
            raise InvalidName(f"{name[:120]!r} is not the name of a file of a checkpoint", param="name")
    if len(set(names)) < len(names):
        raise InvalidName("a file comes twice", param="name")
    manifest = parse_manifest(smalls[MANIFEST_NAME]) if MANIFEST_NAME in smalls else None
    digest_bytes = min(chunk_bytes, manifest.chunk_bytes if manifest is not None else DEFAULT_CHUNK_BYTES)
    if sum(chunk_count(file.size_bytes, digest_bytes) for file in files) > MAX_DIGESTS:
        raise CheckpointInvalid(f"it would need more than {MAX_DIGESTS} digests; choose larger chunks")
    plan = Plan(
        FORMAT_VERSION, key, chunk_bytes, digest_bytes,
        tuple(PlannedFile(file.name, file.size_bytes, file.validator, file.sha256) for file in files),
        tuple(OtherRecord(name, len(raw), digest(raw).hex()) for name, raw in sorted(smalls.items())),
    )  # fmt: skip
    if manifest is not None:
        _check_manifest(manifest, plan)
    # What a plan.json with this content would be refused for, is refused now.
    return parse_plan(encode_plan(plan)), manifest


def _check_manifest(manifest: Manifest, plan: Plan) -> None:
    listed = sorted((file.name, file.size_bytes) for file in manifest.files)
    if listed != sorted((file.name, file.size_bytes) for file in plan.files):
        raise CheckpointInvalid(f"{MANIFEST_NAME} lists other weight files, or other sizes, than there are to come")
    found = {other.name: other for other in plan.others}
    for other in manifest.others:
        if other.name not in found:
            raise CheckpointTruncated(f"{other.name} is listed in {MANIFEST_NAME} and is not among the small files")
        if found[other.name] != other:
            raise CheckpointCorrupt(
                f"{other.name} has digest {found[other.name].digest} and should have {other.digest}"
            )


def parse_plan(raw: bytes) -> Plan:
    """Parse a `plan.json`.

    Raises:
        CheckpointInvalid: it is none, or of another version.
    """
    return _checked(raw, Plan)


def encode_plan(plan: Plan) -> bytes:
    """Write a plan as JSON.

    Raises:
        InvalidName: the key, or a validator, is not text that UTF-8 can hold.
    """
    try:
        return msgspec.json.encode(plan)
    except UnicodeEncodeError:
        raise InvalidName("a key or a validator of the SSD tier holds half a character", param="key") from None


def make_record(plan: Plan, manifest: Manifest | None, digests: Mapping[ChunkPlace, bytes]) -> Record:
    """Describe the model that a complete partial is; its id is the manifest's, or computed."""
    stored = []
    for number, file in enumerate(plan.files):
        chunks = range(chunk_count(file.size_bytes, plan.chunk_bytes))
        raw = b"".join(digests[ChunkPlace(number, chunk)] for chunk in chunks)
        pieces = range(chunk_count(file.size_bytes, plan.digest_bytes))
        hexes = tuple(raw[k * DIGEST_BYTES : (k + 1) * DIGEST_BYTES].hex() for k in pieces)
        stored.append(StoredFile(file.name, file.size_bytes, hexes))
    stored.sort(key=lambda file: file.name)
    blank = Record(FORMAT_VERSION, "0" * 64, plan.digest_bytes, tuple(stored), plan.others)
    return msgspec.structs.replace(blank, model_id=manifest.model_id if manifest else computed_id(blank))


def computed_id(record: Record) -> str:
    """Digest the content that a record describes: SHA-256 over its canonical form, without the id itself."""
    content = msgspec.to_builtins(record)
    del content["model_id"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_record(raw: bytes) -> Record:
    """Parse a `.sllm-tier.json`, and check that its id is that of its content, where no manifest has the say.

    Raises:
        CheckpointInvalid: it is none, of another version, or disagrees with itself.
    """
    record = _checked(raw, Record)
    if MANIFEST_NAME not in {other.name for other in record.others} and record.model_id != computed_id(record):
        raise CheckpointInvalid(f"{RECORD_NAME} has the id {record.model_id}, and its content another")
    return record


def encode_record(record: Record) -> bytes:
    """Write a record as JSON, one field a line for people."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def _checked(raw: bytes, kind: type[PlanOrRecord]) -> PlanOrRecord:
    try:
        found = msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as wrong:
        raise CheckpointInvalid(f"a {kind.__name__.lower()} of the SSD tier can't be read: {wrong}") from None
    if found.format_version != FORMAT_VERSION:
        raise CheckpointInvalid(f"a {kind.__name__.lower()} of the SSD tier has the version {found.format_version}")
    return found
