"""Devices and their memory: over a fake CUDA driver everywhere, over the real one where there is a GPU."""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_cuda import NATIVE, FakeCuda, build_fake, compile_native, fake_cuda, fake_cuda_library
from loaders import settled

from sllm_actor.engine.device_view import DeviceView, tensor_on
from sllm_actor.errors import (
    ConfigInvalid,
    DeviceFailed,
    DeviceMissing,
    DeviceOutOfMemory,
    InvalidInput,
)
from sllm_actor.loader.device import Device, DeviceBuffer, count_devices
from sllm_actor.loader.mover import FilePlan, LoadPlan, LoadState, LoadStatus, MoverOptions
from sllm_actor.loader.native import NativeMover
from sllm_actor.units import GIB, KIB, MIB

__all__ = ["fake_cuda", "fake_cuda_library"]

CHUNK = 64 * KIB
CHUNKS = 32
LIMIT_S = 60.0
NOT_SUPPORTED, OUT_OF_MEMORY = 801, 2


def real_driver() -> None:
    """Skip where there is no device, and say why."""
    try:
        count = count_devices()
    except DeviceMissing as missing:
        pytest.skip(f"no CUDA device: {missing}")
    if count == 0:
        pytest.skip("no CUDA device: the driver knows none")


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> str | None:
    """The driver that a test runs on, as `Device.open` takes it."""
    if request.param == "real":
        real_driver()
        return None
    return str(request.getfixturevalue("fake_cuda").path)


def own_descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir() if path.exists())


def device_threads() -> list[str]:
    threads = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # It may end between being listed and being looked at.
            if (name := path.read_text().strip()) in ("sllm-device", "fake-stream"):
                threads.append(f"{name} {path.parent.name}")
    return threads


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    def held() -> set[str]:
        return {*own_descriptors(), *device_threads()}

    before = held()
    yield
    if request.node.get_closest_marker("gpu") is None:  # The real driver keeps some for as long as the process lives.
        # An event loop of earlier tests may be given up meanwhile.
        assert settled(lambda: held() - before, set()) == set()


@pytest.fixture
def mover() -> Iterator[NativeMover]:
    mover = NativeMover(
        MoverOptions(chunk_bytes=CHUNK, chunks=CHUNKS, reading_threads=2, max_loads=4, lock=False, huge_pages=False)
    )
    yield mover
    mover.close()


def a_file(folder: Path, chunks: int, seed: int = 0) -> tuple[Path, bytes]:
    content = random.Random(seed).randbytes(chunks * CHUNK - 100)
    path = folder / f"file-{seed}"
    path.write_bytes(content)
    return path, content


def start(mover: NativeMover, path: Path, target: DeviceBuffer, first_chunk: int = 0, offset: int = 0) -> int:
    found = path.stat()
    chunks = tuple(range(first_chunk, first_chunk - (-found.st_size // CHUNK)))
    file = FilePlan(
        str(path), found.st_size, found.st_mtime_ns, found.st_ino, chunks, target=target.target, target_offset=offset
    )
    return mover.start(LoadPlan((file,)))


def end_of(mover: NativeMover, load_id: int) -> LoadStatus:
    """Wait for a load's end."""
    while (status := mover.status(load_id)).state is LoadState.LOADING:
        readable, _, _ = select.select([mover.event_fd], [], [], LIMIT_S)
        assert readable, status
        with contextlib.suppress(BlockingIOError):
            os.read(mover.event_fd, 8)
    mover.forget(load_id)
    return status


@contextmanager
def owner(driver: str | None, size_bytes: int) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """Another process that owns device memory, and its handle."""
    command = [sys.executable, str(Path(__file__).with_name("device_owner.py")), driver or "-", str(size_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process, bytes.fromhex(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(LIMIT_S)


def ask(process: subprocess.Popen[str], offset: int, length: int) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{offset} {length}\n")
    process.stdin.flush()
    return bytes.fromhex(process.stdout.readline())


# ---- Drivers and devices ----


def test_a_device_says_what_it_is(driver: str | None) -> None:
    assert count_devices(driver) >= 1
    with Device.open(0, driver=driver) as device:
        facts = device.facts()
        assert facts.ordinal == 0
        assert facts.name
        assert facts.driver_version >= 11000
        assert 0 < facts.free_bytes <= facts.total_bytes


def test_the_memory_of_a_buffer_is_not_free(fake_cuda: FakeCuda) -> None:
    with Device.open(0, driver=fake_cuda.path) as device:
        device.create_buffer(100 * MIB)
        assert device.facts().free_bytes == GIB - 100 * MIB
        assert device.facts().name == "Fake 0"


def test_a_machine_without_a_driver_has_no_device() -> None:
    with pytest.raises(DeviceMissing, match="no CUDA driver"):
        count_devices("libcuda-that-is-not-here.so.1")
    with pytest.raises(DeviceMissing, match="no CUDA driver"):
        Device.open(0, driver="libcuda-that-is-not-here.so.1")


def test_a_driver_may_know_no_device(fake_cuda: FakeCuda) -> None:
    fake_cuda.set("devices", 0)
    assert count_devices(fake_cuda.path) == 0
    with pytest.raises(DeviceMissing, match="no CUDA device 0, there are 0"):
        Device.open(0, driver=fake_cuda.path)


def test_a_device_beyond_the_last_is_missing(fake_cuda: FakeCuda) -> None:
    fake_cuda.set("devices", 3)
    assert count_devices(fake_cuda.path) == 3
    Device.open(2, driver=fake_cuda.path).close()
    with pytest.raises(DeviceMissing, match="no CUDA device 3, there are 3"):
        Device.open(3, driver=fake_cuda.path)


def test_a_driver_that_does_not_come_up_is_asked_again(fake_cuda: FakeCuda) -> None:
    fake_cuda.set("init_result", 999)
    with pytest.raises(DeviceFailed, match=r"cuInit: CUDA_ERROR_UNKNOWN \(999\)"):
        count_devices(fake_cuda.path)
    fake_cuda.set("init_result", 0)
    assert count_devices(fake_cuda.path) == 1


def test_a_driver_from_before_cuda_11_is_too_old(tmp_path: Path) -> None:
    old = str(build_fake(tmp_path / "libcuda.so.1", "-DFAKE_CUDA_BEFORE_11"))
    with pytest.raises(DeviceMissing, match=r"too old, it lacks .*cuIpcOpenMemHandle_v2"):
        count_devices(old)


def test_a_driver_from_before_cuda_12_is_found_by_its_symbols(fake_cuda: FakeCuda, tmp_path: Path) -> None:
    old = str(build_fake(tmp_path / "libcuda-11.so", "-DFAKE_CUDA_BEFORE_12"))
    with Device.open(0, driver=old) as device:
        assert device.create_buffer(KIB).read(0, KIB) == bytes(KIB)
    assert count_devices(fake_cuda.path) == 1
    assert fake_cuda.get("lookups") > 0


@pytest.mark.parametrize("streams", [0, 33])
def test_the_number_of_streams_is_bounded(fake_cuda: FakeCuda, streams: int) -> None:
    with pytest.raises(InvalidInput, match="number of streams"):
        Device.open(0, streams=streams, driver=fake_cuda.path)


def test_one_device_may_be_open_twice(fake_cuda: FakeCuda) -> None:
    with Device.open(0, streams=1, driver=fake_cuda.path), Device.open(0, streams=3, driver=fake_cuda.path):
        assert fake_cuda.get("contexts") == 2
        assert fake_cuda.get("streams") == 4


@pytest.mark.parametrize("knob", ["fail_stream_at", "fail_event_at", "retain_result"])
def test_a_device_that_cannot_be_opened_leaves_nothing(fake_cuda: FakeCuda, knob: str) -> None:
    fake_cuda.set(knob, OUT_OF_MEMORY)
    with pytest.raises(DeviceOutOfMemory, match=r"device 0: .*CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        Device.open(0, driver=fake_cuda.path)
    assert fake_cuda.left_behind() == {}
    Device.open(0, driver=fake_cuda.path).close()


# ---- Memory ----


def test_too_much_memory_is_refused_with_both_sizes(fake_cuda: FakeCuda) -> None:
    with Device.open(0, driver=fake_cuda.path) as device:
        device.create_buffer(GIB // 2)
        with pytest.raises(DeviceOutOfMemory, match=f"{GIB} bytes asked, {GIB // 2} bytes free of {GIB} bytes"):
            device.create_buffer(GIB)
        device.create_buffer(GIB // 2).close()


def test_more_memory_than_the_device_has_is_refused(driver: str | None) -> None:
    with Device.open(0, driver=driver) as device:
        size_bytes = device.facts().total_bytes + GIB
        with pytest.raises(DeviceOutOfMemory, match=f"{size_bytes} bytes asked, "):
            device.create_buffer(size_bytes)


@pytest.mark.parametrize("size_bytes", [0, -1, 2**62, 2**63, 2**64 + 1])
def test_an_absurd_size_is_refused(fake_cuda: FakeCuda, size_bytes: int) -> None:
    with Device.open(0, driver=fake_cuda.path) as device:
        with pytest.raises(InvalidInput, match=f"of {size_bytes} bytes"):
            device.create_buffer(size_bytes)
        with pytest.raises(InvalidInput, match=f"of {size_bytes} bytes"):
            device.open_buffer(bytes(64), size_bytes)


@pytest.mark.parametrize(("offset", "length"), [(0, 101), (100, 1), (-1, 1), (0, -1), (2**64, 0), (2**64 - 1, 2)])
def test_reading_outside_of_a_buffer_is_refused(fake_cuda: FakeCuda, offset: int, length: int) -> None:
    with Device.open(0, driver=fake_cuda.path) as device:
        buffer = device.create_buffer(100)
        assert buffer.read(100, 0) == b""
        assert buffer.read(99, 1) == b"\0"
        with pytest.raises(InvalidInput, match="of a device buffer of 100"):
            buffer.read(offset, length)


def test_closing_a_device_closes_its_buffers(driver: str | None) -> None:
    device = Device.open(0, driver=driver)
    first, second = device.create_buffer(1), device.create_buffer(5 * MIB)
    assert first.address % 256 == second.address % 256 == 0
    assert first.address != second.address
    first.close()
    first.close()
    device.close()
    device.close()
    with pytest.raises(AssertionError, match="closed"):
        second.read(0, 1)
    with pytest.raises(AssertionError, match="closed"):
        device.facts()


# ---- Loads into device memory ----


def test_a_load_fills_device_memory(driver: str | None, mover: NativeMover, tmp_path: Path) -> None:
    path, content = a_file(tmp_path, CHUNKS)
    with Device.open(0, driver=driver) as device:
        device.register(mover._pool)
        buffer = device.create_buffer(len(content) + 7)
        status = end_of(mover, start(mover, path, buffer, offset=7))
        assert status.state is LoadState.DONE
        assert status.device_bytes == len(content)
        assert buffer.read(7, len(content)) == content


def test_a_load_works_without_a_registered_pool(driver: str | None, mover: NativeMover, tmp_path: Path) -> None:
    path, content = a_file(tmp_path, 5)
    with Device.open(0, driver=driver) as device:
        buffer = device.create_buffer(len(content))
        assert end_of(mover, start(mover, path, buffer)).state is LoadState.DONE
        assert buffer.read(0, len(content)) == content


def test_loads_to_several_devices_go_on_at_once(fake_cuda: FakeCuda, mover: NativeMover, tmp_path: Path) -> None:
    fake_cuda.set("devices", 2)
    fake_cuda.set("hold", 1)
    files = [a_file(tmp_path, 4, seed=seed) for seed in range(2)]
    with Device.open(0, driver=fake_cuda.path) as one, Device.open(1, driver=fake_cuda.path) as other:
        one.register(mover._pool)
        other.register(mover._pool)
        buffers = [device.create_buffer(4 * CHUNK) for device in (one, other)]
        loads = [
            start(mover, path, buffer, first_chunk=k * 4)
            for k, ((path, _), buffer) in enumerate(zip(files, buffers, strict=True))
        ]
        fake_cuda.wait("copies_enqueued", 8)
        assert [mover.status(load).state for load in loads] == [LoadState.LOADING] * 2
        fake_cuda.set("hold", 0)
        assert [end_of(mover, load).state for load in loads] == [LoadState.DONE] * 2
        for (_, content), buffer in zip(files, buffers, strict=True):
            assert buffer.read(0, len(content)) == content
    assert fake_cuda.get("copies_done_0") == fake_cuda.get("copies_done_1") == 4
    assert fake_cuda.get("synchronous") == 0


def test_a_cancelled_load_ends_after_the_copies_on_their_way(
    fake_cuda: FakeCuda, mover: NativeMover, tmp_path: Path
) -> None:
    path, content = a_file(tmp_path, CHUNKS)
    fake_cuda.set("hold", 1)
    with Device.open(0, streams=2, driver=fake_cuda.path) as device:
        device.register(mover._pool)
        buffer = device.create_buffer(len(content))
        load = start(mover, path, buffer)
        fake_cuda.wait("copies_enqueued", 4)
        mover.cancel(load)
        assert mover.status(load).state is LoadState.LOADING
        fake_cuda.set("hold", 0)
        assert end_of(mover, load).state is LoadState.CANCELLED
        assert fake_cuda.get("copies_enqueued") == 4
        assert fake_cuda.get("max_outstanding") == 2


def test_a_copy_that_fails_fails_its_load_alone(fake_cuda: FakeCuda, mover: NativeMover, tmp_path: Path) -> None:
    path, content = a_file(tmp_path, 6)
    with Device.open(0, driver=fake_cuda.path) as device:
        device.register(mover._pool)
        buffer = device.create_buffer(len(content))
        fake_cuda.set("fail_enqueue_at", 3)
        status = end_of(mover, start(mover, path, buffer))
        assert status.state is LoadState.FAILED
        assert "CUDA_ERROR_INVALID_VALUE (1)" in status.message
        assert end_of(mover, start(mover, path, buffer)).state is LoadState.DONE
        assert buffer.read(0, len(content)) == content


def test_a_device_that_is_lost_fails_all_that_follows(fake_cuda: FakeCuda, mover: NativeMover, tmp_path: Path) -> None:
    path, content = a_file(tmp_path, 6)
    fake_cuda.set("devices", 2)
    with Device.open(0, driver=fake_cuda.path) as lost, Device.open(1, driver=fake_cuda.path) as well:
        for device in (well, lost):
            device.register(mover._pool)
        buffer, elsewhere = lost.create_buffer(len(content)), well.create_buffer(len(content))
        fake_cuda.set("fail_async_at", 2)
        status = end_of(mover, start(mover, path, buffer))
        assert status.state is LoadState.FAILED
        assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in status.message
        calls: list[Callable[[], object]] = [
            lost.facts,
            buffer.export,
            lambda: buffer.read(0, 1),
            lambda: lost.create_buffer(1),
            lambda: lost.register(mover._pool),
        ]
        for call in calls:
            with pytest.raises(DeviceFailed, match=r"device 0: .*CUDA_ERROR_ILLEGAL_ADDRESS"):
                call()
        assert end_of(mover, start(mover, path, buffer)).state is LoadState.FAILED
        assert end_of(mover, start(mover, path, elsewhere)).state is LoadState.DONE
        assert elsewhere.read(0, len(content)) == content


def test_closing_a_buffer_waits_for_the_copies_into_it(fake_cuda: FakeCuda, mover: NativeMover, tmp_path: Path) -> None:
    path, content = a_file(tmp_path, CHUNKS)
    fake_cuda.set("delay_us", 500)
    with Device.open(0, driver=fake_cuda.path) as device:
        device.register(mover._pool)
        buffer = device.create_buffer(len(content))
        load = start(mover, path, buffer)
        fake_cuda.wait("copies_enqueued", 1)
        mover.cancel(load)
        assert end_of(mover, load).state is LoadState.CANCELLED
        buffer.close()
        assert fake_cuda.get("allocations") == 0


# ---- The pool, page-locked for the driver ----


def test_a_pool_is_registered_once_and_its_end_is_the_last_devices(fake_cuda: FakeCuda, mover: NativeMover) -> None:
    fake_cuda.set("devices", 2)
    one, other = Device.open(0, driver=fake_cuda.path), Device.open(1, driver=fake_cuda.path)
    for device in (one, one, other):
        device.register(mover._pool)
    assert fake_cuda.get("registrations") == 1
    one.close()
    assert fake_cuda.get("registrations") == 1
    other.unregister(mover._pool)
    assert fake_cuda.get("registrations") == 0
    with pytest.raises(InvalidInput, match="not registered"):
        other.unregister(mover._pool)
    other.register(mover._pool)
    other.close()
    assert fake_cuda.get("registrations") == 0


def test_a_pool_that_cannot_be_registered_is_a_typed_error(fake_cuda: FakeCuda, mover: NativeMover) -> None:
    with Device.open(0, driver=fake_cuda.path) as device:
        fake_cuda.set("register_result", NOT_SUPPORTED)
        with pytest.raises(DeviceFailed, match=r"page-locking the host pool of .*CUDA_ERROR_NOT_SUPPORTED \(801\)"):
            device.register(mover._pool)
        fake_cuda.set("register_result", OUT_OF_MEMORY)
        with pytest.raises(ConfigInvalid, match="CUDA_ERROR_OUT_OF_MEMORY"):
            device.register(mover._pool)
        fake_cuda.set("register_result", 0)
        device.register(mover._pool)


# ---- Memory of another process ----


def test_a_load_fills_the_memory_of_another_process(driver: str | None, mover: NativeMover, tmp_path: Path) -> None:
    path, content = a_file(tmp_path, 9)
    with owner(driver, len(content)) as (process, handle), Device.open(0, driver=driver) as device:
        device.register(mover._pool)
        buffer = device.open_buffer(handle, len(content))
        assert end_of(mover, start(mover, path, buffer)).state is LoadState.DONE
        assert ask(process, 0, len(content)) == content
        assert ask(process, 5, 10) == buffer.read(5, 10) == content[5:15]
        with pytest.raises(InvalidInput, match="another process owns"):
            buffer.export()
        buffer.close()
        assert ask(process, 0, 100) == content[:100]


def test_a_handle_may_be_opened_twice(fake_cuda: FakeCuda) -> None:
    with owner(fake_cuda.path, MIB) as (_, handle), Device.open(0, driver=fake_cuda.path) as device:
        first, second = device.open_buffer(handle, MIB), device.open_buffer(handle, 100)
        assert first.address == second.address
        first.close()
        assert second.read(0, 100) == bytes(100)


def test_an_older_driver_opens_a_handle_once(fake_cuda: FakeCuda) -> None:
    fake_cuda.set("ipc_open_once", 1)
    with owner(fake_cuda.path, MIB) as (_, handle), Device.open(0, driver=fake_cuda.path) as device:
        first = device.open_buffer(handle, MIB)
        with pytest.raises(DeviceFailed, match=r"CUDA_ERROR_ALREADY_MAPPED \(208\)"):
            device.open_buffer(handle, MIB)
        first.close()
        assert device.open_buffer(handle, MIB).read(0, 1) == b"\0"
    fake_cuda.refusals = 1


def test_memory_whose_owner_died_can_be_closed_but_not_opened(fake_cuda: FakeCuda) -> None:
    with Device.open(0, driver=fake_cuda.path) as device:
        with owner(fake_cuda.path, MIB) as (process, handle):
            buffer = device.open_buffer(handle, MIB)
            process.kill()
            process.wait(LIMIT_S)
        buffer.close()
        fake_cuda.refusals += 1
        with pytest.raises(InvalidInput, match=r"handle #[0-9a-f]{16} is no handle of living device memory"):
            device.open_buffer(handle, MIB)


def test_a_load_into_memory_whose_owner_died_ends(fake_cuda: FakeCuda, mover: NativeMover, tmp_path: Path) -> None:
    path, content = a_file(tmp_path, CHUNKS)
    with Device.open(0, driver=fake_cuda.path) as device:
        device.register(mover._pool)
        with owner(fake_cuda.path, len(content)) as (process, handle):
            buffer = device.open_buffer(handle, len(content))
            fake_cuda.set("hold", 1)
            load = start(mover, path, buffer)
            fake_cuda.wait("copies_enqueued", 8)
            process.kill()
            process.wait(LIMIT_S)
        fake_cuda.set("hold", 0)
        assert end_of(mover, load).state in (LoadState.DONE, LoadState.FAILED)


def test_a_process_cannot_open_its_own_handle(driver: str | None, request: pytest.FixtureRequest) -> None:
    with Device.open(0, driver=driver) as device:
        handle = device.create_buffer(MIB).export()
        assert len(handle) == 64
        with pytest.raises(InvalidInput, match="is of this very process"):
            device.open_buffer(handle, MIB)
    if driver is not None:
        request.getfixturevalue("fake_cuda").refusals += 1


@pytest.mark.parametrize("handle", [b"", bytes(63), bytes(65)])
def test_a_handle_of_another_length_is_refused(fake_cuda: FakeCuda, handle: bytes) -> None:
    with Device.open(0, driver=fake_cuda.path) as device, pytest.raises(InvalidInput, match="has 64 bytes"):
        device.open_buffer(handle, MIB)


def test_what_is_no_handle_is_refused(fake_cuda: FakeCuda) -> None:
    with Device.open(0, driver=fake_cuda.path) as device:
        for handle in (bytes(64), random.Random(0).randbytes(64)):
            with pytest.raises(InvalidInput, match="no handle of living device memory"):
                device.open_buffer(handle, MIB)
    fake_cuda.refusals = 2


def test_more_than_was_exported_is_refused(fake_cuda: FakeCuda) -> None:
    with owner(fake_cuda.path, 2 * MIB) as (_, handle), Device.open(0, driver=fake_cuda.path) as device:
        with pytest.raises(InvalidInput, match=f"is of {2 * MIB} bytes, not of {2 * MIB + 1}"):
            device.open_buffer(handle, 2 * MIB + 1)
        assert fake_cuda.get("imports") == 0


def test_a_handle_of_another_device_is_not_opened(fake_cuda: FakeCuda) -> None:
    fake_cuda.set("devices", 2)
    refused = pytest.raises(DeviceFailed, match=r"opening handle #.*CUDA_ERROR_PEER_ACCESS_UNSUPPORTED \(217\)")
    with owner(fake_cuda.path, MIB) as (_, handle), Device.open(1, driver=fake_cuda.path) as device, refused:
        device.open_buffer(handle, MIB)
    fake_cuda.refusals = 1


def test_a_driver_that_opens_no_handles_says_why(fake_cuda: FakeCuda) -> None:
    fake_cuda.set("ipc_open_result", 205)
    refused = pytest.raises(DeviceFailed, match=r"CUDA_ERROR_MAP_FAILED \(205\)")
    with owner(fake_cuda.path, MIB) as (_, handle), Device.open(0, driver=fake_cuda.path) as device, refused:
        device.open_buffer(handle, MIB)


# ---- Tensors ----


class Memory:
    address = 0x7000_0000_0000
    size_bytes = 1024


def test_a_view_tells_its_bytes_by_the_cuda_array_interface() -> None:
    found = DeviceView(Memory(), offset=256, size_bytes=512).__cuda_array_interface__
    assert found == {
        "version": 3,
        "shape": (512,),
        "typestr": "|u1",
        "data": (Memory.address + 256, False),
        "strides": None,
        "stream": None,
    }


@pytest.mark.parametrize(("offset", "shape"), [(1024, [1]), (4, [4, 64]), (-4, [1]), (0, [2, 129]), (0, [2**62, 8])])
def test_a_tensor_outside_of_its_memory_is_refused(offset: int, shape: list[int]) -> None:
    with pytest.raises(InvalidInput, match="of device memory of 1024"):
        tensor_on(Memory(), torch.float32, shape, offset)


def test_a_tensor_that_is_not_aligned_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"torch\.bfloat16 at byte 3, which is no multiple of 2"):
        tensor_on(Memory(), torch.bfloat16, [1], 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_a_tensor_is_a_view_of_what_was_loaded(dtype: torch.dtype, mover: NativeMover, tmp_path: Path) -> None:
    real_driver()
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: this torch is built without CUDA")
    path = tmp_path / "file"
    path.write_bytes(bytes(k % 2 for k in range(4 * KIB)))
    with Device.open(0) as device:
        buffer = device.create_buffer(4 * KIB)
        assert end_of(mover, start(mover, path, buffer)).state is LoadState.DONE
        tensor = tensor_on(buffer, dtype, [2, 16], 64)
        assert tensor.data_ptr() == buffer.address + 64
        assert tensor.dtype is dtype
        assert tensor.is_cuda
        assert tensor.cpu().view(torch.uint8).flatten().tolist() == [k % 2 for k in range(32 * dtype.itemsize)]
        assert tensor_on(buffer, dtype, [0, 3], 0).shape == (0, 3)


# ---- The C++ side ----


def test_our_declarations_are_those_of_nvidias_headers() -> None:
    nvcc = shutil.which("nvcc")
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    folders += [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    headers = [folder for folder in folders if (folder / "cudaTypedefs.h").exists()]
    if not headers:
        pytest.skip("no CUDA headers on this machine")
    compile_native("-fsyntax-only", "-isystem", headers[0], NATIVE / "tests" / "cuda_declarations.cc")


def test_copies_keep_their_promises_from_many_threads(fake_cuda_library: Path, tmp_path: Path) -> None:
    sources = [NATIVE / "src" / name for name in ("cuda_driver.cc", "device.cc", "pool.cc")]
    program = tmp_path / "device_test"
    compile_native(*sources, NATIVE / "tests" / "device_test.cc", "-o", program)
    ran = subprocess.run([program, fake_cuda_library], capture_output=True, text=True, check=False, timeout=LIMIT_S * 5)
    assert ran.returncode == 0, ran.stderr
    assert "cases passed" in ran.stdout
