"""Folders of checkpoints on the disk: which of them count and which are kept.

A save of step 12 goes to a folder that does not exist yet, `step_00000012`, or
`step_00000012.1` after an earlier attempt. `commit.json`, put there last and in
one piece, makes it count: size and SHA-256 of every file, what was saved, and
the SHA-256 of the record itself. A folder whose record does not check out does
not count, so a kill at any moment leaves the checkpoints that were there
before. A record rather than a renamed folder marks the end, because object
stores cannot rename a folder in one go.

Nothing here knows of processes or arrays. Which steps are kept is for Orbax's
preservation policies to say. Its `CheckpointManager` could not take the rest:
it refuses a step that exists, it keeps the steps of a history that the run has
left, and where one process fails to finish a save, all wait for the timeout.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
from typing import Any

from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from rspo_jax.storage import files

RECORD = "commit.json"
_FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})(?:\.(\d+))?")
_HASH_THREADS = 4
_LISTINGS = 3


class DamageError(Exception):
  """A folder is not what was written."""


@dataclasses.dataclass(frozen=True, order=True)
class Attempt:
  """A folder of one attempt to save one step."""

  step: int
  number: int
  path: epath.Path = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class _Info:
  """What a preservation policy asks of a checkpoint."""

  step: int
  metrics: float | None  # the score
  time: None = None


class Commits:
  """The checkpoints in one folder, as one process sees them."""

  def __init__(
    self, folder: epath.Path, keep_last: int, keep_every: int, keep_best: int
  ):
    """Reads and writes nothing; see `checkpoint.Checkpointer`."""
    self.folder = folder
    self._damaged: set[str] = set()
    kept = [
      policies.LatestN(keep_last),
      policies.BestN(
        get_metric_fn=float,
        n=keep_best,
        keep_checkpoints_without_metrics=False,
      ),
    ]
    if keep_every:
      kept.append(policies.EveryNSteps(keep_every))
    self._policy = policies.AnyPreservationPolicy(kept)

  def attempts(self) -> list[Attempt]:
    """Everything that looks like ours, oldest first."""
    if not self.folder.exists():
      return []
    found = (_attempt(path) for path in self.folder.iterdir())
    return sorted(attempt for attempt in found if attempt is not None)

  def new_name(self, step: int) -> str:
    """Name of a folder that does not exist yet; makes the one around it."""
    self.folder.mkdir(parents=True, exist_ok=True)
    numbers = [a.number for a in self.attempts() if a.step == step]
    return _name(step, max(numbers, default=-1) + 1)

  def commit(self, path: epath.Path, record: dict[str, Any]) -> None:
    """Makes a folder count whose files are written; drops what it supersedes.

    Args:
      path: the folder.
      record: JSON to be read back; with "step" and "score".
    """
    path.mkdir(parents=True, exist_ok=True)
    hashes = _hash_files(path, durable=True)
    data = seal({**record, "format": _FORMAT, "files": hashes})
    files.write(path / RECORD, data)
    files.sync(path.parent)
    self._prune(path)

  def newest_good(self, step: int | None) -> tuple[str | None, list[str]]:
    """Name of the newest folder with every byte as it was written.

    Args:
      step: of this step only.

    Returns:
      The name, None where there is none, and one line for each newer folder
      that is damaged.
    """
    for _ in range(_LISTINGS):
      messages = []
      vanished = False
      for attempt in reversed(self.attempts()):
        path = attempt.path
        if (step is not None and attempt.step != step) or not complete(path):
          continue  # a save that was cut short: nothing that counted was lost
        try:
          _verify_files(path, read(path)["files"])
        except DamageError as damage:
          if not complete(path):
            vanished = True
            continue
          self._damaged.add(path.name)
          messages.append(
            f"Checkpoint {path} is damaged and is passed over: {damage}"
          )
          continue
        return path.name, messages
      if not vanished:
        break
      # A run that is still going superseded what we were reading.
    return None, messages

  def _prune(self, newest: epath.Path) -> None:
    """Removes what the policies do not keep."""
    attempts = self.attempts()
    last = _attempt(newest)
    # A later attempt replaces the earlier one of the same step, and steps past
    # the newest save belong to a history that the run has left: found at the
    # next start, they would bring it back.
    name_by_info = {}
    for step in sorted({a.step for a in attempts if a.step <= last.step}):
      for attempt in reversed([a for a in attempts if a.step == step]):
        try:
          if attempt.path.name not in self._damaged:
            info = _Info(step, read(attempt.path)["score"])
            name_by_info[info] = attempt.path.name
            break
        except DamageError:
          continue
    flags = self._policy.should_preserve(
      list(name_by_info), context=policies.PreservationContext()
    )
    kept = {
      name
      for name, keep in zip(name_by_info.values(), flags, strict=True)
      if keep
    }
    for attempt in attempts:
      if attempt.path.name not in kept:
        remove(attempt.path)
        self._damaged.discard(attempt.path.name)


def complete(path: epath.Path) -> bool:
  """Whether a folder has a record, good or bad."""
  return (path / RECORD).exists()


def read(path: epath.Path) -> dict[str, Any]:
  """The record of a folder.

  Raises:
    DamageError: there is anything but what we wrote.
  """
  try:
    data = (path / RECORD).read_bytes()
  except OSError as error:
    raise DamageError(f"{RECORD} cannot be read ({error}).") from error
  try:
    record = json.loads(data)["commit"]
    if seal(record) != data:
      raise ValueError("digest")
    known = record["format"]
  except (ValueError, KeyError, TypeError, RecursionError):
    raise DamageError(f"{RECORD} is not what was written.") from None
  if known != _FORMAT:
    raise DamageError(
      f"it has format {known}, this version of rspo_jax reads {_FORMAT}."
    )
  return record


def seal(record: dict[str, Any]) -> bytes:
  """Writes a record together with its own digest."""
  body = json.dumps(record, allow_nan=False)
  digest = hashlib.sha256(body.encode()).hexdigest()
  return f'{{"sha256": "{digest}",\n"commit": {body}}}\n'.encode()


def remove(path: epath.Path) -> None:
  """Deletes a folder, its record first.

  What cannot be deleted costs room, no more; the next save tries again.
  """
  for action in (lambda: (path / RECORD).unlink(missing_ok=True), path.rmtree):
    try:
      action()
    except OSError:
      continue


def _name(step: int, number: int) -> str:
  return f"step_{step:08d}" + (f".{number}" if number else "")


def _attempt(path: epath.Path) -> Attempt | None:
  match = _NAME.fullmatch(path.name)
  if match is None:
    return None
  step, number = int(match[1]), int(match[2] or 0)
  return (
    Attempt(step, number, path) if _name(step, number) == path.name else None
  )


def _walk(path: epath.Path, prefix: str = "") -> dict[str, epath.Path]:
  """Lists all files below a folder by their relative name."""
  found = {}
  for child in sorted(path.iterdir(), key=lambda p: p.name):
    name = prefix + child.name
    if child.is_dir():
      found.update(_walk(child, name + "/"))
    else:
      found[name] = child
  return found


def _hash_files(path: epath.Path, durable: bool = False) -> dict[str, list]:
  """[size in bytes, SHA-256] of every file of a folder but its record."""
  durable = durable and "://" not in str(path)

  def hashed(file_path: epath.Path) -> list:
    with file_path.open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
      if durable:
        os.fsync(file.fileno())
      return [file.tell(), digest]

  paths = {n: p for n, p in _walk(path).items() if n != RECORD}
  with concurrent.futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
    return dict(zip(paths, pool.map(hashed, paths.values()), strict=True))


def _verify_files(path: epath.Path, recorded: dict[str, list]) -> None:
  """Raises `DamageError` unless every recorded file has its bytes."""
  try:
    found = _hash_files(path)
  except OSError as error:
    raise DamageError(f"a file cannot be read ({error}).") from error
  for name, (size, digest) in recorded.items():
    if name not in found:
      raise DamageError(f"{name} is missing.")
    if found[name][0] != size:
      raise DamageError(f"{name} has {found[name][0]} of {size} bytes.")
    if found[name][1] != digest:
      raise DamageError(f"{name} does not have the bytes that were written.")
