"""Drives headless Chromium over a pipe (Chrome DevTools Protocol): widths, colour schemes, scripts, pictures, print."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")

# Chromium reads commands from descriptor 3 and writes replies to descriptor 4.
PLACE = """import fcntl, os, sys
pair = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for place, number in zip((3, 4), pair): os.dup2(number, place)
os.execvp(sys.argv[3], sys.argv[3:])"""


class Browser:
    """A headless browser with one page. Use it as a context manager."""

    def __init__(self):
        program = next(filter(None, map(shutil.which, NAMES)), None)
        assert program, f"these tests need one of {', '.join(NAMES)} (Debian and Ubuntu: apt-get install chromium)"
        self._profile = tempfile.mkdtemp()
        read_commands, self._commands = os.pipe()
        self._replies, write_replies = os.pipe()
        arguments = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                     "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={self._profile}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", PLACE, str(read_commands), str(write_replies), *arguments],
            pass_fds=(read_commands, write_replies), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read_commands)
        os.close(write_replies)
        self._number, self._session, self._buffer, self.complaints = 0, None, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(30)
        os.close(self._commands)
        os.close(self._replies)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _read(self):
        while b"\0" not in self._buffer:
            part = os.read(self._replies, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        text, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(text)

    def _note(self, message):
        """Collects errors, warnings and requests to a network in `complaints`."""
        method, said = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(said["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not said["request"]["url"].startswith(
                ("file:", "data:", "blob:", "about:")):
            self.complaints.append(f"network: {said['request']['url']}")

    def call(self, method, **params):
        """Returns the result of a command; events that come before it are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self._number:
                assert "error" not in reply, (method, reply)
                return reply["result"]
            self._note(reply)

    def open(self, file, width=1200, height=900, scheme="light", media=""):
        """Opens a file in a window of the given width, and waits until it is drawn."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)
        self.call("Emulation.setEmulatedMedia", media=media,
                  features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=Path(file).resolve().as_uri())
        self.run("new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', done))")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script):
        """Returns the value of a JavaScript expression; that of a promise is awaited."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def press(self, key, code=0):
        """Presses and releases a key, such as Tab or ArrowRight."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, file, whole=False):
        """Writes the window, or the whole page, as a PNG file."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **(
            {"clip": {"x": 0, "y": 0, "scale": 1, **self.run(
                "({width: innerWidth, height: document.documentElement.scrollHeight})")}} if whole else {}))["data"]
        Path(file).write_bytes(base64.b64decode(data))

    def pdf(self, file):
        """Writes the page as it is printed on A4."""
        data = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False)["data"]
        Path(file).write_bytes(base64.b64decode(data))
