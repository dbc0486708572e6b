"""The host pool's chunks: handed out once each, and mapped into engines without a copy."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from checkpoints import folder_of, write_config
from hypothesis import given
from hypothesis import strategies as st
from loaders import CHUNK, bytes_of, checkpoint_of, mapped_pools, on_disk, opened
from loaders import mover as mover
from safetensors.torch import load_file, save_file

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.safetensors_header import Tensor
from sllm_actor.errors import (
    InvalidInput,
)
from sllm_actor.loader import native
from sllm_actor.loader.mapping import HostFile, map_files
from sllm_actor.loader.pool import HostPool

pytestmark = pytest.mark.usefixtures("mover")


# ---- the pool's bookkeeping ----


@given(st.lists(st.integers(1, 6), max_size=30), st.randoms(use_true_random=False))
def test_the_pool_hands_out_no_chunk_twice_and_loses_none(counts: list[int], random: Any) -> None:
    pool = HostPool(CHUNK, 16)
    taken: list[tuple[int, ...]] = []
    for count in counts:
        if count > pool.free_chunks:
            pool.give_back(taken.pop(random.randrange(len(taken))))
        else:
            taken.append(pool.take(count))
        held = [chunk for chunks in taken for chunk in chunks]
        assert len(set(held)) == len(held) == 16 - pool.free_chunks
        assert set(held) <= set(range(16))


def test_a_chunk_given_back_twice_is_our_own_bug() -> None:
    pool = HostPool(CHUNK, 2)
    chunks = pool.take(1)
    pool.give_back(chunks)
    with pytest.raises(AssertionError, match="free already"):
        pool.give_back(chunks)


# ---- mappings ----

CHILD = """
import sys, hashlib, msgspec
from sllm_actor.loader.mapping import HostFile, map_files
assert not {"torch", "asyncio"} & set(sys.modules), "an engine's mapping must not bring these"
fd, chunk_bytes, files = msgspec.json.decode(sys.argv[1], type=tuple[int, int, list[HostFile]])
mapped = map_files(fd, chunk_bytes, files)
print(*(hashlib.sha256(buffer).hexdigest() for buffer in mapped.buffers))
for buffer in mapped.buffers:
    buffer[:] = bytes(len(buffer))
print(sum(map(sum, mapped.buffers)))
"""


async def test_another_process_sees_the_bytes_and_its_writes_stay_its_own(tmp_path: Path) -> None:
    checkpoint = read_folder(folder_of(tmp_path, 2 * CHUNK + 77, CHUNK))
    async with opened() as loader:
        lease = await loader.lease(checkpoint)
        described = msgspec.json.encode((loader.pool_fd, loader.chunk_bytes, lease.files)).decode()
        child = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", CHILD, described],
            pass_fds=[loader.pool_fd],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(native.__file__).parents[2])},
        )
        digests, zero = child.stdout.splitlines()
        assert digests.split() == [hashlib.sha256(raw).hexdigest() for raw in on_disk(checkpoint)]
        assert zero == "0"
        assert bytes_of(loader, lease) == on_disk(checkpoint)


async def test_scattered_chunks_are_mapped_in_the_order_of_the_file(tmp_path: Path) -> None:
    holes = [checkpoint_of(tmp_path / str(k), seed=k) for k in range(8)]
    scattered = checkpoint_of(tmp_path / "scattered", chunks=4, seed=99)
    async with opened(chunks=8) as loader:
        leases = [await loader.lease(hole) for hole in holes]
        for lease in leases[::2]:
            lease.release()
        lease = await loader.lease(scattered)
        assert lease.files[0].chunks == (0, 2, 4, 6)
        assert bytes_of(loader, lease) == on_disk(scattered)


async def test_memory_outlives_close_until_its_last_view_is_gone(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=2)
    async with opened() as loader:
        lease, before = await loader.lease(checkpoint), mapped_pools()
        mapped = map_files(loader.pool_fd, loader.chunk_bytes, lease.files)
        tensor = torch.frombuffer(mapped.buffers[0], dtype=torch.uint8)
        mapped.close()
        mapped.close()
        gc.collect()
        assert mapped_pools() > before
        assert bytes(tensor.numpy()) == on_disk(checkpoint)[0]
        del tensor
        gc.collect()
        assert mapped_pools() == before


@pytest.mark.parametrize(
    "file",
    [
        HostFile("x", CHUNK, (32,)),
        HostFile("x", CHUNK, (-1,)),
        HostFile("x", CHUNK, ()),
        HostFile("x", CHUNK + 1, (0,)),
        HostFile("x", 0, ()),
    ],
    ids=str,
)
async def test_chunks_that_do_not_fit_are_refused_before_anything_is_mapped(file: HostFile) -> None:
    async with opened(chunks=32) as loader:
        with pytest.raises(InvalidInput):
            map_files(loader.pool_fd, loader.chunk_bytes, [file])
        with map_files(loader.pool_fd, loader.chunk_bytes, [HostFile("x", CHUNK, (31,))]) as mapped:
            assert len(mapped.buffers[0]) == CHUNK


async def test_the_pool_cannot_be_resized_under_an_engine() -> None:
    async with opened() as loader:
        for size_bytes in (0, 33 * CHUNK):
            with pytest.raises(PermissionError):
                os.ftruncate(loader.pool_fd, size_bytes)


def same_bytes(buffer: memoryview, tensor: Tensor, expected: torch.Tensor) -> bool:
    flat = torch.frombuffer(buffer, dtype=expected.dtype, count=expected.numel(), offset=tensor.begin)
    return bool(flat.view(torch.uint8).equal(expected.flatten().view(torch.uint8)))


async def test_tensors_on_the_mapping_equal_those_that_safetensors_loads(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(1000, 33).to(torch.bfloat16),
        "fp8": torch.randn(77).to(torch.float8_e4m3fn),
        "flags": torch.rand(13) > 0.5,
        "f64": torch.randn(5, 5, dtype=torch.float64),
        "i64": torch.arange(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    write_config(tmp_path)
    checkpoint, loaded = read_folder(tmp_path), load_file(tmp_path / "model.safetensors")
    async with opened() as loader:
        lease = await loader.lease(checkpoint)
        with map_files(loader.pool_fd, loader.chunk_bytes, lease.files, populate=True) as mapped:
            for tensor in checkpoint.files[0].header.tensors:
                assert same_bytes(mapped.buffers[0], tensor, loaded[tensor.name]), tensor.name
