"""Headless Chromium, spoken to over two pipes."""

import base64
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

# The protocol wants descriptors 3 and 4. A process of its own puts them there:
# a function between fork and exec could hang under JAX's threads.
_PLACE = """
import os, sys
first, second = (os.dup(int(word)) for word in sys.argv[1:3])
high = os.dup(first), os.dup(second)  # above 4, whatever the first two were
os.dup2(high[0], 3)
os.dup2(high[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Browser:
  """Headless Chromium under the DevTools protocol, without a port."""

  FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
  )

  def __init__(self, program, profile):
    to_read, self._write = os.pipe()
    self._read, to_write = os.pipe()

    self._process = subprocess.Popen(
      [
        *(sys.executable, "-c", _PLACE, str(to_read), str(to_write)),
        *(program, *self.FLAGS, f"--user-data-dir={profile}", "about:blank"),
      ],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      pass_fds=(to_read, to_write),
    )
    os.close(to_read)
    os.close(to_write)
    self._buffer = b""
    self._number = 0
    self.session = None
    self.events = []
    targets = self.send("Target.getTargets")["targetInfos"]
    target = next(t["targetId"] for t in targets if t["type"] == "page")
    self.session = self.send(
      "Target.attachToTarget", targetId=target, flatten=True
    )["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.send(f"{domain}.enable")

  def _message(self, limit_s=60.0):
    end = time.monotonic() + limit_s
    while b"\0" not in self._buffer:
      assert time.monotonic() < end, "the browser does not answer"
      chunk = os.read(self._read, 1 << 16)
      assert chunk, "the browser is gone"
      self._buffer += chunk
    text, self._buffer = self._buffer.split(b"\0", 1)
    return json.loads(text)

  def send(self, method, **params):
    """Sends a command and returns its result; events are kept."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": params}
    if self.session:
      message["sessionId"] = self.session
    os.write(self._write, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._message()
      if answer.get("id") == self._number:
        assert "error" not in answer, answer
        return answer["result"]
      self.events.append(answer)

  def run(self, script):
    """Value of a script in the page; promises are awaited."""
    answer = self.send(
      "Runtime.evaluate",
      expression=script,
      awaitPromise=True,
      returnByValue=True,
    )
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")

  def open(self, path, width=1280, height=900, dark=False):
    """Loads a file or an address and waits until it is drawn."""
    self.send(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=width < 600,
    )
    self.colours(dark)
    self.events.clear()
    self.send(
      "Page.navigate", url=path if isinstance(path, str) else path.as_uri()
    )
    while self.run("document.readyState") != "complete":
      time.sleep(0.02)
    self.settle()

  def busy_s(self, work):
    """Seconds that the page's main thread computed; others' work is not."""

    def spent():
      metrics = self.send("Performance.getMetrics")["metrics"]
      return {m["name"]: m["value"] for m in metrics}["TaskDuration"]

    self.send("Performance.enable", timeDomain="threadTicks")
    before = spent()
    work()
    after = spent()
    self.send("Performance.disable")
    # A new document may have begun to count anew.
    return after - before if after > before else after

  def colours(self, dark):
    """Light or dark, as the system would prefer it."""
    self.send(
      "Emulation.setEmulatedMedia",
      features=[
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
      ],
    )

  def settle(self):
    """Waits for what was asked of the next frames."""
    self.run(
      "new Promise(done => requestAnimationFrame(() => "
      "requestAnimationFrame(() => setTimeout(done, 30))))"
    )

  def key(self, key, **more):
    """Presses and releases a key."""
    for kind in ("keyDown", "keyUp"):
      self.send("Input.dispatchKeyEvent", type=kind, key=key, **more)
    self.settle()

  def shot(self, path, **clip):
    """Writes a screenshot."""
    more = {"clip": clip | {"scale": 1}} if clip else {}
    answer = self.send(
      "Page.captureScreenshot", captureBeyondViewport=bool(clip), **more
    )
    pathlib.Path(path).write_bytes(base64.b64decode(answer["data"]))

  def complaints(self, home=("file:", "data:")):
    """Errors and warnings of the console, and requests to anywhere else."""
    out = []
    for event in self.events:
      params = event.get("params", {})
      if event["method"] == "Runtime.exceptionThrown":
        out.append(params["exceptionDetails"])
      elif event["method"] == "Runtime.consoleAPICalled":
        out.append(params["args"])
      elif event["method"] == "Log.entryAdded":
        out.append(params["entry"]["text"])
      elif event["method"] == "Network.requestWillBeSent":
        url = params["request"]["url"]
        if not url.startswith(home):
          out.append(url)
    return out

  def close(self):
    with contextlib.suppress(OSError, AssertionError):
      self.session = None
      self.send("Browser.close")
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(10)
    self._process.kill()
    self._process.wait()
    os.close(self._read)
    os.close(self._write)
