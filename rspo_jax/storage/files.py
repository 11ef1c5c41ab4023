"""The one way to write a file whole, and the one lock.

1. `replacing` writes beside the file, on to the disk, and then renames: a kill
   or a full disk at any moment leaves the file that was there.
2. `lock` keeps other processes from a file or folder. The lock is the system's
   (`flock`): it goes with the last descriptor that has it, however the process
   ends, and a child keeps what it inherits.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
  """Opens what becomes the file when the block ends without an error.

  Args:
    path: of the file; one that is there keeps its permissions. An `epath.Path`
      in a bucket, too.
    mode: "wb", or "w" for UTF-8.
  """
  if "://" in os.fspath(path):
    with path.open(mode) as file:  # an object appears whole or not at all
      yield file
    return
  path = pathlib.Path(path)
  beside = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    if path.exists():
      shutil.copymode(path, beside)
    os.replace(beside, path)
  except BaseException:
    with contextlib.suppress(OSError):
      beside.unlink()
    raise
  sync(path.parent)


def write(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file that is there whole or not at all."""
  with replacing(path, "w" if isinstance(content, str) else "wb") as file:
    file.write(content)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a JSON file, keys in order, that is there whole or not at all."""
  write(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def sync(folder: str | os.PathLike) -> None:
  """Brings the names in a folder on to the disk; a bucket has no need."""
  if "://" in os.fspath(folder):
    return
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def lock(file: Any, wait: bool = False) -> bool:
  """Locks an open file or descriptor; False where another one has it.

  Disks that know no locks do without: True.

  Args:
    file: what is locked, until it is closed.
    wait: until it is free.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    return False
  except OSError:
    pass
  return True
