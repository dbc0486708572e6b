"""Other people's clients against a real node, each a process of its own, in an environment of its own.

The official client is in `test_openai_endpoint.py`. These pin older versions of it and can't be installed beside it:
`scripts/test` makes `.venv-peers-clients` for them.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from sllm_actor.testing.node_process import NodeProcess

FOLDER = Path(__file__).parent
PEERS = FOLDER.parent / ".venv-peers-clients"
BODY = {"model": "demo", "messages": [{"role": "user", "content": "What is 47 + 35?"}]}


@pytest.mark.parametrize("client", ["langchain", "litellm"])
def test_a_client_finds_what_it_expects(node: NodeProcess, client: str) -> None:
    python = PEERS / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{PEERS.name} is not there; scripts/test makes it")
    failed = PEERS / "failed"
    if failed.exists() and client in failed.read_text():
        pytest.skip(f"it can't be installed here: {failed.read_text()}")
    ran = subprocess.run(
        [python, FOLDER / f"{client}_client.py", node.url, "demo"], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert seen["chat"] == seen["streamed"] == "47 + 35 = 82"
    assert seen["usage"] == seen["stream_usage"] > 0
    assert seen["absent"] == "model_not_found"


def test_curl_shows_a_stream_as_it_comes_and_an_error_as_its_status(node: NodeProcess) -> None:
    def curl(*options: str) -> str:
        command = [
            "curl", "-sS", "-N", "-H", "Content-Type: application/json", *options, f"{node.url}/v1/chat/completions",
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    lines = [line for line in curl("-d", json.dumps(BODY | {"stream": True})).splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-1])
    assert text == "47 + 35 = 82"
    assert curl("-o", "/dev/null", "-w", "%{http_code}", "-d", "{") == "400"
