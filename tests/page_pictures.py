"""Pictures of the page for its document: at rest, while a model starts, and after a stream has moved."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import running_browser
from clusters import eventually
from metadata_stores import UNPACKED
from PIL import Image
from playwright.sync_api import Page, expect

from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.shapes import save_opt

NAMES = ("n1", "n2")
KNOBS = (
    "host_pool_bytes=1GiB", "chunk_bytes=4MiB", "engine_threads=1", "ask_timeout_s=60", "listen=tcp://127.0.0.1:0",
    "lease_ttl_s=2", "max_instances=2", "warm_engines=1", "watch_interval_s=0.1",
)  # fmt: skip


def take(cluster: NodeCluster, page: Page, folder: Path) -> None:
    """Take one picture after the other."""
    node = cluster.nodes["n1"]
    page.goto(node.url)
    expect(page.locator("#health")).to_have_text("healthy")
    expect(page.locator("[data-model]")).to_have_count(2)
    page.screenshot(path=folder / "page-idle.png")
    page.locator("#play-form select").select_option("opt-125m")
    page.get_by_label("Message").fill("Once upon a time " * 120)
    page.get_by_role("button", name="Send").click()
    # So long a prompt is computed for seconds.
    expect(page.locator("[data-start] .fall .attach").first).to_be_attached(timeout=60_000)
    assert page.locator("[data-start] .busy").count() == 1
    _take_whole(page, folder / "page-start.png")
    page.get_by_role("button", name="Stop").click()
    page.locator("#play-form select").select_option("demo")
    page.get_by_label("Message").fill("Count from 1 to 300.")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("button", name="Move req-").last.click(timeout=60_000)
    expect(page.locator("#move-status")).to_contain_text("goes on at", timeout=60_000)
    expect(page.locator("#move-list .row")).to_have_count(1)
    _take_whole(page, folder / "page-migration.png")
    for path in folder.glob("page-*.png"):
        # There are few colours: half of the bytes are enough.
        Image.open(path).quantize(256).save(path, optimize=True)


def _take_whole(page: Page, path: Path) -> None:
    # The head stays where one has scrolled to.
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=path, full_page=True)


def main(folder: Path) -> None:
    """Write them to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        own = Path(made)
        (own / "browser").mkdir()
        with (
            running_cluster(own, UNPACKED, NAMES, KNOBS) as cluster,
            running_browser(own / "browser") as browser,
        ):
            cluster.nodes["n1"].deploy("builtin:demo", "demo")
            save_opt(own / "opt", "opt-125m")
            cluster.nodes["n1"].deploy(own / "opt", "opt-125m")
            eventually(lambda: all(len(cluster.shown(name)) == 2 and cluster.leader(name) for name in NAMES))
            page = browser.new_page(viewport={"width": 1120, "height": 800}, color_scheme="light")
            take(cluster, page, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
