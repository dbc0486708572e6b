"""A process that owns device memory, as an engine does. Usage: device_owner.py DRIVER SIZE_BYTES; `-` is CUDA's own.

It prints the handle of its buffer, then answers each `OFFSET LENGTH` with those bytes in hex, until its input ends.
"""

from __future__ import annotations

import sys

from sllm_actor.loader.device import Device


def main() -> None:
    driver, size_bytes = sys.argv[1], int(sys.argv[2])
    with Device.open(0, streams=1, driver=None if driver == "-" else driver) as device:
        buffer = device.create_buffer(size_bytes)
        print(buffer.export().hex(), flush=True)
        for line in sys.stdin:
            offset, length = map(int, line.split())
            print(buffer.read(offset, length).hex(), flush=True)


if __name__ == "__main__":
    main()
