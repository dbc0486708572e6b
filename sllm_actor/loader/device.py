"""A CUDA device, and memory on it that one process owns and another fills.

An engine creates a buffer and sends its handle to the node; the node opens it and loads into it. Every method may
block on the driver (opening a device takes a context: tenths of a second), so none belongs on the event loop.
Thread-safe, but for `close`, which comes last. A process that has opened a device can't fork a working one any more.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from sllm_actor.errors import InvalidInput
from sllm_actor.loader import native_device
from sllm_actor.loader.native_device import HANDLE_BYTES, DeviceFacts

__all__ = ["HANDLE_BYTES", "Device", "DeviceBuffer", "DeviceFacts", "count_devices"]


def count_devices(driver: str | None = None) -> int:
    """Return how many CUDA devices there are; `driver` is the path of another library than `libcuda.so.1`.

    Raises:
        DeviceMissing: there is no driver, or one that is too old.
        DeviceFailed: the driver does not come up.
    """
    return native_device.device_count(driver)


class Device:
    """One CUDA device with its streams. Owns its buffers: closing it closes them."""

    def __init__(self, device: int, ordinal: int) -> None:
        self._device = device
        self._buffers: set[DeviceBuffer] = set()
        self._closed = False
        self.ordinal = ordinal

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @classmethod
    def open(cls, ordinal: int, streams: int = 4, driver: str | None = None) -> Self:
        """Open the device of that number; copies to it go round `streams` streams.

        Raises:
            DeviceMissing: no driver, or no such device.
            DeviceOutOfMemory: the device has no memory left for a context.
            DeviceFailed: the driver refused; it says why.
            InvalidInput: `streams` is out of bounds.
        """
        return cls(native_device.device_open(driver, ordinal, streams), ordinal)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def facts(self) -> DeviceFacts:
        """Return what the device is and how much of its memory is free.

        Raises:
            DeviceFailed: the device has failed; here and in every other method.
        """
        return native_device.device_facts(self._living())

    def register(self, pool: int) -> None:
        """Page-lock a mover's pool (the library's address of it) for every device; a second time is no error.

        Raises:
            DeviceFailed, ConfigInvalid: the driver can't; copies from the pool work all the same, only slower.
        """
        native_device.device_register(self._living(), pool)

    def unregister(self, pool: int) -> None:
        """Undo `register`, which `close` does too; the pool may be destroyed after the last device has.

        Raises:
            InvalidInput: it is not registered with this device.
        """
        native_device.device_unregister(self._living(), pool)

    def create_buffer(self, size_bytes: int) -> DeviceBuffer:
        """Take memory of the device.

        Raises:
            DeviceOutOfMemory: it does not have as much; the message says how much it has.
            InvalidInput: the size is zero or absurd.
        """
        _check_size(size_bytes)
        return self._keep(native_device.buffer_create(self._living(), size_bytes), size_bytes)

    def open_buffer(self, handle: bytes, size_bytes: int) -> DeviceBuffer:
        """Open memory of this device that another process exported; it ends when its owner does.

        Raises:
            InvalidInput: no handle, one of this very process or of memory that is gone, or too large a size.
            DeviceFailed: the driver can't map it, for example as it is of another device.
        """
        _check_size(size_bytes)
        if len(handle) != HANDLE_BYTES:
            raise InvalidInput(f"a handle of device memory has {HANDLE_BYTES} bytes, not {len(handle)}")
        return self._keep(native_device.buffer_open(self._living(), handle, size_bytes), size_bytes)

    def close(self) -> None:
        """Close its buffers, waiting for the copies into them, then the device. A second time does nothing."""
        for buffer in tuple(self._buffers):
            buffer.close()
        if not self._closed:
            self._closed = True
            native_device.device_close(self._device)

    def _living(self) -> int:
        assert not self._closed, f"device {self.ordinal} is closed"
        return self._device

    def _keep(self, made: int, size_bytes: int) -> DeviceBuffer:
        buffer = DeviceBuffer(made, size_bytes, self._buffers, self.ordinal)
        self._buffers.add(buffer)
        return buffer


class DeviceBuffer:
    """Memory on a device, of this process or of another. `target` is what a load takes to fill it.

    `ordinal` is the number of its device.
    """

    def __init__(self, target: int, size_bytes: int, siblings: set[DeviceBuffer], ordinal: int) -> None:
        self.ordinal = ordinal
        self._target = target
        self._siblings = siblings
        self._closed = False
        self.address = native_device.buffer_address(target)
        self.size_bytes = size_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def target(self) -> int:
        """The library's address of it, for a `FilePlan`; good until `close`."""
        assert not self._closed, "the buffer is closed"
        return self._target

    def export(self) -> bytes:
        """Return the handle, 64 bytes, by which another process opens it.

        Raises:
            InvalidInput: another process owns it.
        """
        return native_device.buffer_export(self.target)

    def read(self, offset: int, length: int) -> bytes:
        """Copy bytes back to the host: for checks, not for speed. Loads on their way it does not wait for.

        Raises:
            InvalidInput: they are not all within the buffer.
        """
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise InvalidInput(f"bytes {offset} to {offset + length} of a device buffer of {self.size_bytes}")
        return native_device.buffer_read(self.target, offset, length)

    def close(self) -> None:
        """Wait for the copies into it, then give it back. A second time does nothing."""
        if not self._closed:
            self._closed = True
            self._siblings.discard(self)
            native_device.buffer_destroy(self._target)


def _check_size(size_bytes: int) -> None:
    # ctypes would cut a larger or a negative number to 64 bits without a word.
    if not 0 < size_bytes < 2**63:
        raise InvalidInput(f"a device buffer of {size_bytes} bytes")
