"""The page at `/`, opened in a browser: it shows what the nodes do, and does what it is told to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import running_browser
from clusters import PATIENCE_S, QUESTION, eventually
from conftest import SMALL
from metadata_stores import UNPACKED
from playwright.sync_api import Browser, Page, expect

from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.node_process import NodeProcess, running_node

NAMES = ("n1", "n2")
KNOBS = (
    *SMALL, "listen=tcp://127.0.0.1:0", "lease_ttl_s=2", "max_instances=2", "warm_engines=1", "start_timeout_s=60",
    "watch_interval_s=0.1",
)  # fmt: skip
KEY = "sk-a-key-of-a-test"
EVENTS = "/admin/events"
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
expect.set_options(timeout=PATIENCE_S * 1000)


@pytest.fixture(scope="module")
def cluster(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), UNPACKED, NAMES, KNOBS) as running:
        running.nodes["n1"].deploy("builtin:demo", "demo")
        eventually(lambda: all(len(running.shown(name)) == 2 and running.leader(name) for name in NAMES))
        yield running


@pytest.fixture(scope="module")
def guarded(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that asks for a key, and that two may watch."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "key").write_text(KEY)
    (folder / "key").chmod(0o600)
    with running_node(folder / "data", *SMALL, f"api_key_file={folder / 'key'}", "max_watchers=2") as node:
        yield node


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab of its own, whose every complaint and every request elsewhere is a failure at the end."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_S * 1000)
    opened = context.new_page()
    complaints: list[str] = []
    hosts: set[str] = set()
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
    opened.on("request", lambda request: hosts.add(urlsplit(request.url).hostname or ""))
    yield opened
    context.close()
    # A key that is not there yet is answered by 401, which the browser tells of.
    assert [text for text in complaints if "401" not in text] == []
    assert hosts <= {"127.0.0.1"}


def opened(page: Page, node: NodeProcess) -> Page:
    page.goto(node.url)
    expect(page.locator("#health")).to_have_text("healthy")
    return page


def test_the_page_shows_that_the_nodes_are_well_and_what_there_is(cluster: NodeCluster, page: Page) -> None:
    opened(page, cluster.nodes["n1"])
    for name in NAMES:
        expect(page.locator("#node-list .row", has_text=name)).to_contain_text("ready")
    expect(page.locator("[data-model=demo]")).to_contain_text("3.4 MB")


def test_a_model_is_deployed_and_asked_and_its_cold_start_is_shown_and_explained(
    cluster: NodeCluster, page: Page
) -> None:
    opened(page, cluster.nodes["n1"])
    page.get_by_text("Deploy a model").click()
    page.get_by_label("Source").fill("builtin:demo")
    page.get_by_label("Name").fill("fresh")
    page.get_by_role("button", name="Deploy").click()
    expect(page.locator("#deploy-status")).to_contain_text("fresh is registered")
    page.locator("#play-form select").select_option("fresh")
    page.get_by_label("Message").fill(QUESTION)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#talk p").last).to_have_text("2 + 3 = 5")
    expect(page.locator("#play-status")).to_contain_text("First text after")
    start = page.locator("[data-start]", has_text="fresh")
    for part in ("placement", "engine", "load", "prefill"):
        expect(start.locator(f".fall .{part} rect").first).to_be_visible()
    start.get_by_text("Why there").click()
    expect(start.locator("tr.chosen")).to_contain_text("start")
    expect(page.locator("[data-model=fresh]")).to_contain_text("runs at")
    page.get_by_role("button", name="Unload fresh").click()
    expect(page.locator("[data-model=fresh]")).not_to_contain_text("runs at")


def test_a_stream_is_moved_by_a_button_and_goes_on_with_the_right_text(cluster: NodeCluster, page: Page) -> None:
    wanted = ", ".join(map(str, range(1, 201)))
    opened(page, cluster.nodes["n1"])
    page.get_by_label("Message").fill("Count from 1 to 200.")
    page.get_by_label("Message").press("Enter")
    page.get_by_role("button", name="Move req-").click()
    expect(page.locator("#move-status")).to_contain_text("goes on at")
    moved_at = len(page.locator("#talk p.answered").inner_text())
    expect(page.locator("#talk p.answered")).to_have_text(wanted)
    assert moved_at < len(wanted)
    expect(page.locator("#move-list .row").first).to_contain_text("→")


def test_the_page_is_used_with_the_keyboard_alone_and_markup_is_shown_as_text(cluster: NodeCluster, page: Page) -> None:
    opened(page, cluster.nodes["n1"])
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "prompt":
            break
    page.keyboard.type(MARKUP)
    page.keyboard.press("Enter")
    expect(page.locator("#talk p.asked")).to_have_text(MARKUP)
    expect(page.locator("#play-status")).to_contain_text("a second")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#talk p")).to_have_count(0)
    assert page.locator("main img, main script").count() == 0


def test_side_by_side_both_columns_end_together(cluster: NodeCluster, page: Page) -> None:
    page.goto(cluster.nodes["n1"].url)
    expect(page.locator("#health")).to_have_text("healthy")
    bottoms = (
        "[...document.querySelectorAll('.column')].map(one => one.lastElementChild.getBoundingClientRect().bottom)"
    )
    left, right = page.evaluate(bottoms)
    assert abs(left - right) < 1
    page.set_viewport_size({"width": 800, "height": 900})
    left, right = page.evaluate(bottoms)
    assert left < right, "one below the other"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(cluster: NodeCluster, page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": 360, "height": 740})
    opened(page, cluster.nodes["n1"])
    expect(page.locator("[data-start]").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    brightness = page.evaluate(
        "getComputedStyle(document.body.parentElement).backgroundColor.match(/\\d+/g).map(Number)[0]"
    )
    assert (brightness < 128) is dark is (scheme == "dark")


def test_a_node_that_asks_for_a_key_gives_the_page_to_all_and_the_rest_to_who_has_it(
    guarded: NodeProcess, page: Page
) -> None:
    page.goto(guarded.url)
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#key-why")).to_contain_text("wrong")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#health")).to_have_text("healthy")
    page.reload()
    expect(page.locator("#health")).to_have_text("healthy")
    assert page.evaluate("localStorage.length") == 0


def test_the_page_is_sent_with_strict_headers_and_once(guarded: NodeProcess) -> None:
    reply = guarded.request("GET", "/")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "unsafe" not in reply.headers["Content-Security-Policy"]
    assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    again = guarded.request("GET", "/", headers={"If-None-Match": reply.headers["Etag"]})
    assert (again.status, again.body) == (304, b"")
    assert guarded.request("HEAD", "/").status == 200
    assert guarded.request("GET", "/page/page.css").status == 200
    for missing in ("/page/nothing.js", "/page/../page.py", "/page/%2e%2e%2fpage.py"):
        assert guarded.request("GET", missing).status in (401, 404)


def test_nothing_in_the_page_is_from_elsewhere_or_makes_elements_of_text() -> None:
    folder = Path(__file__).parent.parent / "sllm_actor" / "frontend" / "page"
    for path in folder.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//" not in text.replace("// ", "")
        for way in (
            ".innerHTML =",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            'style="',
            ' onclick="',
        ):
            assert way not in text, f"{path.name}: {way}"


def events(node: NodeProcess, key: str = "") -> Iterator[tuple[str, dict[str, object]]]:
    connection = node.connect()
    kind = ""
    try:
        connection.request("GET", EVENTS, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        assert (response.status, response.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        for line in response:
            if line.startswith(b"event: "):
                kind = line[7:].decode().strip()
            elif line.startswith(b"data: "):
                yield kind, json.loads(line[6:])
    finally:
        connection.close()


def test_who_watches_is_told_all_once_and_then_what_has_changed(cluster: NodeCluster) -> None:
    watched = events(cluster.nodes["n1"])
    kind, first = next(watched)
    assert kind == "snapshot"
    parts = first["parts"]
    assert isinstance(parts, dict)
    assert set(parts) == {"models", "tiers", "nodes", "instances", "requests", "node", "problems"}
    cluster.nodes["n1"].deploy("builtin:demo", "later")
    kind, change = next(event for event in watched if "models" in event[1]["parts"])  # type: ignore[operator]
    assert kind == "change"
    changed = change["parts"]
    assert isinstance(changed, dict)
    assert "later" in [model["name"] for model in changed["models"]]
    assert "requests" not in changed


def test_no_more_watch_than_may_and_none_without_a_key_for_it(guarded: NodeProcess) -> None:
    assert guarded.request("GET", EVENTS).status == 401
    authorized = {"Authorization": f"Bearer {KEY}"}
    # A page that an earlier test has closed may be taken for a watcher still.
    watching = list[Iterator[tuple[str, dict[str, object]]]]()
    eventually(lambda: _watches_two(guarded, watching))
    refused = guarded.request("GET", EVENTS, headers=authorized)
    assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
    for one in watching:
        one.close()  # type: ignore[attr-defined]
    # Who has left is no watcher any more, as soon as that is noticed.
    eventually(lambda: _may_watch(guarded))


def _watches_two(node: NodeProcess, watching: list[Iterator[tuple[str, dict[str, object]]]]) -> bool:
    one = events(node, KEY)
    try:
        kind, _ = next(one)
    except AssertionError:
        return False
    assert kind == "snapshot"
    watching.append(one)
    return len(watching) == 2


def _may_watch(node: NodeProcess) -> bool:
    connection = node.connect()
    connection.request("GET", EVENTS, headers={"Authorization": f"Bearer {KEY}"})
    status = connection.getresponse().status
    connection.close()
    return status == 200


def test_watching_ends_when_the_node_stops(warm_starts: None, tmp_path: Path) -> None:
    with running_node(tmp_path / "data", *SMALL) as node:
        watched = events(node)
        assert next(watched)[0] == "snapshot"
        assert node.stop() == (0, [])
        kind, last = list(watched)[-1]
    error = last["error"]
    assert isinstance(error, dict)
    assert (kind, error["code"]) == ("error", "draining")
