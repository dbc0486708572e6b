"""The fake CUDA driver refuses what the real one refuses: else tests over it would prove little."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

import pytest
from fake_cuda import FakeCuda, fake_cuda_library

__all__ = ["fake_cuda_library"]

OK, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 0, 1, 2, 3
INVALID_DEVICE, INVALID_CONTEXT, INVALID_HANDLE = 101, 201, 400
ILLEGAL_ADDRESS, ALREADY_REGISTERED, NOT_REGISTERED = 700, 712, 713
SIZE = 4096
NOWHERE = c_uint64(0x1234)


@pytest.fixture
def fake(fake_cuda_library: Path, tmp_path: Path) -> FakeCuda:
    return FakeCuda(fake_cuda_library, tmp_path)


@pytest.fixture
def cuda(fake: FakeCuda) -> Iterator[ctypes.CDLL]:
    """The driver, initialised, with the context of device 0 current in this thread."""
    cuda = ctypes.CDLL(fake.path)
    assert cuda.cuInit(0) == OK
    context = c_void_p()
    assert cuda.cuDevicePrimaryCtxRetain(byref(context), 0) == OK
    assert cuda.cuCtxPushCurrent_v2(context) == OK
    yield cuda
    assert cuda.cuCtxPopCurrent_v2(byref(context)) == OK
    assert cuda.cuCtxPopCurrent_v2(byref(context)) == INVALID_CONTEXT
    while cuda.cuDevicePrimaryCtxRelease_v2(0) == OK:
        pass
    assert {name: count for name, count in fake.left_behind().items() if name != "abandoned"} == {}


def memory(cuda: ctypes.CDLL, size: int = SIZE) -> c_uint64:
    address = c_uint64()
    assert cuda.cuMemAlloc_v2(byref(address), c_size_t(size)) == OK
    return address


def stream(cuda: ctypes.CDLL) -> c_void_p:
    made = c_void_p()
    assert cuda.cuStreamCreate(byref(made), 1) == OK
    return made


def event(cuda: ctypes.CDLL) -> c_void_p:
    made = c_void_p()
    assert cuda.cuEventCreate(byref(made), 3) == OK
    return made


@pytest.fixture
def pages() -> Iterator[c_void_p]:
    with mmap.mmap(-1, 2 * SIZE) as mapped:
        view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        yield c_void_p(ctypes.addressof(view))
        del view


def test_nothing_works_before_it_is_initialised(fake: FakeCuda) -> None:
    cuda = ctypes.CDLL(fake.path)
    assert cuda.cuDeviceGetCount(byref(c_int())) == NOT_INITIALIZED
    assert cuda.cuDevicePrimaryCtxRetain(byref(c_void_p()), 0) == NOT_INITIALIZED
    assert cuda.cuMemAlloc_v2(byref(c_uint64()), c_size_t(1)) == NOT_INITIALIZED
    assert cuda.cuInit(1) == INVALID_VALUE
    assert fake.get("refused") == 4


def test_a_thread_without_a_context_is_refused(cuda: ctypes.CDLL) -> None:
    given = memory(cuda)
    answers: list[int] = []
    thread = threading.Thread(
        target=lambda: answers.extend([cuda.cuMemFree_v2(given), cuda.cuStreamCreate(byref(c_void_p()), 1)])
    )
    thread.start()
    thread.join()
    assert answers == [INVALID_CONTEXT] * 2


def test_a_context_that_is_no_context_is_refused(cuda: ctypes.CDLL) -> None:
    assert cuda.cuCtxPushCurrent_v2(c_void_p(0x1234)) == INVALID_CONTEXT
    assert cuda.cuDevicePrimaryCtxRetain(byref(c_void_p()), 7) == INVALID_DEVICE


def test_memory_is_freed_once_and_whole(cuda: ctypes.CDLL) -> None:
    given = memory(cuda)
    assert cuda.cuMemFree_v2(c_uint64(given.value + 256)) == INVALID_VALUE
    assert cuda.cuIpcCloseMemHandle(given) == INVALID_VALUE
    assert cuda.cuMemFree_v2(given) == OK
    assert cuda.cuMemFree_v2(given) == INVALID_VALUE
    assert cuda.cuMemAlloc_v2(byref(given), c_size_t(0)) == INVALID_VALUE
    assert cuda.cuMemAlloc_v2(byref(given), c_size_t(1 << 40)) == OUT_OF_MEMORY


def test_copies_stay_within_their_memory(cuda: ctypes.CDLL, pages: c_void_p) -> None:
    given, lane = memory(cuda), stream(cuda)
    copy = cuda.cuMemcpyHtoDAsync_v2
    assert copy(given, pages, c_size_t(SIZE), lane) == OK
    assert copy(given, pages, c_size_t(SIZE + 1), lane) == INVALID_VALUE
    assert copy(c_uint64(given.value + 1), pages, c_size_t(SIZE), lane) == INVALID_VALUE
    assert copy(NOWHERE, pages, c_size_t(1), lane) == INVALID_VALUE
    assert copy(given, pages, c_size_t(1), c_void_p(0x1234)) == INVALID_HANDLE
    assert cuda.cuMemcpyDtoH_v2(pages, given, c_size_t(SIZE + 1)) == INVALID_VALUE


def test_memory_being_copied_to_and_busy_streams_are_not_ended(
    fake: FakeCuda, cuda: ctypes.CDLL, pages: c_void_p
) -> None:
    given, lane, mark = memory(cuda), stream(cuda), event(cuda)
    assert cuda.cuMemHostRegister_v2(pages, c_size_t(SIZE), 1) == OK
    fake.set("hold", 1)
    assert cuda.cuMemcpyHtoDAsync_v2(given, pages, c_size_t(SIZE), lane) == OK
    assert cuda.cuEventRecord(mark, lane) == OK
    assert cuda.cuMemFree_v2(given) == INVALID_VALUE
    assert cuda.cuStreamDestroy_v2(lane) == INVALID_HANDLE
    assert cuda.cuEventDestroy_v2(mark) == INVALID_HANDLE
    assert fake.get("copies_done") == 0
    fake.set("hold", 0)
    assert cuda.cuEventSynchronize(mark) == OK
    assert fake.get("copies_done") == 1
    assert cuda.cuStreamSynchronize(lane) == OK
    assert (cuda.cuEventDestroy_v2(mark), cuda.cuEventDestroy_v2(mark)) == (OK, INVALID_HANDLE)
    assert (cuda.cuStreamDestroy_v2(lane), cuda.cuStreamDestroy_v2(lane)) == (OK, INVALID_HANDLE)
    assert cuda.cuMemFree_v2(given) == OK


def test_host_memory_is_registered_once(cuda: ctypes.CDLL, pages: c_void_p) -> None:
    assert pages.value is not None
    assert cuda.cuMemHostRegister_v2(pages, c_size_t(2 * SIZE), 1) == OK
    assert cuda.cuMemHostRegister_v2(pages, c_size_t(2 * SIZE), 1) == ALREADY_REGISTERED
    assert cuda.cuMemHostRegister_v2(c_void_p(pages.value + SIZE), c_size_t(SIZE), 1) == ALREADY_REGISTERED
    assert cuda.cuMemHostUnregister(c_void_p(pages.value + SIZE)) == NOT_REGISTERED
    assert cuda.cuMemHostUnregister(pages) == OK
    assert cuda.cuMemHostUnregister(pages) == NOT_REGISTERED
    assert cuda.cuMemHostRegister_v2(c_void_p(SIZE), c_size_t(SIZE), 1) == INVALID_VALUE


def test_a_lost_context_answers_everything_with_its_loss(fake: FakeCuda, cuda: ctypes.CDLL, pages: c_void_p) -> None:
    given, lane, mark = memory(cuda), stream(cuda), event(cuda)
    fake.lose(0, ILLEGAL_ADDRESS)
    assert cuda.cuMemFree_v2(given) == ILLEGAL_ADDRESS
    assert cuda.cuMemcpyHtoDAsync_v2(given, pages, c_size_t(1), lane) == ILLEGAL_ADDRESS
    assert cuda.cuEventSynchronize(mark) == ILLEGAL_ADDRESS
    assert fake.get("refused") == 0


def test_what_ends_with_its_context_is_counted(fake: FakeCuda, cuda: ctypes.CDLL) -> None:
    memory(cuda), stream(cuda), event(cuda)
    assert cuda.cuDevicePrimaryCtxRelease_v2(0) == OK
    assert fake.get("abandoned") == 3
    assert cuda.cuMemAlloc_v2(byref(c_uint64()), c_size_t(1)) != OK


def test_a_lookup_knows_the_version_of_each_function(cuda: ctypes.CDLL) -> None:
    found, status = c_void_p(), c_int()
    look = cuda.cuGetProcAddress_v2
    assert look(b"cuMemAlloc", byref(found), 3020, c_uint64(0), byref(status)) == OK
    assert (bool(found), status.value) == (True, 0)
    assert look(b"cuMemAlloc", byref(found), 2000, c_uint64(0), byref(status)) != OK
    assert (bool(found), status.value) == (False, 2)
    assert look(b"cuNoSuchThing", byref(found), 13000, c_uint64(0), byref(status)) != OK
    assert (bool(found), status.value) == (False, 1)


def test_the_state_of_a_context_tells_whether_it_lives(cuda: ctypes.CDLL) -> None:
    flags, active = c_uint(), c_int()
    assert cuda.cuDevicePrimaryCtxGetState(0, byref(flags), byref(active)) == OK
    assert active.value == 1
    assert cuda.cuDevicePrimaryCtxSetFlags_v2(0, 4) == 708
