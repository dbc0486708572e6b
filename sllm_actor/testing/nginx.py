"""A real nginx on a free port of this machine alone, for tests and benchmarks: an HTTP origin that is none of ours."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sllm_actor.errors import ConfigInvalid

STOP_TIMEOUT_S = 30
CONFIG = """
daemon off;
{user}
pid {own}/pid;
error_log {own}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    default_type application/octet-stream;
    client_body_temp_path {own}/temp;
    proxy_temp_path {own}/temp;
    fastcgi_temp_path {own}/temp;
    uwsgi_temp_path {own}/temp;
    scgi_temp_path {own}/temp;
    server {{
        listen 127.0.0.1:{port};
        {locations}
    }}
}}
"""


def _program(unpacked: Path) -> tuple[str, dict[str, str]]:
    """Find nginx, as it is installed or as scripts/servers has unpacked it, and the environment that it needs."""
    installed = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if installed is not None:
        return installed, {}
    program = unpacked / "usr" / "sbin" / "nginx"
    if not program.exists():
        raise ConfigInvalid("nginx is not here: scripts/test brings it, and so does Debian's package nginx-light")
    libraries = [*unpacked.glob("usr/lib/*-linux-gnu*"), *unpacked.glob("lib/*-linux-gnu*")]
    return str(program), {"LD_LIBRARY_PATH": ":".join(map(str, libraries))}


@contextmanager
def running_nginx(own: Path, locations: str, unpacked: Path) -> Iterator[int]:
    """Serve `locations`, as nginx's `server` has them, and give the port. Its own files go to the folder `own`.

    Where nginx is not installed, it is taken from `unpacked`, the root of unpacked packages.

    Raises:
        ConfigInvalid: it is in neither place.
    """
    program, environment = _program(unpacked.absolute())
    # Its worker would become somebody who may not look into a folder of root's.
    user = "user root;" if os.getuid() == 0 else ""
    # nginx takes over a socket that listens already, so that nobody else can take the port meanwhile.
    with socket.create_server(("127.0.0.1", 0), backlog=511) as listener:
        port: int = listener.getsockname()[1]
        (own / "nginx.conf").write_text(CONFIG.format(own=own, port=port, user=user, locations=locations))
        process = subprocess.Popen(
            [program, "-p", str(own), "-c", str(own / "nginx.conf"), "-e", str(own / "error.log")],
            env={**os.environ, **environment, "NGINX": f"{listener.fileno()};"},
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    try:
        yield port
        assert process.poll() is None, (own / "error.log").read_text()
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)
