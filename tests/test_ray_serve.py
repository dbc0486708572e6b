"""The example that embeds a node in Ray Serve, with a real Ray in an environment of its own."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif("SLLM_NIGHTLY" not in os.environ, reason="scripts/test --nightly runs it")

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-peers-ray" / "bin" / "python"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def test_a_node_in_a_replica_answers_by_rays_port_with_and_without_a_stream() -> None:
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [str(PYTHON), str(ROOT / "examples" / "ray_serve.py"), str(free_port())]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert [line for line in ran.stdout.splitlines() if "=" in line and not line.startswith(("(", "\x1b"))] == [
        "47 + 35 = 82", "47 + 35 = 82",
    ]  # fmt: skip
