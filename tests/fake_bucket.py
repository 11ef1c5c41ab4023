"""A bucket on loopback: as much of Google's storage API as a run uses.

Serves the JSON API to gcsfs (files) and TensorStore (arrays) from memory, so
that what is written to gs:// in a test goes through the very clients that a
real bucket would see. `python tests/fake_bucket.py` prints the variables that
send those clients here and serves until it is ended.
"""

import http.server
import json
import re
import sys
import threading
import time
import urllib.parse

# Without these the clients ask Google who they are.
VARIABLES = {
  "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
  "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
  "FSSPEC_GCS_TOKEN": "anon",
}


class Bucket:
  """Objects by "bucket/name", and what was asked of them."""

  def __init__(self):
    self.objects: dict[str, tuple[bytes, int]] = {}  # content, generation
    self.requests: list[str] = []
    self.refuse = lambda method, name: False  # True: answer 403
    self._lock = threading.RLock()
    self._generation = 1000
    self._uploads: dict[str, tuple[str, dict, bytearray]] = {}
    self._server = _Server(("127.0.0.1", 0), _handler(self))
    self._thread = threading.Thread(
      target=self._server.serve_forever, args=(0.02,), daemon=True
    )

  @property
  def variables(self) -> dict[str, str]:
    """Environment that sends the clients here."""
    address = f"http://127.0.0.1:{self._server.server_port}"
    return VARIABLES | {
      "STORAGE_EMULATOR_HOST": address,
      "TENSORSTORE_GCS_HTTP_URL": address,
    }

  def __enter__(self) -> "Bucket":
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._server.shutdown()
    self._server.server_close()

  def files(self, prefix: str) -> dict[str, bytes]:
    """Contents below "bucket/folder" by the name inside."""
    prefix = prefix.rstrip("/") + "/"
    with self._lock:
      return {
        name.removeprefix(prefix): content
        for name, (content, _) in self.objects.items()
        if name.startswith(prefix)
      }

  # The API: each returns (status, headers, body).

  def insert(self, name, query, content):
    """Creates or replaces an object."""
    with self._lock:
      wanted = query.get("ifGenerationMatch")
      now = self.objects.get(name, (b"", 0))[1]
      if wanted is not None and int(wanted) != now:
        return _failure(412)
      self._generation += 1
      self.objects[name] = bytes(content), self._generation
      return _json(self._resource(name))

  def begin_upload(self, name, query):
    """Opens a resumable upload."""
    with self._lock:
      key = f"upload-{len(self._uploads)}"
      self._uploads[key] = name, query, bytearray()
    where = f"{self.variables['STORAGE_EMULATOR_HOST']}/resume/{key}"
    return 200, {"Location": where}, b"{}"

  def resume_upload(self, key, content, content_range):
    """Takes a piece of a resumable upload; the last one makes the object."""
    name, query, buffer = self._uploads[key]
    place = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", content_range)
    if place[1] is not None:
      buffer[int(place[1]) :] = content
    if place[2] == "*" or len(buffer) < int(place[2]):
      return 308, {"Range": f"bytes=0-{len(buffer) - 1}"}, b""
    return self.insert(name, query, buffer)

  def read(self, name, query, media, asked_range):
    """The content or the description of an object."""
    with self._lock:
      if name not in self.objects:
        return _failure(404)
      content, generation = self.objects[name]
    if str(generation) == query.get("ifGenerationNotMatch"):
      return 304, {}, b""
    if not media:
      return _json(self._resource(name))
    headers = {"x-goog-generation": str(generation)}
    headers["x-goog-stored-content-encoding"] = "identity"
    part = re.fullmatch(r"bytes=(\d*)-(\d*)", asked_range or "")
    if part is None:
      return 200, headers, content
    size = len(content)
    first = int(part[1]) if part[1] else max(0, size - int(part[2]))
    last = int(part[2]) if part[1] and part[2] else size - 1
    if first >= size:
      return _failure(416)
    last = min(last, size - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return 206, headers, content[first : last + 1]

  def delete(self, name, query):
    """Removes an object."""
    with self._lock:
      now = self.objects.get(name, (b"", 0))[1]
      if str(now) != query.get("ifGenerationMatch", str(now)):
        return _failure(412)
      if self.objects.pop(name, None) is None:
        return _failure(404)
    return 204, {}, b""

  def copy(self, source, target):
    """Copies an object within the API."""
    with self._lock:
      if source not in self.objects:
        return _failure(404)
      self.insert(target, {}, self.objects[source][0])
      return _json({"done": True, "resource": self._resource(target)})

  def list(self, bucket, query):
    """Objects below a prefix, folders where a delimiter is given."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    items, folders = [], set()
    with self._lock:
      for name in sorted(self.objects):
        holder, _, key = name.partition("/")
        if holder != bucket or not key.startswith(prefix):
          continue
        if not query.get("startOffset", "") <= key:
          continue
        if key >= query.get("endOffset", "\U0010ffff"):
          continue
        rest = key[len(prefix) :]
        if delimiter and delimiter in rest:
          folders.add(prefix + rest.split(delimiter)[0] + delimiter)
        else:
          items.append(self._resource(name))
    page = {"kind": "storage#objects"}
    if items:
      page["items"] = items[: int(query.get("maxResults", 10**6))]
    if folders:
      page["prefixes"] = sorted(folders)
    return _json(page)

  def _resource(self, name):
    content, generation = self.objects[name]
    bucket, _, key = name.partition("/")
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    return {
      "kind": "storage#object",
      "name": key,
      "bucket": bucket,
      "size": str(len(content)),
      "generation": str(generation),
      "metageneration": "1",
      "timeCreated": now,
      "updated": now,
    }


class _Server(http.server.ThreadingHTTPServer):
  """Without a word on clients that leave when they know the status."""

  daemon_threads = True

  def handle_error(self, request, client_address):
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)


def _json(value, status=200):
  return (
    status,
    {"Content-Type": "application/json"},
    json.dumps(value).encode(),
  )


def _failure(status):
  error = {"code": status, "message": f"the bucket says {status}"}
  return _json({"error": error}, status)


def _parts(content, kind):
  """Bodies of a multipart message, without their headers."""
  boundary = re.search(r'boundary="?([^";]+)"?', kind)[1].encode()
  pieces = content.split(b"--" + boundary)[1:-1]
  return [
    re.split(rb"\r?\n\r?\n", piece.lstrip(b"\r\n"), maxsplit=1)[1]
    for piece in pieces
  ]


def _answer(bucket, method, target, headers, content):
  """Finds what a request asks for."""
  url = urllib.parse.urlsplit(target)
  query = dict(urllib.parse.parse_qsl(url.query))
  path = url.path
  if path.startswith("/batch/"):
    return _batch(bucket, headers, content)
  if found := re.fullmatch(r"/resume/(.+)", path):
    return bucket.resume_upload(found[1], content, headers["Content-Range"])
  if found := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o/?", path):
    return _upload(bucket, found[1], query, headers, content)
  if found := re.fullmatch(
    r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewrite|copy)To/b/([^/]+)/o/([^/]+)",
    path,
  ):
    names = [urllib.parse.unquote(part) for part in found.groups()]
    return bucket.copy(f"{names[0]}/{names[1]}", f"{names[2]}/{names[3]}")
  found = re.fullmatch(
    r"/(?:download/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?/?", path
  )
  if found is None:
    return _failure(501)
  if found[2] is None:
    if "/o" in path.partition("/b/")[2]:
      return bucket.list(found[1], query)
    return _json({"name": found[1], "kind": "storage#bucket"})
  name = f"{found[1]}/{urllib.parse.unquote(found[2])}"
  if bucket.refuse(method, name):
    return _failure(403)
  if method == "DELETE":
    return bucket.delete(name, query)
  media = query.get("alt") == "media" or path.startswith("/download/")
  return bucket.read(name, query, media, headers.get("Range"))


def _upload(bucket, holder, query, headers, content):
  """One of the three ways to bring an object."""
  kind = query["uploadType"]
  if kind == "multipart":
    about, content = _parts(content, headers["Content-Type"])
    content = content.removesuffix(b"\n")
    query["name"] = json.loads(about)["name"]
  name = f"{holder}/{query['name']}"
  if bucket.refuse("POST", name):
    return _failure(403)
  if kind == "resumable":
    return bucket.begin_upload(name, query)
  return bucket.insert(name, query, content)


def _batch(bucket, headers, content):
  """Several requests in one."""
  answers = []
  for part in _parts(content, headers["Content-Type"]):
    method, target = part.split(None, 2)[:2]
    status, _, body = _answer(bucket, method.decode(), target.decode(), {}, b"")
    answers.append(
      b"--batch\r\nContent-Type: application/http\r\n\r\n"
      + f"HTTP/1.1 {status} said\r\n\r\n".encode()
      + body
      + b"\r\n"
    )
  body = b"".join(answers) + b"--batch--\r\n"
  return 200, {"Content-Type": "multipart/mixed; boundary=batch"}, body


def _handler(bucket):
  """Handler class of one bucket."""

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one segment, or each costs 40 ms

    def answer(self):
      if self.headers.get("Transfer-Encoding") == "chunked":
        content = b""
        while size := int(self.rfile.readline(), 16):
          content += self.rfile.read(size)
          self.rfile.readline()
        self.rfile.readline()
      else:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
      bucket.requests.append(f"{self.command} {self.path}")
      status, headers, body = _answer(
        bucket, self.command, self.path, self.headers, content
      )
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_):
      pass

  return Handler


if __name__ == "__main__":
  with Bucket() as served:
    for variable, value in served.variables.items():
      print(f"{variable}={value}", flush=True)
    threading.Event().wait()
