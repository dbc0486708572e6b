"""A real nginx over one folder: `/ranges/` has ranges, `/whole/` has none, `/locked/` wants a password."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

UNPACKED = Path(__file__).parent.parent / ".servers"
USER, PASSWORD = "reader", "of models"

CONFIG = """
daemon off;
{user}
pid {own}/pid;
error_log {own}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    default_type application/octet-stream;
    client_body_temp_path {own}/temp;
    proxy_temp_path {own}/temp;
    fastcgi_temp_path {own}/temp;
    uwsgi_temp_path {own}/temp;
    scgi_temp_path {own}/temp;
    server {{
        listen 127.0.0.1:{port};
        location /ranges/ {{ alias {folder}/; }}
        location /whole/ {{ alias {folder}/; max_ranges 0; }}
        location /locked/ {{ alias {folder}/; auth_basic models; auth_basic_user_file {own}/passwords; }}
    }}
}}
"""


@dataclass(frozen=True)
class WebServer:
    """What lies in `folder` is served under each of the three paths."""

    folder: Path
    port: int

    def url(self, model: str, under: str = "ranges") -> str:
        """Give the URL of a subfolder."""
        return f"http://127.0.0.1:{self.port}/{under}/{model}/"


def nginx() -> tuple[str, dict[str, str]]:
    """Find nginx, as it is installed or as scripts/servers has unpacked it, and the environment that it needs."""
    installed = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if installed is not None:
        return installed, {}
    unpacked = UNPACKED / "usr" / "sbin" / "nginx"
    if not unpacked.exists():
        raise RuntimeError("nginx is not here: scripts/test brings it, and so does Debian's package nginx-light")
    libraries = [*UNPACKED.glob("usr/lib/*-linux-gnu*"), *UNPACKED.glob("lib/*-linux-gnu*")]
    return str(unpacked), {"LD_LIBRARY_PATH": ":".join(map(str, libraries))}


@contextmanager
def running_nginx(folder: Path) -> Iterator[WebServer]:
    """Serve what is in a new folder below `folder`, on a free port."""
    own, served = folder / "nginx", folder / "served"
    own.mkdir()
    served.mkdir()
    (own / "passwords").write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n")
    binary, environment = nginx()
    # Its worker would become somebody who may not look into a folder of root's.
    user = "user root;" if os.getuid() == 0 else ""
    # nginx takes over a socket that listens already, so that nobody else can take the port meanwhile.
    with socket.create_server(("127.0.0.1", 0), backlog=511) as listener:
        port: int = listener.getsockname()[1]
        (own / "nginx.conf").write_text(CONFIG.format(own=own, folder=served, port=port, user=user))
        process = subprocess.Popen(
            [binary, "-p", str(own), "-c", str(own / "nginx.conf"), "-e", str(own / "error.log")],
            env={**os.environ, **environment, "NGINX": f"{listener.fileno()};"},
            pass_fds=[listener.fileno()],
        )
    try:
        yield WebServer(served, port)
        assert process.poll() is None, (own / "error.log").read_text()
    finally:
        process.terminate()
        process.wait(30)
