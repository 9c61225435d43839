"""A headless Chromium, driven over two pipes by the DevTools protocol."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
)
# The browser reads commands from descriptor 3 and writes replies to descriptor 4.
_WITH_PIPES = (
    "import os, sys; r, w, *c = sys.argv[1:]; os.dup2(int(r), 3); os.dup2(int(w), 4); os.execvp(c[0], c)"
)
_KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), " ": (32, " ")}
PATIENCE_S = 20.0


class Chromium:
    """The browser's process."""

    def __init__(self, directory: Path) -> None:
        assert CHROMIUM is not None
        # Far from 3 and 4, which are given away.
        ends = [_high(end) for end in (*os.pipe(), *os.pipe())]
        theirs, self._commands, self._replies, back = ends
        profile = f"--user-data-dir={directory}"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _WITH_PIPES, str(theirs), str(back)),
                *(CHROMIUM, *_FLAGS, "--remote-debugging-pipe", profile, "about:blank"),
            ],
            pass_fds=(theirs, back),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(directory)},
        )
        os.close(theirs)
        os.close(back)
        self._numbers = count(1)
        self._unread = b""
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        """End the browser."""
        try:
            self.call("Browser.close")
            self._process.wait(PATIENCE_S)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._commands)
            os.close(self._replies)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Run a command, and return what it gave."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_S
        while (reply := self._read(deadline)).get("id") != number:
            self.events.append(reply)
        assert "error" not in reply, (method, reply)
        return reply["result"]

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not reply"
            read = os.read(self._replies, 1 << 16)
            assert read, "the browser has ended"
            self._unread += read
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def tab(self, url: str, *, width: int = 1200, height: int = 800, dark: bool = False) -> Tab:
        """Open a page with storage of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Tab(self, context, session, url, (width, height), dark)


class Tab:
    """One page."""

    def __init__(
        self, browser: Chromium, context: str, session: str, url: str, size: tuple[int, int], dark: bool
    ) -> None:
        self._browser = browser
        self._context = context
        self._session = session
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def close(self) -> None:
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (expression, found)
        return found["result"].get("value")

    def reload(self) -> None:
        """Load the page anew."""
        self.value("window.isOld = true")
        self.call("Page.reload")
        self.until("!window.isOld && document.readyState === 'complete'")

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.value(expression):
            assert time.monotonic() < deadline, (expression, self.text("body"))
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What a reader sees of the first element, and of nothing if there is none."""
        return self.value(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def until_text(self, selector: str, part: str) -> None:
        """Wait until an element shows a text."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.until(f"({place}?.innerText ?? '').includes({json.dumps(part)})")

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key."""
        code, text = _KEYS[key]
        how = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **how)
        self.call("Input.dispatchKeyEvent", type="keyUp", **how)

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        self.call("Input.insertText", text=text)

    def focus(self, selector: str) -> None:
        """Move the focus to an element."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")

    def focused(self) -> str:
        """Id of the element that has the focus, or its text."""
        return self.value("document.activeElement.id || document.activeElement.textContent")

    def complaints(self) -> list[str]:
        """What the browser's console holds against the page: exceptions, errors and breaches of its policy."""
        found = []
        for event in self._browser.events:
            params = event.get("params", {})
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(str(params["args"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["source"] != "network":
                found.append(params["entry"]["text"])
        return found


def _high(descriptor: int) -> int:
    """The same end of a pipe under a descriptor of 10 or more."""
    import fcntl

    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copy
