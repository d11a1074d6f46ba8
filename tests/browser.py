"""A headless Chromium driven through chromedriver's WebDriver protocol, for the tests of the page."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def find_chromium() -> tuple[str, str]:
    """Chromium and its driver; on a Debian machine where we are root a missing one is installed."""
    names = ("chromium", "chromedriver")
    found = [shutil.which(name) for name in names]
    if not all(found) and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False, "timeout": 400}
        subprocess.run(["apt-get", "update"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "chromium", "chromium-driver"], **quiet)
        found = [shutil.which(name) for name in names]
    if not all(found):
        missing = "chromium and chromedriver are missing and could not be installed: the page was NOT tested"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    return str(found[0]), str(found[1])


class Browser:
    """One window of one fresh Chromium."""

    def __init__(self, width: int = 1280, height: int = 860, dark: bool = False):
        chromium, driver = find_chromium()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._driver = subprocess.Popen(
            [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        self._session = ""
        arguments = [*FLAGS, f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"]
        options = {"binary": chromium, "args": arguments}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        for attempt in range(100):
            try:
                self._http.get("/status").raise_for_status()
                break
            except httpx.HTTPError:
                assert attempt < 99, "chromedriver did not start"
                time.sleep(0.1)
        session = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/{session['sessionId']}"
        self._size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", self._size)
        if dark:
            feature = {"name": "prefers-color-scheme", "value": "dark"}
            self.devtools("Emulation.setEmulatedMedia", {"features": [feature]})

    def _call(self, method: str, path: str, body: dict | None = None):
        answer = self._http.request(method, f"/session{self._session}{path}", json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def devtools(self, command: str, parameters: dict):
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def anew(self, address: str) -> None:
        """Open an address in a tab that remembers nothing of the one before, which closes."""
        tab = self._call("POST", "/window/new", {"type": "tab"})["handle"]
        self._call("DELETE", "/window")
        self._call("POST", "/window", {"handle": tab})
        self.devtools("Storage.clearDataForOrigin", {"origin": address, "storageTypes": "all"})
        self.devtools("Emulation.setDeviceMetricsOverride", self._size)
        self.log()
        self.go(address)

    def go(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments):
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, selector: str, keys: str) -> None:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{found[ELEMENT]}/value", {"text": keys})

    def hit(self, *keys: str) -> None:
        """Press keys one after another, wherever the focus is, as hands do."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def point(self, x: float, y: float) -> None:
        """Move the pointer to a place of the window."""
        move = {"type": "pointerMove", "duration": 50, "x": round(x), "y": round(y), "origin": "viewport"}
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def click(self, selector: str) -> None:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{found[ELEMENT]}/click", {})

    def until(self, condition: str, seconds: float = 30):
        """Wait until a JavaScript expression is truthy, and give its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < deadline, f"waited in vain for: {condition}\n{self.log()}"
            time.sleep(0.05)
        return value

    def screenshot(self, path: Path) -> bytes:
        picture = base64.b64decode(self._call("GET", "/screenshot"))
        path.write_bytes(picture)
        return picture

    def log(self) -> list[str]:
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        try:
            if self._session:
                self._call("DELETE", "")
        finally:
            self._http.close()
            self._driver.terminate()
            self._driver.wait(10)
            self._profile.cleanup()
