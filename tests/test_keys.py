"""API keys: hashed at rest, bounded each, read again when they change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from clusters import eventually
from conftest import SMALL
from test_heartbeats import model

from sllm_actor.domain import RequestId, Span
from sllm_actor.errors import ConfigInvalid, RateLimited
from sllm_actor.frontend.embeddings import question_of
from sllm_actor.frontend.key_limits import KeyLimits
from sllm_actor.frontend.keys import Key, digest_of, new_key, read_keys, written
from sllm_actor.frontend.schema import EmbeddingRequest
from sllm_actor.frontend.visit import VISIT, Visit
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.testing.node_process import CLI, NodeProcess, Reply, running_node

pytestmark = pytest.mark.usefixtures("warm_starts")

CHAT = "/v1/chat/completions"
HASH = "0" * 64
KEY = f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\n'


def keys(path: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(CLI), "keys", *arguments, "--api-key-file", str(path), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    answer: dict[str, Any] = json.loads(ran.stdout)
    assert (ran.returncode == 0) == ("error" not in answer), ran.stderr
    return answer


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.toml"


@pytest.fixture(scope="module")
def admin(key_file: Path) -> dict[str, str]:
    return {"Authorization": f"Bearer {keys(key_file, 'create', 'admin', '--admin')['key']}"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, key_file: Path, admin: dict[str, str]) -> Iterator[NodeProcess]:
    """A node with a file of keys and two models."""
    with running_node(tmp_path_factory.mktemp("node"), *SMALL, f"api_key_file={key_file}") as node:
        for name in ("demo", "other"):
            reply = node.request("POST", "/admin/models", {"source": "builtin:demo", "name": name}, admin)
            assert reply.status == 201
        yield node


def header(node: NodeProcess, key_file: Path, name: str, *options: str) -> dict[str, str]:
    """Make a key while the node runs, and wait until it is known."""
    given = {"Authorization": f"Bearer {keys(key_file, 'create', name, *options)['key']}"}
    eventually(lambda: node.request("GET", "/v1/models", headers=given).status != 401)
    return given


def ask(node: NodeProcess, headers: dict[str, str], model: str = "demo", **options: Any) -> Reply:
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    return node.request("POST", CHAT, {"model": model, "messages": messages, **options}, headers)


def error_of(reply: Reply) -> tuple[int, str, str]:
    error = reply.json()["error"]
    return reply.status, error["type"], error["code"]


def test_strangers_are_turned_away_and_health_is_open(guarded: NodeProcess) -> None:
    assert guarded.request("GET", "/health").status == 200
    for given in (None, "Bearer wrong", "Bearer " + "x" * 5000, "Bearer \xff", "Basic eDp5"):
        headers = {} if given is None else {"Authorization": given}
        reply = guarded.request("GET", "/v1/models", headers=headers)
        assert error_of(reply) == (401, "authentication_error", "invalid_api_key")


def test_a_key_is_for_its_models_and_not_for_administration(guarded: NodeProcess, key_file: Path) -> None:
    bob = header(guarded, key_file, "bob", "--model", "other")
    assert ask(guarded, bob, "other").status == 200
    assert error_of(ask(guarded, bob)) == (403, "permission_error", "access_denied")
    assert guarded.request("GET", "/v1/models/demo", headers=bob).status == 403
    listed = guarded.request("GET", "/v1/models", headers=bob).json()["data"]
    assert [card["id"] for card in listed] == ["other"]
    for method, path in (("GET", "/admin/requests"), ("DELETE", "/admin/models/demo"), ("GET", "/admin/nothing")):
        assert guarded.request(method, path, headers=bob).status == 403


def test_requests_in_a_minute_are_counted_and_told(guarded: NodeProcess, key_file: Path) -> None:
    carol = header(guarded, key_file, "carol", "--requests-per-minute", "2")
    first, second, third = (ask(guarded, carol) for _ in range(3))
    assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert (second.status, second.headers["x-ratelimit-remaining-requests"]) == (200, "0")
    assert error_of(third) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(third.headers["Retry-After"]) <= 30
    assert guarded.request("GET", "/v1/models", headers=carol).status == 200, "what costs nothing is not counted"


def test_tokens_in_a_minute_are_counted(guarded: NodeProcess, key_file: Path) -> None:
    dave = header(guarded, key_file, "dave", "--tokens-per-minute", "5")
    with closing(
        guarded.stream(CHAT, {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}, dave)
    ) as events:
        assert list(events)
    refused = ask(guarded, dave)
    assert error_of(refused) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert "5 tokens" in refused.json()["error"]["message"]


def test_a_stream_is_gone_on_with_by_its_own_key_alone_within_that_ones_bounds(
    guarded: NodeProcess, key_file: Path
) -> None:
    heidi, ivan = (header(guarded, key_file, name, "--requests-per-minute", "2") for name in ("heidi", "ivan"))
    streamed = ask(guarded, heidi, stream=True)
    path = f"/v1/streams/{streamed.headers['X-Stream-Id']}"
    assert error_of(guarded.request("GET", path, headers=ivan)) == (404, "not_found_error", "stream_not_found")
    assert guarded.request("GET", path).status == 401
    again = guarded.request("GET", path, headers=heidi).body
    assert [line for line in again.splitlines() if line.startswith(b"data: ")] == [
        line for line in streamed.body.splitlines() if line.startswith(b"data: ")
    ]
    limited = guarded.request("GET", path, headers=heidi)
    assert error_of(limited) == (429, "rate_limit_error", "rate_limit_exceeded")


def test_requests_at_once_are_bounded(guarded: NodeProcess, key_file: Path) -> None:
    erin = header(guarded, key_file, "erin", "--concurrent-requests", "1")
    long = {"model": "demo", "messages": [{"role": "user", "content": "Count from 1 to 999."}]}
    with closing(guarded.stream(CHAT, long, erin)) as events:
        next(events)
        assert error_of(ask(guarded, erin)) == (429, "rate_limit_error", "rate_limit_exceeded")
    eventually(lambda: ask(guarded, erin).status != 429)


def test_a_key_with_a_least_priority_does_not_get_ahead_of_it(guarded: NodeProcess, key_file: Path) -> None:
    header(guarded, key_file, "humble", "--min-priority", "5")
    (humble,) = [key for key in read_keys(str(key_file)).keys if key.name == "humble"]
    visit = Visit(RequestId("r"), "POST", CHAT, SystemClock())
    assert visit.priority(-7) == -7, "without a key all are equal"
    visit.key = humble
    assert [visit.priority(asked) for asked in (-7, 0, 5, 9)] == [5, 5, 5, 9]


def test_nor_do_its_texts_that_are_to_be_embedded() -> None:
    visit = Visit(RequestId("r"), "POST", "/v1/embeddings", SystemClock())
    body = EmbeddingRequest(model="m", input="text", priority=-7)
    text = Span(name="text", begin_s=0.0, end_s=0.0)
    token = VISIT.set(visit)
    try:
        for floor, priority in ((None, -7), (5, 5)):
            visit.key = Key(name="a", sha256=HASH, min_priority=floor)
            asked = question_of(RequestId("r"), model(), [[1]], body, 0.0, text)
            assert asked.priority == priority
    finally:
        VISIT.reset(token)


def test_a_revoked_key_is_refused_soon_and_a_broken_file_changes_nothing(
    guarded: NodeProcess, key_file: Path, admin: dict[str, str]
) -> None:
    frank = header(guarded, key_file, "frank")
    assert keys(key_file, "revoke", "frank") == {"revoked": "frank"}
    eventually(lambda: guarded.request("GET", "/v1/models", headers=frank).status == 401)
    whole = key_file.read_text()
    key_file.write_text("[[keys]]\nname = 5\n")
    grace = keys(key_file, "create", "grace")
    assert "keys[0].name" in grace["error"]["message"]
    assert guarded.request("GET", "/v1/models", headers=admin).status == 200
    key_file.write_text(whole)


def test_a_revoked_key_ends_the_pages_event_stream_and_no_other(
    guarded: NodeProcess, key_file: Path, admin: dict[str, str]
) -> None:
    nina = header(guarded, key_file, "nina", "--admin")
    with closing(guarded.connect()) as hers, closing(guarded.connect()) as others:
        streams = []
        for connection, key in ((hers, nina), (others, admin)):
            connection.request("GET", "/admin/events", headers=key)
            streams.append(connection.getresponse())
            assert streams[-1].readline() == b"event: snapshot\n"
        keys(key_file, "revoke", "nina")
        *_, last = events_of(streams[0].read())
        assert last.startswith("event: error\n") and '"code":"invalid_api_key"' in last
        # What changes is still told to whoever may see it.
        assert guarded.request("POST", "/admin/models", {"source": "builtin:demo", "name": "new"}, admin).status == 201
        while streams[1].readline() != b"event: change\n":
            pass
        assert guarded.request("DELETE", "/admin/models/new", headers=admin).status == 200


def events_of(text: bytes) -> list[str]:
    return [event for event in text.decode().split("\n\n") if event.startswith("event: ")]


def test_the_file_has_no_key_in_it_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    made = keys(path, "create", "a", "--model", "x/y", "--admin")
    assert made["key"] not in path.read_text()
    assert digest_of(made["key"]) in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["keys"]
    (listed,) = keys(path, "list")["keys"]
    assert listed == {"name": "a", "sha256": digest_of(made["key"])[:12], "models": ["x/y"], "admin": True}
    assert keys(path, "create", "a")["error"]["message"] == "there is a key named a already"
    assert keys(path, "revoke", "b")["error"]["message"] == "there is no key named b"


def test_a_file_with_one_plain_key_goes_on_working_and_becomes_one_of_hashes(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text("secret-1\n")
    found = read_keys(str(path)).find("secret-1")
    assert found is not None and found.admin and found.name == "default"
    keys(path, "create", "a")
    assert "secret-1" not in path.read_text()
    assert read_keys(str(path)).find("secret-1") == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "two\nlines\n",
        "[[keys]]\n",
        "[[keys]\n",
        "[other]\n",
        '[[keys]]\nname = "a"\nsha256 = "zz"\n',
        KEY + "free = 1\n",
        KEY + 'admin = "no"\n',
        KEY + "requests_per_minute = 0\n",
        KEY.replace('"a"', '"a b"'),
        KEY + KEY.replace('"a"', '"b"'),
        KEY + KEY.replace("0", "1"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text(text)
    with pytest.raises(ConfigInvalid, match="api_key_file"):
        read_keys(str(path))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    made = (
        Key(name="a", sha256=digest_of(new_key()), requests_per_minute=5, models=("m", "o/n")),
        Key(name="b.c-d_e", sha256=digest_of(new_key()), tokens_per_minute=2**53, concurrent_requests=1, admin=True),
    )
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    for some in (made, made[:1], ()):
        path.write_text(written(some))
        assert read_keys(str(path)).keys == some


def test_a_budget_refills_evenly_and_may_be_overdrawn() -> None:
    limits, key = KeyLimits(), Key(name="a", sha256=HASH, tokens_per_minute=60)
    assert limits.enter(key, 0.0)["x-ratelimit-remaining-tokens"] == "60"
    limits.leave(key, 90, 0.0)
    with pytest.raises(RateLimited) as refused:
        limits.enter(key, 10.0)
    assert refused.value.retry_after_s == pytest.approx(21.0)
    told = limits.enter(key, 45.0)
    assert (told["x-ratelimit-remaining-tokens"], told["x-ratelimit-reset-tokens"]) == ("15", "45.000s")


def test_a_key_whose_bounds_change_starts_anew_and_keeps_what_runs() -> None:
    limits, key = KeyLimits(), Key(name="a", sha256=HASH, concurrent_requests=1)
    limits.enter(key, 0.0)
    changed = Key(name="a", sha256=HASH, concurrent_requests=2)
    limits.keep(frozenset())
    limits.enter(changed, 0.0)
    with pytest.raises(RateLimited):
        limits.enter(changed, 0.0)
    for _ in range(2):
        limits.leave(changed, 0, 0.0)
    limits.keep(frozenset())
    limits.enter(key, 0.0)
