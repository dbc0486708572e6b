"""Ceph's S3 gateway over a cluster of one monitor and one OSD in memory, as scripts/servers has unpacked them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent / ".servers"
KEY, SECRET = "key", "secret"
# The Debian interpreter that the cluster's own command line is for.
PYTHON = "/usr/bin/python3"
READY_LIMIT_S = 120.0
CONFIG = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}/0
auth cluster required = none
auth service required = none
auth client required = none
# Without authentication nothing can be encrypted, which the gateway would want by default.
ms mon client mode = crc
run dir = {own}
admin socket = {own}/$name.asok
log file = {own}/$name.log
pid file = {own}/$name.pid
erasure code dir = {libraries}/ceph/erasure-code
plugin dir = {libraries}/ceph
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
mon max pg per osd = 1000
[mon.a]
mon data = {own}/mon
[osd.0]
osd data = {own}/osd
osd objectstore = memstore
memstore device bytes = 1073741824
osd class dir = {libraries}/rados-classes
osd class load list = *
osd class default list = *
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@contextmanager
def running_radosgw(folder: Path) -> Iterator[str]:
    """Run it with one user, `KEY`; gives its URL. All of it ends with this."""
    if not (ROOT / "ready-radosgw").exists():
        raise RuntimeError("radosgw is not here: scripts/test --nightly brings it")
    libraries = next(path for path in ROOT.glob("usr/lib/*-linux-gnu") if (path / "rados-classes").is_dir())
    found = [libraries, libraries / "ceph", *ROOT.glob("lib/*-linux-gnu*")]
    environment = os.environ | {
        "LD_LIBRARY_PATH": ":".join(map(str, found)),
        "PYTHONPATH": str(ROOT / "usr/lib/python3/dist-packages"),
    }
    own = folder / "radosgw"
    for name in ("mon", "osd"):
        (own / name).mkdir(parents=True)
    port, mon_port, fsid, osd = free_port(), free_port(), str(uuid.uuid4()), str(uuid.uuid4())
    config = own / "ceph.conf"
    config.write_text(CONFIG.format(fsid=fsid, mon_port=mon_port, port=port, own=own, libraries=libraries))

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [str(ROOT / "usr/bin" / program), *arguments], env=environment, check=True, capture_output=True, timeout=120
        )

    with ExitStack() as stack, (own / "output").open("w") as output:

        def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
            words = [str(ROOT / "usr/bin" / program), "-c", str(config), *arguments, "-f"]
            process = stack.enter_context(subprocess.Popen(words, env=environment, stdout=output, stderr=output))
            stack.callback(process.kill)
            return process

        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", str(own / "map"))
        run("ceph-mon", "-c", str(config), "-i", "a", "--mkfs", "--monmap", str(own / "map"))
        processes = [start("ceph-mon", "-i", "a")]
        command = [PYTHON, str(ROOT / "usr/bin/ceph"), "-c", str(config), "osd", "new", osd]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
        run("ceph-osd", "-c", str(config), "-i", "0", "--mkfs", "--osd-uuid", osd)
        processes += [start("ceph-osd", "-i", "0"), start("radosgw", "-n", "client.rgw")]
        url = f"http://127.0.0.1:{port}"
        _until_it_answers(url, processes, own)
        user = ["--uid", "tests", "--display-name", "tests", "--access-key", KEY, "--secret-key", SECRET]
        run("radosgw-admin", "-c", str(config), "-n", "client.rgw", "user", "create", *user)
        yield url


def _until_it_answers(url: str, processes: list[subprocess.Popen[bytes]], own: Path) -> None:
    """Ask until there is an answer: a server can't be waited for in another way."""
    limit_s = time.monotonic() + READY_LIMIT_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError as wrong:
            if time.monotonic() > limit_s or any(process.poll() is not None for process in processes):
                raise RuntimeError(f"radosgw does not answer ({wrong}); see {own}") from wrong
        else:
            return
