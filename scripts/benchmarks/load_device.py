"""Host pool and disk to a CUDA device, the part of `load` that runs where there is one: `device` of `--only`.

As a child: `python -m benchmarks.load_device ours | limit | peer …`. Every system ends with the device synchronised
and every tensor on it; the limit is `cuMemcpyHtoDAsync` alone, out of page-locked memory.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from ctypes import byref, c_int, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from benchmarks.actors_process import Child, ChildEnded, Commands, serve

SHAPE = "llama-2-7b"
SYSTEMS = ("safetensors", "fastsafetensors", "runai-model-streamer")
LIMIT_BYTES = 1 << 30


class Driver:
    """As much of the CUDA driver as the limit takes."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        device, context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._host, self._device, self._stream = c_void_p(), c_uint64(), c_void_p()
        self._call("cuMemHostAlloc", byref(self._host), ctypes.c_size_t(LIMIT_BYTES), 0)
        self._call("cuMemAlloc_v2", byref(self._device), ctypes.c_size_t(LIMIT_BYTES))
        self._call("cuStreamCreate", byref(self._stream), 1)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._cuda, name)(*arguments):
            raise OSError(f"{name} failed with {code}")

    def copy_s(self) -> float:
        """Copy LIMIT_BYTES to the device; give the seconds."""
        begin_s = time.perf_counter()
        self._call("cuMemcpyHtoDAsync_v2", self._device, self._host, ctypes.c_size_t(LIMIT_BYTES), self._stream)
        self._call("cuStreamSynchronize", self._stream)
        return time.perf_counter() - begin_s


async def limit() -> tuple[None, Commands]:
    """Copy, on request."""
    driver = Driver()

    async def copy() -> float:
        return driver.copy_s()

    return None, {"copy": copy}


async def ours(pool_bytes: str, chunk_bytes: str) -> tuple[None, Commands]:
    """Load to the device from the disk, or from the pool, where the load before has left the bytes."""
    import msgspec
    import torch

    from benchmarks import load_api
    from benchmarks.load_meter import PAD, quiet
    from sllm_actor.checkpoint.folder import read_folder
    from sllm_actor.engine.device_view import tensor_on
    from sllm_actor.engine.mapped_tensors import DTYPES
    from sllm_actor.loader.device import Device
    from sllm_actor.loader.lease import DeviceTarget

    quiet()
    loader = await load_api.open_loader(int(pool_bytes), int(chunk_bytes), huge_pages=True)
    device = Device.open(0)
    await loader.register(device)
    serial = 0

    async def load(folder: str, from_pool: bool) -> float:
        nonlocal serial
        serial += not from_pool
        begin_s = time.perf_counter()
        checkpoint = read_folder(Path(folder))
        checkpoint = msgspec.structs.replace(checkpoint, fingerprint=f"{checkpoint.fingerprint}-{serial}")
        buffers = {file.name: device.create_buffer(file.size_bytes) for file in checkpoint.files}
        targets = {name: DeviceTarget(buffer) for name, buffer in buffers.items()}
        lease = await loader.load_to_device(checkpoint, targets)
        tensors = [
            tensor_on(buffers[file.name], DTYPES[tensor.dtype], tensor.shape, tensor.begin)
            for file in checkpoint.files
            for tensor in file.header.tensors
            if not tensor.name.startswith(PAD)
        ]
        torch.cuda.synchronize()
        took_s = time.perf_counter() - begin_s
        del tensors
        gc.collect()
        for buffer in buffers.values():
            buffer.close()
        lease.release()
        return took_s

    return None, {"load": load}


def _safetensors(folder: str) -> Any:
    from safetensors.torch import load_file

    from benchmarks.load_meter import weight_files

    return [load_file(path, device="cuda:0") for path in weight_files(folder)]


def _fastsafetensors(folder: str) -> Any:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    from benchmarks.load_meter import weight_files

    loader = SafeTensorsFileLoader(SingleGroup(), "cuda:0", nogds=True)
    loader.add_filenames({0: weight_files(folder)})
    buffer = loader.copy_files_to_device()
    return [buffer.get_tensor(name) for name in loader.get_keys()], loader, buffer


def _runai(folder: str) -> Any:
    from runai_model_streamer import SafetensorsStreamer

    from benchmarks.load_meter import weight_files

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(weight_files(folder), device="cpu")
        return [tensor.to("cuda:0", non_blocking=True) for _, tensor in streamer.get_tensors()]


LOADS: dict[str, Callable[[str], Any]] = dict(zip(SYSTEMS, (_safetensors, _fastsafetensors, _runai), strict=True))


async def peer(system: str) -> tuple[None, Commands]:
    """Load to the device, on request; a failure is an answer, too."""
    import torch

    from benchmarks.load_meter import quiet

    quiet()

    async def load(folder: str) -> dict[str, Any]:
        try:
            begin_s = time.perf_counter()
            loaded = LOADS[system](folder)
            torch.cuda.synchronize()
            took_s = time.perf_counter() - begin_s
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        del loaded
        gc.collect()
        torch.cuda.empty_cache()
        return {"s": took_s}

    return None, {"load": load}


def device_missing() -> str:
    """Say why there is no CUDA device, or nothing where there is one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as wrong:
        return f"no CUDA device: {wrong}"
    count = c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(byref(count)) or not count.value:
        return "no CUDA device: the driver finds none"
    return ""


class Devices:
    """The processes of this part, and what they measure in one repeat, in seconds."""

    def __init__(self, stack: ExitStack, sizes: tuple[int, int], peers_python: str | None) -> None:
        self._limit = Child(stack, "load_device", "limit")
        self._ours = Child(stack, "load_device", "ours", *(str(size) for size in sizes))
        self._peers: dict[str, Child] = {}
        self.failed: dict[str, str] = {}
        for system in SYSTEMS:
            try:
                if peers_python is None:
                    raise ChildEnded("the peers' environment is not there")
                self._peers[system] = Child(stack, "load_device", "peer", system, python=peers_python)
            except ChildEnded as wrong:
                self.failed[system] = str(wrong)

    def copy_rate(self) -> float:
        """Give the limit, in bytes a second."""
        return LIMIT_BYTES / float(self._limit.call("copy"))

    def ours_s(self, folder: str, from_pool: bool) -> float:
        """Measure ours."""
        return float(self._ours.call("load", folder=folder, from_pool=from_pool))

    def peers_s(self, folder: str) -> dict[str, float]:
        """Measure every peer that still works."""
        found = {}
        for system, child in self._peers.items():
            if system in self.failed:
                continue
            try:
                answer = child.call("load", folder=folder)
            except ChildEnded as wrong:
                answer = {"failed": str(wrong)}
            if "failed" in answer:
                self.failed[system] = answer["failed"]
            else:
                found[system] = answer["s"]
        return found


if __name__ == "__main__":
    serve(ours=ours, limit=limit, peer=peer)
