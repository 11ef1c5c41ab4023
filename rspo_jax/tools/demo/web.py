"""The demo as a page on this machine: standard library alone, loopback alone.

    GET  /             the page (demo.html)
    GET  /api/model    name, task, example prompts, defaults and bounds
    POST /api/denoise  {"prompt", "length", "block", "steps", "temperature",
                       "cache", "threshold", "seed"} -> JSON lines: a line a
                       forward with the pieces that are new, then the answer

What comes in is bounded and checked; one completion is computed at a time. A
request must name this host, so that no page from elsewhere can reach the
server through a name of its own, and must be JSON, which a form cannot send.
"""

import dataclasses
import http.server
import json
import pathlib
import queue
import sys
import threading
from typing import Any

from rspo_jax.config import cli

HOST = "127.0.0.1"
BODY_BYTES = 32 << 10
WAIT_S = 20.0  # for a completion before this one
SOCKET_S = 30.0

_NOTHING = "there is nothing at this address."
_PAGE = pathlib.Path(__file__).parent / "demo.html"
_HEADERS = (
  ("Cache-Control", "no-store"),
  ("X-Content-Type-Options", "nosniff"),
  ("Referrer-Policy", "no-referrer"),
  (
    "Content-Security-Policy",
    "default-src 'none'; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
  ),
)
_NUMBERS = {
  "length": int,
  "block": int,
  "steps": int,
  "temperature": float,
  "threshold": float,
  "seed": int,
}


def check_request(body: Any) -> dict[str, Any]:
  """The fields of a request, each of its type.

  Raises:
    ValueError: names the field and what it must be.
  """
  if not isinstance(body, dict) or not isinstance(body.get("prompt"), str):
    raise ValueError('the body must be a JSON object with a text "prompt".')
  out = {"prompt": body["prompt"], "cache": body.get("cache", "none")}
  if not isinstance(out["cache"], str):
    raise ValueError("cache must be none, prefix or dual.")
  for key, kind in _NUMBERS.items():
    value = body.get(key)
    if value is None:
      continue
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f"{key} must be a number.")
    if kind is int and value != int(value):
      raise ValueError(f"{key}={value} must be a whole number.")
    out[key] = kind(value)
  unknown = sorted(set(body) - {"prompt", "cache", *_NUMBERS})
  if unknown:
    raise ValueError(f"{unknown[0]!r:.40} is not a field of a request.")
  seed = out.setdefault("seed", 0)
  if not 0 <= seed < 2**31:
    raise ValueError(f"seed={seed} must lie in 0 .. 2**31 - 1.")
  return out


def describe(session) -> dict[str, Any]:
  """What the page is told of the model."""
  length, block, steps = session.shape
  return {
    "model": session.name,
    "task": session.task,
    "examples": session.examples,
    "length": length,
    "block": block,
    "steps": steps,
    "longest": session.longest,
    "prompt_characters": session.prompt_characters,
  }


class Handler(http.server.BaseHTTPRequestHandler):
  """One connection; the server carries the session and the lock."""

  timeout = SOCKET_S
  server_version, sys_version = "rspo_jax", ""

  def log_message(self, *_) -> None:
    """Says nothing: prompts are nobody's business."""

  def do_GET(self) -> None:
    """The page and what it needs to know."""
    if not self._from_here():
      return
    if self.path == "/":
      self._send(200, _PAGE.read_bytes(), "text/html; charset=utf-8")
    elif self.path == "/api/model":
      self._send_json(200, describe(self.server.session))
    else:
      self._send_json(404, {"error": _NOTHING})

  def do_POST(self) -> None:
    """A completion, forward by forward."""
    if not self._from_here():
      return
    if self.path != "/api/denoise":
      self._send_json(404, {"error": _NOTHING})
      return
    session = self.server.session
    try:
      request = check_request(self._body())
      prompt, seed = request.pop("prompt"), request.pop("seed")
      settings = session.check(**request)
      session.read(prompt)
    except (ValueError, OverflowError, RecursionError) as error:
      self._send_json(400, {"error": " ".join(str(error).split())})
      return
    if not self.server.lock.acquire(timeout=WAIT_S):
      self._send_json(503, {"error": "busy with another prompt; try again."})
      return
    try:
      self._stream(session, prompt, settings, seed)
    finally:
      self.server.lock.release()

  def _body(self) -> Any:
    """The JSON of the body."""
    kind = self.headers.get("Content-Type", "").partition(";")[0].strip()
    if kind != "application/json":
      raise ValueError("Content-Type must be application/json.")
    size = self.headers.get("Content-Length", "")
    if not size.isdecimal() or not 0 < int(size) <= BODY_BYTES:
      raise ValueError(f"the body must have 1 to {BODY_BYTES} bytes.")
    return json.loads(self.rfile.read(int(size)))

  def _from_here(self) -> bool:
    """Refuses requests that name another host or come from another page."""
    port = self.server.server_address[1]
    names = {f"{name}:{port}" for name in (HOST, "localhost")}
    origin = self.headers.get("Origin")
    mine = self.headers.get("Host") in names
    mine &= origin is None or origin.removeprefix("http://") in names
    if not mine:
      self._send_json(403, {"error": f"use http://{HOST}:{port}/"})
    return mine

  def _stream(self, session, prompt, settings, seed) -> None:
    """Writes a line a forward while a thread computes."""
    lines: queue.Queue = queue.Queue()

    def compute():
      try:
        answer = session.answer(prompt, settings, seed, lines.put)
        lines.put(dataclasses.asdict(answer))
      except ValueError as error:
        lines.put({"error": " ".join(str(error).split())})
      except Exception as error:  # the page must hear of it; so must we
        lines.put({"error": f"{type(error).__name__} in the model"})
        raise
      finally:
        lines.put(None)

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    here = True
    before: list = [None] * settings.completion_length
    forward = 0
    try:
      self._head(200, "application/x-ndjson")
    except OSError:
      here = False
    # Whoever left is not waited for, but the model is until it is done.
    while (item := lines.get()) is not None:
      if isinstance(item, list):
        placed = {
          place: new
          for place, (old, new) in enumerate(zip(before, item, strict=True))
          if old != new
        }
        before, item = item, {"forward": forward, "placed": placed}
        forward += 1
      if here:
        try:
          self.wfile.write(json.dumps(item).encode() + b"\n")
          self.wfile.flush()
        except OSError:
          here = False
    thread.join()

  def _head(self, status: int, kind: str, size: int | None = None) -> None:
    self.send_response(status)
    self.send_header("Content-Type", kind)
    for name, value in _HEADERS:
      self.send_header(name, value)
    if size is not None:
      self.send_header("Content-Length", str(size))
    self.end_headers()

  def _send(self, status: int, body: bytes, kind: str) -> None:
    self._head(status, kind, len(body))
    self.wfile.write(body)

  def _send_json(self, status: int, value: dict[str, Any]) -> None:
    self._send(status, json.dumps(value).encode(), "application/json")


class Server(http.server.ThreadingHTTPServer):
  """The server of one session."""

  daemon_threads = True

  def __init__(self, session, port: int):
    """Listens on the loopback interface.

    Raises:
      OSError: the port is taken.
    """
    super().__init__((HOST, port), Handler)
    self.session = session
    self.lock = threading.Lock()

  def handle_error(self, request, client_address) -> None:
    """A connection that broke is no news; anything else is."""
    if not isinstance(sys.exc_info()[1], OSError):
      super().handle_error(request, client_address)


def serve(session, port: int) -> int:
  """Serves until interrupted; returns the exit status."""
  try:
    server = Server(session, port)
  except OSError as error:
    return cli.mistake(
      f"--port={port} cannot be used ({error.strerror}); choose another, or 0 "
      "for any free one."
    )
  with server:
    print(
      f"http://{HOST}:{server.server_address[1]}/ (this machine only; Ctrl-C "
      "ends)",
      flush=True,
    )
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      print()
  return cli.DONE
