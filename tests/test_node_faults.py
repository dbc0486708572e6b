"""What happens to a real node when something is killed, taken, changed or stopped."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from clusters import eventually
from conftest import SMALL, StartNode

from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import CLI, NodeProcess, living, running_node
from sllm_actor.testing.questions import count, is_right

pytestmark = pytest.mark.usefixtures("warm_starts")

CHAT = "/v1/chat/completions"
LONG = count(1, 900)
KILLED = count(1, 400)
# For answers that are read to their end: seconds, and not a minute.
WHOLE = count(1, 300)


@pytest.fixture(scope="module")
def started(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(tmp_path_factory.mktemp("shared") / "data", *SMALL) as running:
        yield running


@pytest.fixture
def shared(started: NodeProcess) -> Iterator[NodeProcess]:
    """A node without models, for those that do nothing to the node itself: they share one."""
    yield started
    for status in started.call("GET", "/admin/models")["models"]:
        started.call("DELETE", f"/admin/models/{status['model']['name']}")
    assert instances(started) == []


def ask(content: str) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": content}]}


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def instances(node: NodeProcess) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node.call("GET", "/admin/instances")["instances"]
    return found


def wait_for_instances(node: NodeProcess, number: int) -> None:
    eventually(lambda: len(instances(node)) == number)


def start_failing(*arguments: str | Path) -> dict[str, Any]:
    ran = subprocess.run([CLI, "start", "--json", *arguments], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1, ran
    assert "Traceback" not in ran.stderr, ran.stderr
    error: dict[str, Any] = __import__("json").loads(ran.stdout)["error"]
    return error


def killing(node: NodeProcess, times: int) -> list[dict[str, Any]]:
    """Ask for a long answer, kill the engine that gives it so many times, and give all events."""
    events = node.stream(CHAT, ask(KILLED.prompt))
    seen = [next(events)]
    for _ in range(times):
        eventually(lambda: any(one["active"] for one in instances(node)))
        running = next(one["pid"] for one in instances(node) if one["active"])
        seen.append(next(events))
        os.kill(running, signal.SIGKILL)
        eventually(lambda pid=running: pid not in [one["pid"] for one in instances(node)])  # type: ignore[misc]
    return [*seen, *events]


def test_an_answer_goes_on_in_another_engine_until_one_too_many_was_killed(start_node: StartNode) -> None:
    with start_node() as node:
        node.deploy("builtin:demo", "demo")
        assert is_right(KILLED, text_of(killing(node, 2)))
        assert node.call("GET", "/admin/runtime")["starts"]["recovered"] == 2
        error = killing(node, 3)[-1]["error"]
        assert (error["code"], error["type"]) == ("engine_died", "server_error")
        assert node.chat("demo", "What is 20 + 22?") == "20 + 22 = 42"


@pytest.mark.parametrize("starts", ["warm_starts", "cold_starts"])
def test_a_killed_fork_server_is_replaced(starts: str, start_node: StartNode, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(starts)
    with start_node() as node:
        node.deploy("builtin:demo", "demo")
        assert node.chat("demo", "What is 1 + 2?") == "1 + 2 = 3"
        forkserver = next(
            pid for pid in node.children() if Path(f"/proc/{pid}/comm").read_text().strip() == "sllm-forkserver"
        )
        children = node.children()
        os.kill(forkserver, signal.SIGKILL)
        wait_for_instances(node, 0)
        assert node.chat("demo", "What is 20 + 22?") == "20 + 22 = 42"
        status, left = node.stop()
        assert (status, left, living(children)) == (0, [], [])


def test_sigterm_lets_a_running_answer_finish_and_leaves_no_process(start_node: StartNode) -> None:
    with start_node() as node:
        node.deploy("builtin:demo", "demo")
        events = node.stream(CHAT, ask(WHOLE.prompt))
        begun = [next(events)]
        children = node.children()
        node.process.send_signal(signal.SIGTERM)
        text = text_of([*begun, *events])
        assert is_right(WHOLE, text)
        assert node.process.wait(60) == 0
        assert living(children) == []


def test_sigterm_refuses_new_answers_while_one_finishes(start_node: StartNode) -> None:
    with start_node() as node:
        node.deploy("builtin:demo", "demo")
        events = node.stream(CHAT, ask(LONG.prompt))
        next(events)
        kept = node.connect()
        kept.request("GET", "/health")
        kept.getresponse().read()
        node.process.send_signal(signal.SIGTERM)
        while True:  # The listening socket closes when the signal has been handled.
            try:
                socket.create_connection(kept.sock.getpeername()).close()
            except ConnectionRefusedError:
                break
            except ConnectionResetError:  # It was in the socket's queue when that closed.
                continue
        kept.request("POST", CHAT, __import__("json").dumps(ask("Hi")), {"Content-Type": "application/json"})
        refused = kept.getresponse()
        assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
        kept.close()
        events.close()
        assert node.process.wait(60) == 0


def test_answers_that_outlast_the_drain_time_are_cut_off_and_the_node_still_leaves(start_node: StartNode) -> None:
    with start_node("drain_timeout_s=0") as node:
        node.deploy("builtin:demo", "demo")
        events = node.stream(CHAT, ask(LONG.prompt))
        next(events)
        status, left = node.stop()
        assert (status, left) == (0, [])
        events.close()


def test_a_node_killed_with_sigkill_leaves_no_process_and_its_folder_free(start_node: StartNode) -> None:
    with start_node() as node:
        node.deploy("builtin:demo", "demo")
        node.chat("demo", "What is 1 + 1?")
        children = node.children()
        assert len(children) >= 4, "a fork server, two text processes, engines"
        with ExitStack() as watching:
            ends = [os.pidfd_open(pid) for pid in children]
            for end in ends:
                watching.callback(os.close, end)
            node.process.kill()
            node.process.wait()
            for end in ends:
                wait_readable(end)
    with start_node() as again:
        assert again.chat("demo", "What is 2 + 2?") == "2 + 2 = 4", "registrations outlive the node"


def wait_readable(fd: int) -> None:
    import select

    assert select.select([fd], [], [], 30)[0], "the process is still there"


def test_a_port_in_use_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = start_failing("--port", str(port), "--data-dir", tmp_path)
    assert (error["code"], error["param"]) == ("address_in_use", "port")
    assert str(port) in error["message"]


def test_a_data_folder_that_another_living_node_holds_is_refused(tmp_path: Path) -> None:
    with running_node(tmp_path / "data", *SMALL) as node:
        error = start_failing("--port", "0", "--data-dir", tmp_path / "data")
        assert error["code"] == "data_folder_in_use"
        assert str(node.process.pid) in error["message"]
        assert node.call("GET", "/ready") == {"ready": True}


def test_a_bind_off_loopback_without_a_key_is_refused(tmp_path: Path) -> None:
    error = start_failing("--host", "0.0.0.0", "--port", "0", "--data-dir", tmp_path)
    assert (error["code"], error["param"]) == ("config_invalid", "host")


def test_a_key_is_asked_for_where_one_is_configured(start_node: StartNode, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("secret-1\n")
    with start_node(f"api_key_file={key}") as node:
        assert node.request("GET", "/health").status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            reply = node.request("GET", "/v1/models", headers=headers)
            assert (reply.status, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert node.request("GET", "/v1/models", headers={"Authorization": "Bearer secret-1"}).status == 200


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    key.chmod(0o644)
    error = start_failing("--port", "0", "--data-dir", tmp_path / "data", "--api-key-file", key)
    assert error["param"] == "api_key_file"


def test_an_idle_instance_is_unloaded_and_comes_back_from_host_memory(shared: NodeProcess) -> None:
    shared.deploy("builtin:demo", "demo", keep_alive=0)
    assert shared.chat("demo", "What is 3 + 4?") == "3 + 4 = 7"
    wait_for_instances(shared, 0)
    assert shared.call("GET", "/admin/models")["models"][0]["state"] == "host"
    shared.request("POST", CHAT, ask("What is 3 + 5?"), {"X-Request-Id": "again"})
    timeline = shared.call("GET", "/admin/requests/again")
    assert timeline["cold"]
    assert [span["tier"] for span in timeline["spans"] if span["name"] == "load"] == ["host memory"]


def test_a_model_kept_forever_is_not_unloaded(start_node: StartNode) -> None:
    with start_node("keep_alive_s=10ms") as node:
        node.deploy("builtin:demo", "demo", keep_alive="forever")
        node.chat("demo", "What is 3 + 4?")
        assert instances(node)[0]["expires_in_s"] == "forever"


def test_models_that_compete_for_one_slot_take_turns(start_node: StartNode) -> None:
    with start_node("max_instances=1") as node:
        for name in ("a", "b"):
            node.deploy("builtin:demo", name)
        for number in range(3):
            for name in ("a", "b"):
                assert node.chat(name, f"What is {number} + 1?") == f"{number} + 1 = {number + 1}"
                assert [instance["model"] for instance in instances(node)] == [name]


def test_models_that_compete_for_host_memory_take_turns(start_node: StartNode, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(BUILTIN["demo"], tmp_path / name)
    with start_node("host_pool_bytes=16MiB", "chunk_bytes=16MiB") as node:
        for name in ("a", "b"):
            node.deploy(tmp_path / name, name)
        for _ in range(2):
            for name in ("a", "b"):
                assert node.chat(name, "What is 1 + 1?") == "1 + 1 = 2"


def test_a_busy_slot_is_waited_for_and_then_given(start_node: StartNode) -> None:
    with start_node("max_instances=1") as node, ThreadPoolExecutor(1) as threads:
        for name in ("a", "b"):
            node.deploy("builtin:demo", name)
        events = node.stream(CHAT, ask(WHOLE.prompt) | {"model": "a"})
        begun = [next(events)]
        waiting = threads.submit(node.chat, "b", "What is 1 + 1?")
        assert is_right(WHOLE, text_of([*begun, *events]))
        assert waiting.result() == "1 + 1 = 2"


def test_a_slot_that_stays_busy_gives_503_with_retry_after(start_node: StartNode) -> None:
    with start_node("max_instances=1", "start_timeout_s=0.2") as node:
        for name in ("a", "b"):
            node.deploy("builtin:demo", name)
        events = node.stream(CHAT, ask(LONG.prompt) | {"model": "a"})
        next(events)
        asked = ask("What is 1 + 1?") | {"model": "b"}
        # A stream that has not opened yet, too: its status is still to come.
        replies = [node.request("POST", CHAT, asked | {"stream": stream}) for stream in (False, True)]
        events.close()
        for reply in replies:
            assert (reply.status, reply.json()["error"]["code"]) == (503, "no_capacity")
            assert int(reply.headers["Retry-After"]) >= 1


def test_requests_for_one_cold_model_share_one_start(shared: NodeProcess) -> None:
    with ThreadPoolExecutor(8) as threads:
        shared.deploy("builtin:demo", "cold")
        before = shared.call("GET", "/admin/runtime")["starts"]["placements"]
        answers = list(threads.map(lambda _: shared.chat("cold", "What is 5 + 6?"), range(8)))
        assert answers == ["5 + 6 = 11"] * 8
        assert [instance["model"] for instance in instances(shared)] == ["cold"]
        assert shared.call("GET", "/admin/runtime")["starts"]["placements"] == before + 1


def test_waiting_requests_are_bounded(start_node: StartNode) -> None:
    with start_node("max_waiting_requests=2", "max_instances=1") as node, ThreadPoolExecutor(8) as threads:
        for name in ("a", "b"):
            node.deploy("builtin:demo", name)
        events = node.stream(CHAT, ask(LONG.prompt) | {"model": "a"})
        next(events)
        replies = [threads.submit(node.request, "POST", CHAT, ask("Hi") | {"model": "b"}) for _ in range(5)]
        refused = [reply for reply in (next(done_first(replies)) for _ in range(1)) if reply.status == 429]
        events.close()
        assert refused
        assert "Retry-After" in refused[0].headers
        assert sorted(reply.result().status for reply in replies).count(200) == 2


def done_first(futures: list[Any]) -> Any:
    from concurrent.futures import as_completed

    return (future.result() for future in as_completed(futures))


def test_stopping_a_model_lets_its_answer_finish(shared: NodeProcess) -> None:
    shared.deploy("builtin:demo", "demo")
    events = shared.stream(CHAT, ask(WHOLE.prompt))
    begun = [next(events)]
    with ThreadPoolExecutor(1) as threads:
        stopping = threads.submit(shared.call, "POST", "/admin/models/demo/unload", {})
        assert is_right(WHOLE, text_of([*begun, *events]))
        assert stopping.result() == {"stopped": 1, "ended_starts": 0}
    assert instances(shared) == []


def test_a_removed_model_is_gone_and_can_be_deployed_again(shared: NodeProcess) -> None:
    shared.deploy("builtin:demo", "demo")
    shared.chat("demo", "What is 1 + 1?")
    shared.call("DELETE", "/admin/models/demo")
    assert instances(shared) == []
    assert shared.request("POST", CHAT, ask("What is 1 + 1?")).status == 404
    shared.deploy("builtin:demo", "demo")
    assert shared.chat("demo", "What is 1 + 1?") == "1 + 1 = 2"


def test_files_changed_since_their_registration_are_noticed(shared: NodeProcess, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN["demo"], folder)
    shared.deploy(folder, "demo")
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    reply = shared.request("POST", CHAT, ask("What is 1 + 1?"))
    assert (reply.status, reply.json()["error"]["code"]) == (400, "checkpoint_changed")
    shared.deploy(folder, "demo")
    assert shared.chat("demo", "What is 1 + 1?") == "1 + 1 = 2"


@pytest.mark.usefixtures("cold_starts")
def test_no_module_is_imported_after_the_node_is_ready_and_the_node_itself_has_no_torch(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with said.open("w") as log, running_node(tmp_path / "data", *SMALL, log=log) as node:
        node.deploy("builtin:demo", "demo")
        node.chat("demo", "What is 1 + 1?")
        assert [instance["late_imports"] for instance in instances(node)] == [[]]
        assert "libtorch" not in Path(f"/proc/{node.process.pid}/maps").read_text()
        engine = Path(f"/proc/{instances(node)[0]['pid']}/maps").read_text()
        assert "libtorch" in engine, "the check above looks at the right thing"
        # The library that compiles grammars brings triton, torch would import it, and it shows at every child's end.
        assert "libtriton" not in engine
        assert node.stop() == (0, [])
    assert said.read_text() == ""


def test_a_template_that_loops_is_cut_off_and_others_go_on(start_node: StartNode, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN["demo"], folder)
    template = folder / "chat_template.jinja"
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template.write_text("{% if messages[0].content == 'loop' %}" + loop + "{% endif %}" + template.read_text())
    with start_node("text_timeout_s=1") as node, ThreadPoolExecutor(1) as threads:
        node.deploy("builtin:demo", "demo")
        node.deploy(folder, "looping")
        stuck = threads.submit(node.request, "POST", CHAT, ask("loop") | {"model": "looping"})
        reply = stuck.result()
        assert (reply.status, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert node.chat("demo", "What is 1 + 1?") == "1 + 1 = 2"
        assert node.chat("looping", "What is 1 + 1?") == "1 + 1 = 2"


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_many_starts_and_stops_leak_no_descriptor_thread_or_process(start_node: StartNode) -> None:
    with start_node("engine_refill_delay_s=0", "warm_engines=1") as node:
        node.deploy("builtin:demo", "demo")

        def cycle() -> tuple[int, int]:
            assert node.chat("demo", "What is 1 + 1?") == "1 + 1 = 2"
            node.call("POST", "/admin/models/demo/unload", {})
            pid = node.process.pid
            return descriptors(pid), len(os.listdir(f"/proc/{pid}/task"))

        for _ in range(3):
            before = cycle()
        for _ in range(10):
            after = cycle()
        # An idle engine may or may not have been forked again when the cycle ended.
        assert after[0] <= before[0] + 2
        assert after[1] <= before[1]
        assert len(node.children()) <= 5, "a fork server, two text processes, at most two idle engines"


def test_weights_that_do_not_fit_any_more_fail_the_start_and_give_everything_back(
    shared: NodeProcess, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN["demo"], folder)
    weights = folder / "model.safetensors"
    shared.deploy(folder, "demo")
    original, times = weights.read_bytes(), weights.stat()

    def overwrite(data: bytes) -> None:
        with weights.open("r+b") as opened:
            opened.write(data)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))

    overwrite(original.replace(b"model.norm.weight", b"model.nose.weight"))
    reply = shared.request("POST", CHAT, ask("What is 1 + 1?"))
    assert (reply.status, reply.json()["error"]["code"]) == (400, "checkpoint_invalid")
    assert "model.norm.weight" in reply.json()["error"]["message"]
    assert instances(shared) == []
    # The bad bytes are in the pool still, under a description that fits them; a new one reads them anew.
    overwrite(original)
    os.utime(weights)
    shared.deploy(folder, "demo", replace=True)
    assert shared.chat("demo", "What is 1 + 1?") == "1 + 1 = 2"


@pytest.mark.usefixtures("cold_starts")
def test_a_node_imports_nothing_from_the_folder_it_is_started_in(tmp_path: Path) -> None:
    folder = tmp_path / "somewhere"
    folder.mkdir()
    for name in ("selectors", "torch"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    with running_node(tmp_path / "data", *SMALL, folder=folder) as node:
        node.deploy("builtin:demo", "demo")
        assert node.chat("demo", "What is 1 + 1?") == "1 + 1 = 2"


def test_a_template_changed_since_its_deployment_holds_after_the_next_one(shared: NodeProcess, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN["demo"], folder)
    template = folder / "chat_template.jinja"
    shared.deploy(folder, "demo")
    assert shared.chat("demo", "What is 1 + 1?") == "1 + 1 = 2"
    template.write_text(template.read_text().replace("set content = message.content", "set content = 'Add 3 and 4.'"))
    assert shared.chat("demo", "What is 1 + 1?") == "1 + 1 = 2"
    shared.deploy(folder, "demo")
    assert shared.chat("demo", "What is 1 + 1?") == "3 + 4 = 7"
