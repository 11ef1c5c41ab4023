"""Saves the state of a run and gets it back, bit for bit or not at all.

One save, written by Orbax in the background:

1. process 0 picks a folder that does not exist yet;
2. every process copies its shards off the devices (the only part that the
   caller waits for) and Orbax writes them under `state/`;
3. when all processes have written, process 0 hashes every file and commits the
   folder (see `commits`), and superseded folders go.

Orbax keeps no digest of array bytes (a flipped bit would come back as a
slightly wrong number), hence ours.
"""

import dataclasses
import errno
import json
import logging
import math
import os
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rspo_jax.devices import sharding
from rspo_jax.storage import commits

_TIMEOUT_S = 1200  # how long processes wait for one another in a save
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


class Checkpointer:
  """Keeps the checkpoints of one run in one folder.

  All processes make the same calls in the same order; the folder is shared by
  them. Not for use from several threads.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    keep_last: int = 2,
    keep_every: int = 0,
    keep_best: int = 0,
  ):
    """Opens a folder, which is made at the first save.

    Args:
      folder: local path or an address that `etils.epath` knows (`gs://...`).
      keep_last: newest checkpoints to keep, at least 1; with 1, a checkpoint
        that goes bad has nothing to fall back to.
      keep_every: also keep steps that this number divides; 0: none.
      keep_best: also keep this many of the highest `score`.
    """
    text = os.fspath(folder)
    self.folder = epath.Path(text if "://" in text else os.path.abspath(text))
    self._commits = commits.Commits(
      self.folder, keep_last, keep_every, keep_best
    )
    self._thread: threading.Thread | None = None
    self._failure: CheckpointError | None = None
    self._quiet = _Quiet()
    logging.getLogger("absl").addFilter(self._quiet)
    self._orbax = ocp.AsyncCheckpointer(
      # Weights and moments hardly compress; trying costs the training its
      # cores.
      ocp.PyTreeCheckpointHandler(use_compression=False),
      timeout_secs=_TIMEOUT_S,
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
      step: number of the step.
      state: any pytree of jax or numpy arrays.
      extra: what else the run needs to go on; must survive JSON.
      score: finite, larger is better; what `keep_best` goes by.

    Raises:
      CheckpointError: this save could not start, or the one before it failed.
      TypeError: a leaf of the state is no array, or `extra` no JSON.
    """
    self.wait()
    leaves, _ = _leaves_by_name(state)
    record = {
      "step": step,
      "score": None if score is None else float(score),
      "extra": _checked_json(extra),
      "leaves": _described(leaves),
    }
    stored = {
      # The caller may write into a numpy array while we are still saving.
      name: np.array(leaf) if not isinstance(leaf, jax.Array) else leaf
      for name, leaf in leaves.items()
      if leaf.size  # Orbax refuses arrays without elements
    }
    name = self._agreed(
      lambda: self._commits.new_name(step),
      lambda reason: _unwritten(step, self.folder, reason),
    )
    path = self.folder / name
    try:
      if stored:
        self._orbax.save(path / "state", args=ocp.args.PyTreeSave(stored))
    except Exception as error:
      raise _unwritten(step, path, _reason(error)) from error
    self._thread = threading.Thread(
      target=self._finish, args=(path, record), name="checkpoint", daemon=True
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
    name, messages = self._agreed(
      lambda: self._commits.newest_good(step),
      lambda reason: CheckpointError(f"{self.folder} cannot be read: {reason}"),
    )
    if name is not None:
      path = self.folder / name
      record = commits.read(path)
      extra = record["extra"]
      if callable(template):
        template = template(extra)
      state = _read_state(self._orbax, path, record, template)
      return Restored(record["step"], state, extra, messages)
    if messages:
      raise CheckpointError(
        f"No checkpoint in {self.folder} can be used:\n"
        + "\n".join(messages)
        + "\nMove the folder away to start the run afresh."
      )
    return None

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, ascending; bytes are not verified."""
    attempts = self._commits.attempts()
    return sorted({a.step for a in attempts if commits.complete(a.path)})

  def wait(self) -> None:
    """Blocks until the save under way is on disk.

    Raises:
      CheckpointError: it failed, here or in another process.
    """
    if self._thread is None:
      return
    failure = self._join()
    # A process that went on alone would hang in the next collective.
    failed = sharding.gather_rows(np.array([failure is not None]))
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
    self._orbax.close()
    logging.getLogger("absl").removeFilter(self._quiet)

  def _agreed(
    self,
    ask: Callable[[], Any],
    failure: Callable[[str], CheckpointError],
  ) -> Any:
    """What process 0 finds in the folder, as JSON, in all processes."""
    answers = []
    if jax.process_index() == 0:
      try:
        answers.append([ask(), None])
      except OSError as error:
        answers.append([None, _reason(error)])
    ((found, reason),) = sharding.gather_json(answers)
    if reason is not None:
      raise failure(reason)
    return found

  def _finish(self, path: epath.Path, record: dict[str, Any]) -> None:
    """Waits for all processes' bytes, then commits."""
    try:
      # Returns once every process has written and Orbax has merged the parts.
      self._orbax.wait_until_finished()
      if jax.process_index() == 0:
        self._commits.commit(path, record)
    except Exception as error:
      # Whatever went wrong must reach the loop, which sees it in `wait`.
      self._failure = _unwritten(record["step"], path, _reason(error))
      self._failure.__cause__ = error
      if jax.process_index() == 0:
        commits.remove(path)


class _Quiet(logging.Filter):
  """Drops what Orbax logs of a failed save: it is raised instead."""

  def filter(self, record: logging.LogRecord) -> bool:
    return not ("orbax" in record.pathname and record.levelno in (30, 40))


def _unwritten(step: int, path: epath.Path, reason: str) -> CheckpointError:
  """Puts a failure into words: what, where, why, what to do."""
  return CheckpointError(
    f"The checkpoint of step {step} could not be written to {path}: "
    f"{reason} Earlier checkpoints are unharmed. Make room or make the folder "
    "writable, then run the same command again."
  )


def _read_state(
  orbax: ocp.AsyncCheckpointer,
  path: epath.Path,
  record: dict[str, Any],
  template: Any,
) -> Any:
  """Reads the arrays of a verified folder into the template's tree."""
  leaves, treedef = _leaves_by_name(template)
  _check_leaves(path, record["leaves"], _described(leaves))
  stored = {k: leaf for k, leaf in leaves.items() if math.prod(leaf.shape)}
  arrays = {}
  if stored:
    try:
      arrays = orbax.restore(
        path / "state",
        args=ocp.args.PyTreeRestore(
          item={name: 0 for name in stored},
          restore_args=ocp.checkpoint_utils.construct_restore_args(
            stored, {name: _sharding(leaf) for name, leaf in stored.items()}
          ),
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


def _described(leaves: dict[str, Any]) -> dict[str, list]:
  """[shape, dtype] of every leaf, as JSON."""
  return {
    name: [list(leaf.shape), str(np.dtype(leaf.dtype))]
    for name, leaf in leaves.items()
  }


def _check_leaves(
  path: epath.Path, saved: dict[str, list], wanted: dict[str, list]
) -> None:
  """Compares tree, shapes and dtypes; Orbax itself would pad or cast."""
  changed = sorted(
    f"{name}: saved {saved[name][1]}{saved[name][0]}, "
    f"now {wanted[name][1]}{wanted[name][0]}"
    for name in wanted.keys() & saved.keys()
    if saved[name] != wanted[name]
  )
  parts = [
    f"{what} {_some(names)}"
    for what, names in (
      ("it lacks", sorted(wanted.keys() - saved.keys())),
      ("it also holds", sorted(saved.keys() - wanted.keys())),
      ("these differ:", changed),
    )
    if names
  ]
  if parts:
    raise CheckpointMismatch(
      f"Checkpoint {path} was saved from another model or optimizer: "
      + "; ".join(parts)
      + ". Run with the config that made it, or in another workdir."
    )


def _some(names: list[str]) -> str:
  shown = ", ".join(names[:4])
  rest = len(names) - 4
  return f"{shown} and {rest} more" if rest > 0 else shown


def _sharding(leaf: Any) -> jax.sharding.Sharding:
  return getattr(leaf, "sharding", None) or (
    jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  )


def _empty(leaf: Any) -> Any:
  """Makes an array without elements, which Orbax cannot hold."""
  value = np.zeros(leaf.shape, leaf.dtype)
  if isinstance(leaf, np.ndarray | np.generic):
    return value
  return jax.make_array_from_callback(
    leaf.shape, _sharding(leaf), lambda index: value[index]
  )


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


def _reason(error: BaseException) -> str:
  """One line that names the cause."""
  text = " ".join(str(error).split()) or type(error).__name__
  for code in _PLAIN_CAUSES:
    # TensorStore buries it under the addresses of its layers.
    if os.strerror(code) in text:
      return os.strerror(code) + "."
  text = text if len(text) <= 300 else text[:300] + "..."
  return text if text.endswith((".", "!", "?")) else text + "."
