"""A headless Chromium, driven through its debugging pipe (DevTools protocol, NUL-terminated JSON): what a page draws, says and asks
the network for. Standard library only."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find():
    """The program's path, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One page. ``requests``: the addresses it asked for beyond its own file; ``problems``: errors and warnings of its console."""

    def __init__(self, profile, width=1000, height=900):
        ours, theirs = os.pipe(), os.pipe()  # (read, write): commands to it, answers from it
        command = [find(), "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
                   "--disable-dev-shm-usage", "--user-data-dir=%s" % profile, "--window-size=%d,%d" % (width, height)]  # fmt: skip
        # It reads file descriptor 3 and writes 4. Ours are moved out of the way first, so that neither overwrites the other.
        read, write = fcntl.fcntl(ours[0], fcntl.F_DUPFD, 10), fcntl.fcntl(theirs[1], fcntl.F_DUPFD, 10)
        place = "import os, sys; os.dup2(%d, 3); os.dup2(%d, 4); os.execv(sys.argv[1], sys.argv[1:])" % (read, write)
        with open(os.path.join(str(profile), "chromium.log"), "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", place] + command, pass_fds=(read, write), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip
        for end in (ours[0], theirs[1], read, write):
            os.close(end)
        self.to, self.come = ours[1], theirs[0]
        self.unread, self.number, self.session = b"", 0, None
        self.events, self.requests, self.problems = [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(10)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            os.close(self.to)
            os.close(self.come)

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self._event(answer)

    def _next(self, seconds=30):
        deadline = time.monotonic() + seconds
        while b"\0" not in self.unread:
            assert select.select([self.come], [], [], max(0.0, deadline - time.monotonic()))[0], "Chromium says nothing"
            data = os.read(self.come, 1 << 20)
            assert data, "Chromium ended with exit code %s" % self.process.wait(10)
            self.unread += data
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def _event(self, message):
        name, params = message.get("method"), message.get("params", {})
        self.events.append(name)
        if name == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"]["exception"].get("description", "an exception"))
        elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        elif name == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])

    def open(self, path):
        """Load a file and wait until everything of it has run."""
        url = path.resolve().as_uri()
        self.events = []
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self.events:
            self._event(self._next())
        self.ask("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        self.requests = [found for found in self.requests if found != url and not found.startswith("data:")]

    def ask(self, expression):
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def dark(self):
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])

    def picture(self, path):
        """The window as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
