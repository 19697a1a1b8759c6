"""A headless Chromium that is told what to do over two pipes, by Chrome's DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")


class Browser:
    """One page in one browser.

    Attributes:
        asked: addresses that the page has asked for.
        blocked: addresses that its policy kept it from asking for.
    """

    def __init__(self, told: int, heard: int) -> None:
        self._told, self._heard = os.fdopen(told, "wb"), os.fdopen(heard, "rb")
        self._number, self._session, self._rest = 0, "", b""
        self.asked: dict[str, str] = {}
        self.blocked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "DOM", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """One command's result; what the browser tells meanwhile is noted."""
        self._number += 1
        told = {"id": self._number, "method": method, "params": params}
        told |= {"sessionId": self._session} if self._session else {}
        self._told.write(json.dumps(told).encode() + b"\0")
        self._told.flush()
        while (answer := self._read()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(self, address: str, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """An expression's value once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} did not come true in {seconds} seconds"
            time.sleep(0.1)
        return value

    def upload(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def write(self, selector: str, text: str) -> None:
        """Replace what stands in a field, key by key as far as the page can tell."""
        self.run(f"(own => {{ own.focus(); own.select() }})(document.querySelector({json.dumps(selector)}))")
        self.call("Input.insertText", text=text)

    def photograph(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _read(self) -> Any:
        while b"\0" not in self._rest:
            more = os.read(self._heard.fileno(), 1 << 16)
            assert more, "the browser is gone"
            self._rest += more
        told, _, self._rest = self._rest.partition(b"\0")
        return json.loads(told)

    def _note(self, told: Any) -> None:
        params = told.get("params", {})
        if told.get("method") == "Network.requestWillBeSent":
            self.asked[params["requestId"]] = params["request"]["url"]
        elif told.get("method") == "Network.loadingFailed" and params.get("blockedReason") == "csp":
            self.blocked.append(self.asked.pop(params["requestId"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, which ends with the context."""
    heard, telling = os.pipe()
    hearing, told = os.pipe()
    switches = " ".join((*SWITCHES, f"--user-data-dir='{profile}'"))
    command = f"exec chromium {switches} about:blank 3<&{heard} 4>&{told}"
    process = subprocess.Popen(
        ["bash", "-c", command], pass_fds=(heard, told), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(heard)
    os.close(told)
    try:
        yield Browser(telling, hearing)
    finally:
        process.terminate()
        process.wait(20)
