"""TensorBoard on a run, and a headless Chromium that looks at it, by the pipe of the DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Of a page and its shadow roots, which are TensorBoard's panels: its text, and its elements by a CSS selector.
SEEN = """function text(node) {
  if (!node) return "";
  if (node.nodeType === 3) return node.data + " ";
  if (["STYLE", "SCRIPT"].includes(node.nodeName)) return "";
  const within = node.shadowRoot ? text(node.shadowRoot) : "";
  return within + [...node.childNodes].map(text).join("");
}
function elements(selector, root = document) {
  const within = [...root.querySelectorAll("*")].filter(node => node.shadowRoot);
  return [...root.querySelectorAll(selector), ...within.flatMap(node => elements(selector, node.shadowRoot))];
}
"""


def chromium():
    """The browser that is at hand; None if none is."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


@contextmanager
def serving(logdir):
    """TensorBoard on a free port; gives its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", "--load_fast=false"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        address = ""
        while not address:
            line = process.stderr.readline()
            assert line, "TensorBoard ended"
            address = next((word for word in line.split() if word.startswith("http://localhost")), "")
        yield address.rstrip("/")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def asked(address, route, **query):
    """What TensorBoard answers, as JSON."""
    query = "&".join(f"{name}={urllib.request.quote(value)}" for name, value in query.items())
    with urllib.request.urlopen(f"{address}/data/{route}?{query}", timeout=60) as answer:
        return json.load(answer)


def until(true, seconds=60):
    """Wait for what TensorBoard, which reads logs as it runs, is to know."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.3)


class Browser:
    """A page in a headless Chromium."""

    def __init__(self, folder, width=1000, height=1000):
        (their_end, self.to), (self.answers, our_end) = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        # The browser reads its descriptor 3 and writes 4.
        script = f'exec "$@" 3<&{their_end} 4>&{our_end}'
        command = ["bash", "-c", script, "bash", chromium(), *flags, f"--window-size={width},{height}"]
        self.process = subprocess.Popen(command, pass_fds=(their_end, our_end), stderr=subprocess.DEVNULL)
        os.close(their_end)
        os.close(our_end)
        self.count, self.session, self.unread = 0, None, b""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method, **params):
        """The result of a command of the protocol."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.unread:
                read = os.read(self.answers, 1 << 20)
                assert read, "the browser ended"
                self.unread += read
            one, _, self.unread = self.unread.partition(b"\0")
            answer = json.loads(one)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, script):
        """Of an expression in the page, which may ask for `text(node)` and `elements(selector)`."""
        answer = self.ask("Runtime.evaluate", expression=f"{{{SEEN}{script}}}", returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def resize(self, width, height):
        """The window's inside, in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)

    def open(self, address, *expected, seconds=60):
        """Go there and wait until the page shows these texts, whatever space is in them; gives all its text."""
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=address)
        deadline, text = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            text = " ".join(self.value("text(document.documentElement)").split())
            if all(words in text for words in expected):
                return text
            time.sleep(0.3)
        raise AssertionError(f"{[words for words in expected if words not in text]} not in {text[-1500:]}")

    def picture(self, file):
        """Write the page as a PNG; gives its bytes."""
        content = base64.b64decode(self.ask("Page.captureScreenshot")["data"])
        Path(file).write_bytes(content)
        return content

    def close(self):
        """End the browser."""
        with suppress(OSError, AssertionError):
            self.session = None
            self.ask("Browser.close")
        self.process.wait(timeout=30)
        os.close(self.to)
        os.close(self.answers)
