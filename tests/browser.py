"""A headless Chromium, installed or as scripts/servers has unpacked it, with a fresh profile and no way out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

UNPACKED = Path(__file__).parent.parent / ".servers"
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    # Whatever else it may look up leads nowhere.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig><dir>/usr/share/fonts</dir><dir>{unpacked}/usr/share/fonts</dir><cachedir>{folder}/cache</cachedir>
<match target="pattern"><edit name="family" mode="append_last"><string>DejaVu Sans</string></edit></match>
</fontconfig>
"""


def chromium(folder: Path, unpacked: Path = UNPACKED) -> tuple[str, dict[str, str]]:
    """Give the program and the variables that it needs; what it writes goes to `folder`."""
    fonts = folder / "fonts.conf"
    fonts.write_text(FONTS.format(unpacked=unpacked, folder=folder))
    environment = {"FONTCONFIG_FILE": str(fonts), "HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    installed = shutil.which("chromium")
    if installed is not None:
        return installed, environment
    program = unpacked / "usr" / "lib" / "chromium" / "chromium"
    assert program.exists(), "chromium is not here: scripts/test brings it, and so does Debian's package chromium"
    libraries = [*unpacked.glob("usr/lib/*-linux-gnu*"), *unpacked.glob("lib/*-linux-gnu*")]
    libraries += unpacked.glob("usr/lib/*-linux-gnu*/pulseaudio")
    return str(program), environment | {"LD_LIBRARY_PATH": ":".join(map(str, libraries))}


@contextmanager
def running_browser(folder: Path) -> Iterator[Browser]:
    """Run it with its files in `folder`."""
    program, environment = chromium(folder)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, headless=True, args=list(FLAGS), env={**os.environ, **environment}
        )
        try:
            yield browser
        finally:
            browser.close()
