"""A real nginx over one folder: `/ranges/` has ranges, `/whole/` has none, `/locked/` wants a password."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sllm_actor.testing.nginx import running_nginx

UNPACKED = Path(__file__).parent.parent / ".servers"
USER, PASSWORD = "reader", "of models"

LOCATIONS = """
location /ranges/ {{ alias {folder}/; }}
location /whole/ {{ alias {folder}/; max_ranges 0; }}
location /locked/ {{ alias {folder}/; auth_basic models; auth_basic_user_file {own}/passwords; }}
"""


@dataclass(frozen=True)
class WebServer:
    """What lies in `folder` is served under each of the three paths."""

    folder: Path
    port: int

    def url(self, model: str, under: str = "ranges") -> str:
        """Give the URL of a subfolder."""
        return f"http://127.0.0.1:{self.port}/{under}/{model}/"


@contextmanager
def running_web_server(folder: Path) -> Iterator[WebServer]:
    """Serve what is in a new folder below `folder`, on a free port."""
    own, served = folder / "nginx", folder / "served"
    own.mkdir()
    served.mkdir()
    (own / "passwords").write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n")
    with running_nginx(own, LOCATIONS.format(folder=served, own=own), UNPACKED) as port:
        yield WebServer(served, port)
