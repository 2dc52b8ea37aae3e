"""A headless Chromium that reaches nothing but this machine, driven by DevTools messages."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_WITH_GPU = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
)


class Tab:
    """A page of the browser.

    Args:
        folder: Folder for the browser's profile.
        has_gpu: Whether WebGPU finds an adapter; it computes on the CPU.

    Attributes:
        faults: Errors and warnings of its console, and requests to other machines.
    """

    def __init__(self, folder: Path, has_gpu: bool = False):
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        if chromium is None:
            pytest.fail("no chromium on PATH: install it")
        self.faults: list[str] = []
        self._process = subprocess.Popen(
            [
                chromium,
                *("--headless=new", "--no-sandbox", "--no-first-run"),
                *(_WITH_GPU if has_gpu else ("--disable-gpu",)),
                *("--remote-debugging-port=0", f"--user-data-dir={folder}"),
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._loop = asyncio.new_event_loop()
        self._count = 0
        self._loop.run_until_complete(self._connect(folder / "DevToolsActivePort"))
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Performance"):
            self.call(f"{domain}.enable")

    async def _connect(self, port_file: Path) -> None:
        deadline = time.monotonic() + 120
        while not port_file.exists() or not port_file.read_text().count("\n"):
            assert time.monotonic() < deadline, "chromium does not start"
            await asyncio.sleep(0.1)
        port = port_file.read_text().split("\n")[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            targets = await answer.json()
        address = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
        self._socket = await self._session.ws_connect(address, max_msg_size=0)

    def close(self) -> None:
        async def end() -> None:
            await self._socket.close()
            await self._session.close()

        self._loop.run_until_complete(end())
        self._loop.close()
        self._process.terminate()
        self._process.wait(60)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a message and return its result; events that arrive before it are noted."""
        return self._loop.run_until_complete(self._call(method, params))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": params})
        while True:
            message = json.loads((await self._socket.receive(timeout=120)).data)
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            if "method" in message:
                self._note(message["method"], message["params"])

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.faults.append(str(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.faults.append(str(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.faults.append(str(params["entry"]))
        elif event == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("http://127.0.0.1:", "data:", "blob:", "file:")):
                self.faults.append(f"requested {url}")

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression, awaited."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"{condition}: {self.faults}"
            time.sleep(0.1)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def count_cpu_seconds(self) -> float:
        """Return the CPU time of the page's process since its start, in seconds."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "ProcessTime")

    def press(self, key: str) -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def choose_file(self, selector: str, path: Path) -> None:
        found = self.call("Runtime.evaluate", expression=f"document.querySelector('{selector}')")
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["result"]["objectId"])

    def take_picture(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(data["data"]))
