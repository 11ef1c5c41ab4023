"""The folder of a run, on this machine or in a bucket.

A run whose `--workdir` is `gs://bucket/run` lives in the bucket: Orbax writes
its checkpoints there, and its model/ is exported there. What is appended to
(metrics.jsonl, tensorboard/) cannot be: objects appear whole. So everything
else is written to a local folder and mirrored:

1. `pull` brings what the bucket has before the run goes on, on a machine that
   may never have seen it; what the bucket has counts, local leftovers do not;
2. `push` uploads the files that changed since the last push. It is called
   before a checkpoint is begun: a checkpoint in the bucket then never lacks a
   row of metrics, and rows that it does not know are dropped when the run goes
   on (`MetricsWriter.truncate_to`), as after any crash.

With a local folder both do nothing and nothing here imports a client.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import queue
import threading
from collections.abc import Callable
from typing import Any

from rspo_jax.storage import files

BUCKET = "gs://"
LOCAL_COPIES = pathlib.Path("runs") / "gs"
# What is written to the bucket itself and never copied.
_REMOTE_ONLY = ("checkpoints", "model", "adapter")
_THREADS = 8
_ANSWER_S = 20.0


class MirrorError(Exception):
  """The bucket did not take or give what was asked; names the remedy."""


class Home:
  """Where a run lives: what it writes itself and what is kept of it.

  Attributes:
    address: the folder as given: a `pathlib.Path`, or an `epath.Path` in a
      bucket. Checkpoints and exports belong here.
    local: folder on this machine for everything else; the same where the run
      is not in a bucket.
  """

  def __init__(self, workdir: str):
    """Names the places; reads and writes nothing.

    Raises:
      ValueError: an address of no known kind, or one whose client is not
        installed.
    """
    self._pushed: dict[str, tuple[int, int]] = {}
    self._pulled = False
    self.in_bucket = "://" in workdir
    if not self.in_bucket:
      self.address = self.local = pathlib.Path(os.path.expanduser(workdir))
      return
    names = workdir.removeprefix(BUCKET).strip("/").split("/")
    if not workdir.startswith(BUCKET) or len(names) < 2 or not all(names):
      raise ValueError(
        f"--workdir={workdir} must be a local folder or {BUCKET}BUCKET/FOLDER."
      )
    if {".", ".."} & set(names):
      raise ValueError(
        f"--workdir={workdir} holds . or .., which mean nothing in a bucket; "
        "write the folder out."
      )
    self.address = bucket_path(workdir.rstrip("/"))
    self.local = local_copies(workdir)

  def pull(self) -> int:
    """Brings the run's files from the bucket; returns how many there were.

    Raises:
      MirrorError: the bucket did not give them.
    """
    self._pulled = True
    if not self.in_bucket:
      return 0
    with _explained(f"{self.address} could not be read"):
      names = _names_in(self.address)
      _all(self._download, names)
    for name in names:
      self._pushed[name] = _state(self.local / name)
    return len(names)

  def push(self, part: str = "") -> int:
    """Uploads what changed since the last push; returns the number of files.

    Nothing goes up before `pull`: leftovers of an earlier run on this machine
    must not take the place of what the bucket has.

    Args:
      part: only this folder of the run; it goes up without `pull`, too.

    Raises:
      MirrorError: the bucket did not take them; they are still here.
    """
    if not self.in_bucket or not (self._pulled or part):
      return 0
    states = {
      str(path.relative_to(self.local)): _state(path)
      for path in sorted((self.local / part).rglob("*"))
      if path.is_file()
    }
    changed = [k for k, state in states.items() if state != self._pushed.get(k)]
    with _explained(
      f"{self.local} could not be copied to {self.address}, where it is still "
      "as it was at the last save"
    ):
      _all(self._upload, changed)
    # As they were when they were listed: what came since goes up next time.
    self._pushed.update({name: states[name] for name in changed})
    return len(changed)

  def _download(self, name: str) -> None:
    target = self.local / name
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write(target, (self.address / name).read_bytes())

  def _upload(self, name: str) -> None:
    (self.address / name).write_bytes((self.local / name).read_bytes())


def local_copies(address: str) -> pathlib.Path:
  """The folder on this machine for what lies at an address of a bucket."""
  return LOCAL_COPIES.joinpath(
    *address.removeprefix(BUCKET).strip("/").split("/")
  )


def bucket_path(address: str) -> Any:
  """An `epath.Path` of a bucket whose client sees what others write.

  gcsfs remembers listings: files that Orbax or another process has written
  since would not be there.

  Raises:
    ValueError: the client is not installed.
  """
  try:
    import fsspec
    import gcsfs  # noqa: F401
  except ImportError as error:
    raise ValueError(
      f"{address} lies in a bucket, and its client is not installed "
      f"({error}); run `pip install -r requirements-gcs.txt`."
    ) from error
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  from etils import epath

  return epath.Path(address)


def answer(what: str, ask: Callable[[], Any]) -> Any:
  """What a question to a bucket gives, within a moment or not at all.

  The client tries again for most of a minute where there is no network, which
  is too long for a command that is just wrong.

  Args:
    what: the question's subject, for the message.
    ask: the question; may go on in the background when its answer is late.

  Raises:
    ValueError: no answer in time, or a refusal; an error of the same kind
      that `ask` raises itself passes through.
  """
  answers: queue.Queue = queue.Queue()

  def put():
    try:
      answers.put((ask(), None))
    except Exception as error:  # clients raise errors of many libraries
      answers.put((None, error))

  threading.Thread(target=put, name="bucket", daemon=True).start()
  try:
    value, error = answers.get(timeout=_ANSWER_S)
  except queue.Empty:
    raise ValueError(
      f"{what} gives no answer within {_ANSWER_S:.0f} s; check the network and "
      "`gcloud auth application-default login`."
    ) from None
  if isinstance(error, ValueError):
    raise error
  if error is not None:
    raise ValueError(
      f"{what} cannot be used ({_line(error)}); check that the bucket exists "
      "and that this account may read and write it."
    ) from error
  return value


def _names_in(address) -> list[str]:
  """Names below an address of a bucket that are copied."""
  names, folders = [], [""] if address.exists() else []
  while folders:
    folder = folders.pop()
    for child in (address / folder if folder else address).iterdir():
      name = f"{folder}/{child.name}" if folder else child.name
      if not folder and child.name in _REMOTE_ONLY:
        continue
      if child.name in (".", ".."):
        raise MirrorError(
          f"{address} holds an object named {name!r}, which would leave the "
          "folder here; remove it."
        )
      if child.is_dir():
        folders.append(name)
      else:
        names.append(name)
  return sorted(names)


def _state(path: pathlib.Path) -> tuple[int, int]:
  """What of a file changes when it does."""
  found = path.stat()
  return found.st_size, found.st_mtime_ns


def _all(function: Callable[[str], None], names: list[str]) -> None:
  """Calls a function for all names, several at a time."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for _ in pool.map(function, names):
      pass


@contextlib.contextmanager
def _explained(what: str):
  """Says what could not be done where a client raises one of its errors."""
  try:
    yield
  except MirrorError:
    raise
  except Exception as error:  # clients raise errors of many libraries
    raise MirrorError(
      f"{what} ({_line(error)}). Run the same command again when the bucket "
      "answers."
    ) from error


def _line(error: Exception) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 300 else text[:300] + "..."
