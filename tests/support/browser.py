# SPDX-License-Identifier: Apache-2.0
"""A real Chromium without a window, driven over the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
INSTALL = "apt-get update && apt-get install -y --no-install-recommends chromium"


def find_chromium() -> str:
    """The browser's path; installed where it is missing and may be, else the test is skipped."""
    for attempt in range(2):
        for name in NAMES:
            path = shutil.which(name)
            if path is not None:
                return path
        if attempt == 0:
            if os.geteuid() != 0 or shutil.which("apt-get") is None:
                pytest.skip("needs Chromium, which only root can install here")
            done = subprocess.run(INSTALL, shell=True, capture_output=True, text=True, timeout=600)
            if done.returncode != 0:
                pytest.skip(f"Chromium could not be installed: {done.stderr.strip()[-200:]}")
    pytest.skip("Chromium was installed and is not found")


class Browser:
    """One tab. Entering starts the browser, leaving ends it.

    profile: an empty folder for its files.
    """

    def __init__(self, profile: Path) -> None:
        self.errors: list[str] = []  # exceptions of the page's scripts, and requests it made
        self._profile = profile
        self._loop = asyncio.new_event_loop()
        self._number = 0

    def __enter__(self) -> Browser:
        self._profile.mkdir(exist_ok=True)
        self._log = (self._profile / "chromium.log").open("wb")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--remote-debugging-port=0", "--hide-scrollbars", "--no-first-run"]
        argv = [find_chromium(), *flags, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(argv, stdout=self._log, stderr=self._log)
        self._loop.run_until_complete(self._connect())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.terminate()
        self._process.wait(20)
        self._log.close()

    async def _connect(self) -> None:
        chosen = self._profile / "DevToolsActivePort"
        for _ in range(600):
            if chosen.is_file() and "\n" in chosen.read_text():
                break
            assert self._process.poll() is None, "Chromium ended at once"
            await asyncio.sleep(0.1)
        port = chosen.read_text().splitlines()[0]
        self._session = aiohttp.ClientSession(trust_env=False)
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as response:
            [tab] = [tab for tab in await response.json() if tab["type"] == "page"]
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Network"):
            await self._send(f"{domain}.enable", {})

    async def _send(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            if message.get("method") == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    self.errors.append(f"asked for {url}")
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        return self._loop.run_until_complete(self._send(method, params))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def prefer(self, scheme: str) -> None:
        """`light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, page: Path) -> None:
        """Open a file and wait until it has drawn itself."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        wait = "new Promise(done => { const look = () => document.body?.dataset.ready ? done(1) : "
        for _ in range(50):
            if self.evaluate("location.protocol") == "file:":
                break
        self.evaluate(wait + "setTimeout(look, 20); look(); })")

    def press(self, keys: Sequence[str]) -> None:
        """Keys by name, as `ArrowRight`, with their codes of old."""
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "Home": 36, "End": 35}
        codes |= {"Tab": 9}
        for key in keys:
            fields = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            self.call("Input.dispatchKeyEvent", type="rawKeyDown", **fields)
            self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def screenshot(self, path: Path) -> None:
        """What is in the window, as PNG."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))


def shoot(page: Path, stem: Path, profile: Path) -> list[Path]:
    """Screenshots of a page in light, dark and at 390 pixels of width, of a few colours each."""
    made = []
    with Browser(profile) as browser:
        for name, scheme, width, height in (
            ("light", "light", 1100, 1000),
            ("dark", "dark", 1100, 1000),
            ("390px", "light", 390, 1000),
        ):
            browser.resize(width, height)
            browser.prefer(scheme)
            browser.open(page)
            path = stem.with_name(f"{stem.name}-{name}.png")
            browser.screenshot(path)
            with Image.open(path) as shot:
                small = shot.convert("RGB").quantize(64, dither=Image.Dither.NONE)
            small.save(path, optimize=True)
            made.append(path)
    return made


if __name__ == "__main__":
    # python -m tests.support.browser explain.html docs/explain
    with tempfile.TemporaryDirectory() as folder:
        for path in shoot(Path(sys.argv[1]), Path(sys.argv[2]), Path(folder)):
            print(path, path.stat().st_size)
