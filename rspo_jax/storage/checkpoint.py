"""Saves the state of a run and gets it back, bit for bit or not at all.

One save, written by Orbax in the background:

1. process 0 picks a folder that does not exist yet (`step_00000012`, after an
   abandoned attempt `step_00000012.1`, ...);
2. every process copies its shards off the devices (the only part that the
   caller waits for) and Orbax writes them under `state/`;
3. when all processes have written, process 0 hashes every file and puts
   `commit.json` beside them in one rename: step, extra, the shape and dtype of
   every leaf, size and SHA-256 of every file, and the SHA-256 of itself;
4. superseded folders go, their `commit.json` first.

A folder without a `commit.json` that checks out does not count, so a kill at
any moment leaves the checkpoints that were there before. Orbax keeps no
digest of array bytes (a flipped bit would come back as a slightly wrong
number), hence ours. `commit.json` rather than a renamed folder marks the end,
because object stores cannot rename a folder in one go.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

_COMMIT = "commit.json"
_FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})(?:\.(\d+))?")
_HASH_THREADS = 4
_READ_BYTES = 1 << 22
_LISTINGS = 3
_PLAIN_CAUSES = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
)


class CheckpointError(Exception):
  """A checkpoint could not be written, or none can be read."""


class CheckpointMismatch(CheckpointError):
  """A good checkpoint does not fit what is asked of it: a caller's mistake."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What `Checkpointer.restore` found.

  Attributes:
    step: step whose state this is.
    state: the template's tree, filled.
    extra: the JSON dict given to `save`.
    messages: one line for every newer checkpoint that was passed over, with
      the reason; empty when the newest one was good.
  """

  step: int
  state: Any
  extra: dict[str, Any]
  messages: list[str]


@dataclasses.dataclass(frozen=True, order=True)
class _Folder:
  """A folder of one attempt to save one step."""

  step: int
  attempt: int
  path: epath.Path = dataclasses.field(compare=False)


class Checkpointer:
  """Keeps the checkpoints of one run in one folder.

  All processes make the same calls in the same order; the folder is shared by
  them. Not for use from several threads.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    keep_last: int = 2,
    keep_every: int | None = None,
    keep_best: int = 0,
    timeout_s: int = 1200,
  ):
    """Opens a folder, which is made at the first save.

    Args:
      folder: local path or an address that `etils.epath` knows (`gs://...`).
      keep_last: newest checkpoints to keep; with 1, a checkpoint that goes bad
        has nothing to fall back to.
      keep_every: also keep steps that this number divides.
      keep_best: also keep this many of the highest `score`.
      timeout_s: how long processes wait for one another in a save.

    Raises:
      ValueError: a count is out of range.
    """
    if keep_last < 1:
      raise ValueError(f"keep_last={keep_last} must be at least 1.")
    if keep_every is not None and keep_every < 1:
      raise ValueError(
        f"keep_every={keep_every} must be at least 1, or None for never."
      )
    if keep_best < 0:
      raise ValueError(f"keep_best={keep_best} must not be negative.")
    self.folder = epath.Path(_absolute(folder))
    self._keep_last = keep_last
    self._keep_every = keep_every
    self._keep_best = keep_best
    self._damaged: set[str] = set()
    self._thread: threading.Thread | None = None
    self._failure: CheckpointError | None = None
    self._closed = False
    self._quiet = _Quiet()
    logging.getLogger("absl").addFilter(self._quiet)
    self._orbax = ocp.AsyncCheckpointer(
      # Weights and moments hardly compress; trying costs the training its
      # cores.
      ocp.PyTreeCheckpointHandler(use_compression=False),
      timeout_secs=timeout_s,
    )

  def save(
    self,
    step: int,
    state: Any,
    extra: dict[str, Any],
    score: float | None = None,
  ) -> None:
    """Starts saving; returns when the state may be changed or donated.

    Args:
      step: number of the step, at least 0.
      state: any pytree of jax or numpy arrays.
      extra: what else the run needs to go on; must survive JSON.
      score: larger is better; what `keep_best` goes by.

    Raises:
      CheckpointError: this save could not start, or the one before it failed.
      TypeError: a leaf of the state is no array, or `extra` no JSON.
      ValueError: step or score is out of range.
    """
    if score is not None and not math.isfinite(score):
      raise ValueError(f"score={score} must be finite, or None.")
    self.wait()
    leaves, _ = _leaves_by_name(state)
    commit = {
      "format": _FORMAT,
      "step": int(step),
      "score": None if score is None else float(score),
      "extra": _checked_json(extra),
      "leaves": {
        name: [list(leaf.shape), str(np.dtype(leaf.dtype))]
        for name, leaf in leaves.items()
      },
    }
    # Orbax refuses arrays without elements; shape and dtype say it all.
    stored = {
      # The caller may write into a numpy array while we are still saving.
      name: np.array(leaf) if not isinstance(leaf, jax.Array) else leaf
      for name, leaf in leaves.items()
      if leaf.size
    }
    path = self.folder / self._pick_name(int(step))
    try:
      if stored:
        self._orbax.save(path / "state", args=ocp.args.PyTreeSave(stored))
    except Exception as error:
      raise self._write_error(step, path, error) from error
    self._thread = threading.Thread(
      target=self._finish, args=(path, commit), name="checkpoint", daemon=True
    )
    self._thread.start()

  def restore(
    self,
    template: Any | Callable[[dict[str, Any]], Any],
    step: int | None = None,
  ) -> Restored | None:
    """Reads the newest checkpoint whose every byte is as it was written.

    Args:
      template: the state's tree with `jax.ShapeDtypeStruct`s or arrays as
        leaves; jax leaves come back with the template's sharding (none: the
        first local device), whatever devices saved them, numpy leaves as
        numpy. Or a function that makes it of what was saved as `extra`.
      step: this step only.

    Returns:
      The state with what was saved beside it, or None when the folder holds no
      checkpoint at all (or none of `step`).

    Raises:
      CheckpointError: every checkpoint is damaged.
      CheckpointMismatch: the good one was saved from another tree, other
        shapes or dtypes.
    """
    self.wait()
    chosen, messages = self._choose(step)
    if chosen is None:
      if messages:
        raise CheckpointError(
          f"No checkpoint in {self.folder} can be used:\n"
          + "\n".join(messages)
          + "\nMove the folder away to start the run afresh."
        )
      return None
    commit = _read_commit(chosen)
    if callable(template):
      template = template(commit["extra"])
    state = self._read_state(chosen, commit, template)
    return Restored(commit["step"], state, commit["extra"], messages)

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, ascending; bytes are not verified."""
    return sorted({f.step for f in self._folders() if _has_commit(f.path)})

  def best_step(self) -> int | None:
    """Step of the highest score that is still kept; None without scores."""
    scored = []
    for folder in self._folders():
      try:
        score = _read_commit(folder.path)["score"]
      except _DamageError:
        continue
      if score is not None:
        scored.append((score, folder.step))
    return max(scored)[1] if scored else None

  def wait(self) -> None:
    """Blocks until the save under way is on disk.

    Raises:
      CheckpointError: it failed, here or in another process.
    """
    if self._thread is None:
      return
    failure = self._join()
    if jax.process_count() > 1:
      # A process that went on alone would hang in the next collective.
      failed = multihost_utils.process_allgather(np.array(failure is not None))
      if failure is None and failed.any():
        others = ", ".join(str(i) for i in np.flatnonzero(failed))
        failure = CheckpointError(
          f"Saving to {self.folder} failed in process {others}; its message "
          "names the cause. Earlier checkpoints are unharmed."
        )
    if failure is not None:
      raise failure

  def close(self) -> None:
    """Waits for the save under way and releases Orbax's threads.

    Raises:
      CheckpointError: the last save failed.
    """
    try:
      self.wait()
    finally:
      self._release()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_) -> None:
    if kind is None:
      self.close()
      return
    # The other processes may be anywhere: ask them nothing. The error on its
    # way out matters more than that of a save.
    if jax.process_count() > 1 and issubclass(kind, jax.errors.JaxRuntimeError):
      return  # one of them is gone, and a save needs all
    self._join()
    self._release()

  def _join(self) -> CheckpointError | None:
    """Waits for our own thread; returns and forgets its failure."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    failure, self._failure = self._failure, None
    return failure

  def _release(self) -> None:
    if not self._closed:
      self._closed = True
      self._orbax.close()
      logging.getLogger("absl").removeFilter(self._quiet)

  # --- writing ---

  def _pick_name(self, step: int) -> str:
    """Names a new folder; all processes get the same name."""
    if not 0 <= step < 10**15:
      raise ValueError(f"step={step} must lie in [0, 1e15).")
    attempt = 0
    if jax.process_index() == 0:
      try:
        self.folder.mkdir(parents=True, exist_ok=True)
        attempt = max(
          (f.attempt + 1 for f in self._folders() if f.step == step), default=0
        )
      except OSError as error:
        if jax.process_count() == 1:
          raise self._write_error(step, self.folder, error) from error
        attempt = -1
    if jax.process_count() > 1:
      attempt = int(multihost_utils.broadcast_one_to_all(np.int32(attempt)))
      if attempt < 0:
        raise CheckpointError(
          f"Process 0 cannot write to {self.folder}: make the folder writable "
          "or choose another one."
        )
    return _name(step, attempt)

  def _finish(self, path: epath.Path, commit: dict[str, Any]) -> None:
    """Waits for all processes' bytes, then commits and prunes."""
    try:
      # Returns once every process has written and Orbax has merged the parts.
      self._orbax.wait_until_finished()
      if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        commit["files"] = _hash_files(path, durable=True)
        _write_atomically(path / _COMMIT, _seal(commit))
        self._prune(path)
    except Exception as error:
      # Whatever went wrong must reach the loop, which sees it in `wait`.
      self._failure = self._write_error(commit["step"], path, error)
      self._failure.__cause__ = error
      if jax.process_index() == 0:
        _remove(path)

  def _prune(self, newest: epath.Path) -> None:
    """Removes what the policy does not keep; a failure here costs only room."""
    folders = [f for f in self._folders() if f.path.name != newest.name]
    complete = {newest.name: _read_commit(newest)}
    for folder in folders:
      if folder.path.name in self._damaged:
        continue
      try:
        complete[folder.path.name] = _read_commit(folder.path)
      except _DamageError:
        continue
    # A later attempt replaces the earlier one of the same step, and steps past
    # the newest save belong to a history that the run has left: found at the
    # next start, they would bring it back.
    name_by_step = {}
    for name in sorted(complete, key=_parse):
      if complete[name]["step"] <= complete[newest.name]["step"]:
        name_by_step[complete[name]["step"]] = name
    steps = sorted(name_by_step)
    kept = set(steps[-self._keep_last :])
    if self._keep_every is not None:
      kept.update(s for s in steps if s % self._keep_every == 0)
    if self._keep_best:
      scored = [
        (complete[name_by_step[s]]["score"], s)
        for s in steps
        if complete[name_by_step[s]]["score"] is not None
      ]
      kept.update(s for _, s in sorted(scored)[-self._keep_best :])
    kept_names = {name_by_step[s] for s in kept}
    for folder in folders:
      if folder.path.name not in kept_names:
        _remove(folder.path)
        self._damaged.discard(folder.path.name)

  def _write_error(
    self, step: int, path: epath.Path, error: Exception
  ) -> CheckpointError:
    """Puts a failure into words: what, where, why, what to do."""
    return CheckpointError(
      f"The checkpoint of step {step} could not be written to {path}: "
      f"{_reason(error)} Earlier checkpoints are unharmed. Make room or make "
      "the folder writable, then run the same command again."
    )

  # --- reading ---

  def _folders(self) -> list[_Folder]:
    """Everything that looks like ours, oldest first."""
    if not self.folder.exists():
      return []
    found = []
    for path in self.folder.iterdir():
      parsed = _parse(path.name)
      if parsed is not None:
        found.append(_Folder(*parsed, path))
    return sorted(found)

  def _choose(self, step: int | None) -> tuple[epath.Path | None, list[str]]:
    """Finds the newest good folder; all processes get the same one."""
    text = ""
    if jax.process_index() == 0:
      try:
        text = json.dumps(self._choose_here(step))
      except OSError as error:
        text = json.dumps([f"{self.folder} cannot be read: {_reason(error)}"])
    if jax.process_count() > 1:
      text = _broadcast_text(text)
    found = json.loads(text)
    if len(found) == 1:
      raise CheckpointError(found[0])
    name, messages = found
    return (None if name is None else self.folder / name), messages

  def _choose_here(self, step: int | None) -> tuple[str | None, list[str]]:
    """Returns the name of the newest good folder and why others are not."""
    for _ in range(_LISTINGS):
      messages = []
      vanished = False
      for folder in reversed(self._folders()):
        if step is not None and folder.step != step:
          continue
        if not _has_commit(folder.path):
          continue  # a save that was cut short: nothing that counted was lost
        try:
          commit = _read_commit(folder.path)
          _verify_files(folder.path, commit["files"])
        except _DamageError as damage:
          if not _has_commit(folder.path):
            vanished = True
            continue
          self._damaged.add(folder.path.name)
          messages.append(
            f"Checkpoint {folder.path} is damaged and is passed over: {damage}"
          )
          continue
        return folder.path.name, messages
      if not vanished:
        break
      # A run that is still going superseded what we were reading.
    return None, messages

  def _read_state(
    self, path: epath.Path, commit: dict[str, Any], template: Any
  ) -> Any:
    """Reads the arrays of a verified folder into the template's tree."""
    leaves, treedef = _leaves_by_name(template)
    _check_leaves(path, commit["leaves"], leaves)
    stored = {name: leaf for name, leaf in leaves.items() if _size(leaf)}
    arrays = {}
    if stored:
      try:
        arrays = self._orbax.restore(
          path / "state",
          args=ocp.args.PyTreeRestore(
            item={name: 0 for name in stored},
            restore_args={n: _restore_args(x) for n, x in stored.items()},
          ),
        )
      except Exception as error:
        raise CheckpointError(
          f"Checkpoint {path} has the right bytes but could not be read: "
          f"{_reason(error)}"
        ) from error
    return treedef.unflatten(
      arrays[name] if name in arrays else _empty(leaf)
      for name, leaf in leaves.items()
    )


class _DamageError(Exception):
  """A folder is not what was written."""


class _Quiet(logging.Filter):
  """Drops what Orbax logs of a failed save: it is raised instead."""

  def filter(self, record: logging.LogRecord) -> bool:
    return not ("orbax" in record.pathname and record.levelno in (30, 40))


# --- names and trees ---


def _absolute(folder: str | os.PathLike) -> str:
  text = os.fspath(folder)
  return text if "://" in text else os.path.abspath(text)


def _name(step: int, attempt: int) -> str:
  return f"step_{step:08d}" + (f".{attempt}" if attempt else "")


def _parse(name: str) -> tuple[int, int] | None:
  match = _NAME.fullmatch(name)
  if match is None:
    return None
  parsed = int(match[1]), int(match[2] or 0)
  return parsed if _name(*parsed) == name else None


def _leaves_by_name(tree: Any) -> tuple[dict[str, Any], Any]:
  """Flattens a tree to `params.layers.query.kernel` -> leaf, in tree order."""
  flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
  leaves = {}
  for key_path, leaf in flat:
    name = jax.tree_util.keystr(key_path, simple=True, separator=".") or "."
    if name in leaves:
      raise TypeError(
        f"Two leaves of the state are called {name!r}: rename the key that "
        "contains a dot."
      )
    if not all(hasattr(leaf, a) for a in ("shape", "dtype")):
      raise TypeError(
        f"State leaf {name} is a {type(leaf).__name__}, not an array: wrap it "
        "in jnp.asarray or keep it in extra."
      )
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      raise TypeError(
        f"State leaf {name} is a typed random key: keep the seed, or "
        "jax.random.key_data(key)."
      )
    leaves[name] = leaf
  return leaves, treedef


def _size(leaf: Any) -> int:
  return int(np.prod(leaf.shape, dtype=np.int64))


def _check_leaves(
  path: epath.Path, saved: dict[str, Any], leaves: dict[str, Any]
) -> None:
  """Compares tree, shapes and dtypes; Orbax itself would pad or cast."""
  wanted = {
    name: [list(leaf.shape), str(np.dtype(leaf.dtype))]
    for name, leaf in leaves.items()
  }
  missing = sorted(wanted.keys() - saved.keys())
  surplus = sorted(saved.keys() - wanted.keys())
  changed = [
    f"{name}: saved {saved[name][1]}{saved[name][0]}, "
    f"now {wanted[name][1]}{wanted[name][0]}"
    for name in wanted.keys() & saved.keys()
    if saved[name] != wanted[name]
  ]
  if not (missing or surplus or changed):
    return
  parts = []
  if missing:
    parts.append(f"it lacks {_some(missing)}")
  if surplus:
    parts.append(f"it also holds {_some(surplus)}")
  if changed:
    parts.append(f"these differ: {_some(sorted(changed))}")
  raise CheckpointMismatch(
    f"Checkpoint {path} was saved from another model or optimizer: "
    + "; ".join(parts)
    + ". Run with the config that made it, or in another workdir."
  )


def _some(names: list[str]) -> str:
  shown = ", ".join(names[:4])
  rest = len(names) - 4
  return f"{shown} and {rest} more" if rest > 0 else shown


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
  dtype = np.dtype(leaf.dtype)
  if isinstance(leaf, np.ndarray | np.generic):
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
  return ocp.ArrayRestoreArgs(
    restore_type=jax.Array,
    sharding=_sharding(leaf),
    global_shape=leaf.shape,
    dtype=dtype,
  )


def _sharding(leaf: Any) -> jax.sharding.Sharding:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return sharding


def _empty(leaf: Any) -> Any:
  """Makes an array without elements, which Orbax cannot hold."""
  value = np.zeros(leaf.shape, leaf.dtype)
  if isinstance(leaf, np.ndarray | np.generic):
    return value
  return jax.make_array_from_callback(
    leaf.shape, _sharding(leaf), lambda index: value[index]
  )


# --- files ---


def _checked_json(extra: dict[str, Any]) -> dict[str, Any]:
  """Returns a deep copy that reads back equal, or says why there is none."""
  try:
    copy = json.loads(json.dumps(extra, allow_nan=False))
  except (TypeError, ValueError) as error:
    raise TypeError(f"extra cannot be written as JSON: {error}.") from error
  if copy != extra:
    raise TypeError(
      "extra does not survive JSON: use lists for tuples and strings for keys."
    )
  return copy


def _seal(commit: dict[str, Any]) -> bytes:
  """Writes the record together with its own digest."""
  body = json.dumps(commit, allow_nan=False)
  digest = hashlib.sha256(body.encode()).hexdigest()
  return f'{{"sha256": "{digest}",\n"commit": {body}}}\n'.encode()


def _read_commit(path: epath.Path) -> dict[str, Any]:
  """Reads a record; raises `_DamageError` for anything but what we wrote."""
  try:
    data = (path / _COMMIT).read_bytes()
  except OSError as error:
    raise _DamageError(f"{_COMMIT} cannot be read ({error}).") from error
  try:
    commit = json.loads(data)["commit"]
    if _seal(commit) != data:
      raise ValueError("digest")
    known = commit["format"]
  except (ValueError, KeyError, TypeError, RecursionError):
    raise _DamageError(f"{_COMMIT} is not what was written.") from None
  if known != _FORMAT:
    raise _DamageError(
      f"it has format {known}, this version of rspo_jax reads {_FORMAT}."
    )
  return commit


def _has_commit(path: epath.Path) -> bool:
  return (path / _COMMIT).exists()


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


def _hash_file(path: epath.Path, durable: bool) -> list[Any]:
  """Returns [size in bytes, SHA-256] of one file."""
  digest = hashlib.sha256()
  size = 0
  with path.open("rb") as file:
    while chunk := file.read(_READ_BYTES):
      digest.update(chunk)
      size += len(chunk)
    if durable and "://" not in str(path):
      os.fsync(file.fileno())
  return [size, digest.hexdigest()]


def _hash_files(path: epath.Path, durable: bool = False) -> dict[str, Any]:
  """Hashes every file of a folder but its record."""
  files = {n: p for n, p in _walk(path).items() if n != _COMMIT}
  with concurrent.futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
    digests = pool.map(lambda p: _hash_file(p, durable), files.values())
    return dict(zip(files, digests, strict=True))


def _verify_files(path: epath.Path, recorded: dict[str, Any]) -> None:
  """Raises `_DamageError` unless every recorded file has its bytes."""
  try:
    found = _hash_files(path)
  except OSError as error:
    raise _DamageError(f"a file cannot be read ({error}).") from error
  for name, (size, digest) in recorded.items():
    if name not in found:
      raise _DamageError(f"{name} is missing.")
    if found[name][0] != size:
      raise _DamageError(f"{name} has {found[name][0]} of {size} bytes.")
    if found[name][1] != digest:
      raise _DamageError(f"{name} does not have the bytes that were written.")


def _write_atomically(path: epath.Path, data: bytes) -> None:
  """Puts a file in place as a whole, and on the disk before its name is."""
  if "://" in str(path):
    path.write_bytes(data)  # an object appears whole or not at all
    return
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
  for folder in (path.parent, path.parent.parent):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def _remove(path: epath.Path) -> None:
  """Deletes a folder, its record first; leftovers are retried at next save."""
  _ignoring_os_errors(lambda: (path / _COMMIT).unlink(missing_ok=True))
  _ignoring_os_errors(path.rmtree)


def _ignoring_os_errors(action: Callable[[], Any]) -> None:
  try:
    action()
  except OSError:
    return  # a folder that stays costs room, no more


def _reason(error: BaseException) -> str:
  """One line that names the cause."""
  text = " ".join(str(error).split()) or type(error).__name__
  for code in _PLAIN_CAUSES:
    # TensorStore buries it under the addresses of its layers.
    if os.strerror(code) in text:
      return os.strerror(code) + "."
  text = text if len(text) <= 300 else text[:300] + "..."
  return text if text.endswith((".", "!", "?")) else text + "."


def _broadcast_text(text: str) -> str:
  """Gives all processes the text of process 0."""
  data = np.frombuffer(text.encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
  buffer = np.zeros(size, np.uint8)
  if jax.process_index() == 0:
    buffer[:] = data
  sent = multihost_utils.broadcast_one_to_all(buffer)
  return np.asarray(sent, np.uint8).tobytes().decode()
