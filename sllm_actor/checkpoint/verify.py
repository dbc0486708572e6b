"""Read every byte of a converted checkpoint and compare it with its digests.

A stock folder has no digests: of it only headers and index are checked, and the result says so. Blocking.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from sllm_actor.checkpoint.digests import DIGEST_BYTES, ChunkDigests, digest
from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.checkpoint.manifest import Manifest
from sllm_actor.errors import CheckpointCorrupt, ReadFailed

BLOCK_BYTES = 4 * 2**20
MAX_NAMED = 8
# Called with the bytes done and the bytes to do; what it raises cancels the work.
OnProgress = Callable[[int, int], None]


class Verification(msgspec.Struct, frozen=True):
    """A checkpoint that is in order; without digests (`model_id` None) only its headers have been checked."""

    path: Path
    model_id: str | None
    files: int
    size_bytes: int
    digests: int


def verify(path: Path, on_progress: OnProgress | None = None) -> Verification:
    """Check every digest of a folder, the model id over them, and what `read_folder` checks.

    Raises:
        CheckpointCorrupt: bytes differ; the message names file, chunk and both digests, of eight places at most.
        CheckpointInvalid: the folder is no whole checkpoint, or its manifest disagrees with it.
        ReadFailed: a file can't be read.
    """
    checkpoint = read_folder(path)
    manifest = checkpoint.manifest
    if manifest is None:
        return Verification(checkpoint.path, None, len(checkpoint.files), checkpoint.size_bytes, 0)
    total_bytes = checkpoint.size_bytes + sum(other.size_bytes for other in manifest.others)
    done_bytes = 0

    def count(size_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += size_bytes
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)

    verify_files(checkpoint, count)
    _verify_others(checkpoint, manifest, count)
    return Verification(
        path=checkpoint.path,
        model_id=manifest.model_id,
        files=len(manifest.files) + len(manifest.others),
        size_bytes=total_bytes,
        digests=sum(len(file.digests) for file in manifest.files) + len(manifest.others),
    )


def verify_files(checkpoint: Checkpoint, count: Callable[[int], None]) -> None:
    """Compare the weight files of a converted checkpoint with their digests; `count` is told of each block.

    Raises:
        CheckpointCorrupt: bytes differ.
        ReadFailed: a file can't be read.
    """
    wrong: list[str] = []
    for file in checkpoint.files:
        found = _digests_of(checkpoint.file_path(file), checkpoint.digest_bytes, count)
        expected = [file.digests[k : k + DIGEST_BYTES] for k in range(0, len(file.digests), DIGEST_BYTES)]
        if len(found) != len(expected):
            wrong.append(f"{file.name} has {len(found)} chunks and should have {len(expected)}")
            continue
        wrong += [
            f"{file.name} chunk {k} (from byte {k * checkpoint.digest_bytes}) has digest {has.hex()} "
            f"and should have {should.hex()}"
            for k, (has, should) in enumerate(zip(found, expected, strict=True))
            if has != should
        ]
    _refuse(checkpoint, wrong)


def _verify_others(checkpoint: Checkpoint, manifest: Manifest, count: Callable[[int], None]) -> None:
    wrong = []
    for other in manifest.others:
        path = checkpoint.path / other.name
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ReadFailed(f"{path} can't be read: {error.strerror}") from error
        has = digest(raw).hex()
        if has != other.digest:
            wrong.append(f"{other.name} has digest {has} and should have {other.digest}")
        count(len(raw))
    _refuse(checkpoint, wrong)


def _digests_of(path: Path, chunk_bytes: int, count: Callable[[int], None]) -> tuple[bytes, ...]:
    digests = ChunkDigests(chunk_bytes)
    block = memoryview(bytearray(BLOCK_BYTES))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as wrong:
        raise ReadFailed(f"{path} can't be read: {wrong.strerror}") from wrong
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while got := _read(fd, block, path):
            digests.update(block[:got])
            count(got)
    finally:
        os.close(fd)
    return digests.finish()


def _read(fd: int, block: memoryview, path: Path) -> int:
    try:
        return os.readv(fd, [block])
    except OSError as wrong:
        raise ReadFailed(f"{path} can't be read: {wrong.strerror}") from wrong


def _refuse(checkpoint: Checkpoint, wrong: list[str]) -> None:
    if wrong:
        more = f"; and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        raise CheckpointCorrupt(f"{checkpoint.path} is damaged: {'; '.join(wrong[:MAX_NAMED])}{more}")
