"""The config.json of a run's folder: whether a folder is ours, whose run it holds.

Every refusal is a ValueError that names the folder or the key and a remedy.
"""

import hashlib
import json
import os
import pathlib
import stat
import tempfile
from typing import Any

from rspo_jax.config import keys, names, schema
from rspo_jax.storage import mirror

CONFIG = "config.json"
SUMMARY = "summary.json"
# A group whose keys depend on the task: any name, checked when it is known.
OPEN_GROUP = "task.reward_weights."


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
  """Nested dict -> {"group.key": value}."""
  out = {}
  for key, value in config.items():
    if isinstance(value, dict):
      out |= flat(value, f"{prefix}{key}.")
    else:
      out[prefix + key] = value
  return out


def config_hash(config: dict) -> str:
  """Eight hex digits that name a resolved config."""
  text = json.dumps(config, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_finished(folder, steps: int) -> bool:
  """Whether a run has done all its steps.

  Raises:
    ValueError: its summary cannot be read.
  """
  path = folder / SUMMARY
  if not path.exists():
    return False
  try:
    return json.loads(path.read_text(encoding="utf-8"))["steps"] >= steps
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} cannot be read ({error}); delete it to have it written again."
    ) from error


def check_links(path: pathlib.Path, option: str) -> None:
  """Refuses a path through a symbolic link that leads nowhere.

  Such a link neither exists nor lets a folder be made in its place.

  Args:
    path: of a local folder.
    option: how it was given, for the message.

  Raises:
    ValueError: names link and remedy.
  """
  for part in (path, *path.parents):
    if part.is_symlink() and not part.exists():
      raise ValueError(
        f"{option}: {part} is a symbolic link to {os.readlink(part)}, which is "
        "not there; make that folder, remove the link, or choose another "
        "folder."
      )


def check_workdir(workdir: str, config: dict, mode: str) -> None:
  """Refuses a folder that is not ours, holds another run, or is read-only.

  A folder in a bucket is asked the same, and the local one beside it.

  Args:
    workdir: the folder as given.
    config: the resolved config.
    mode: "train" or "eval"; an evaluation may have another config than the
      run in the folder.

  Raises:
    ValueError: names folder and remedy; nothing was written.
  """
  home = mirror.Home(workdir)
  folder = home.local
  try:
    check_links(folder, f"--workdir={workdir}")
    if home.in_bucket:
      before = mirror.answer(
        f"--workdir={workdir}", lambda: _probe_bucket(home.address)
      )
    else:
      before = _run_in(folder)
    # Whether it can be written is seen by doing so: permission bits say
    # nothing to root, or of a read-only disk.
    parent = folder
    while not parent.exists():
      parent = parent.parent
    os.rmdir(tempfile.mkdtemp(prefix=".rspo_jax-", dir=parent))
  except OSError as error:
    raise ValueError(
      f"--workdir={workdir} cannot be used ({error.strerror}); choose a folder "
      "that can be written."
      + f" (Local copies go to {folder}.)"
      * home.in_bucket
    ) from error
  accepted = config["run"]["accept_changes"]
  if before is not None and mode == "train" and not accepted:
    check_same_run(before, config, workdir)


def _probe_bucket(folder) -> dict | None:
  """`_run_in` of a folder in a bucket that can be written, as it is seen."""
  probe = folder / f".rspo_jax-{os.getpid()}-{os.urandom(4).hex()}"
  before = _run_in(folder)
  probe.write_text("")
  probe.unlink()
  return before


def _run_in(folder) -> dict | None:
  """Config of the run that a folder holds, None where there is none yet.

  Args:
    folder: a `pathlib.Path`, or an `epath.Path` in a bucket.
  """
  # One question: in a bucket a folder is there while something is in it, and
  # that may be the probe of another process.
  try:
    found = folder.stat()
  except (FileNotFoundError, NotADirectoryError):
    return None
  in_bucket = not isinstance(folder, pathlib.Path)
  if not (found.is_directory if in_bucket else stat.S_ISDIR(found.st_mode)):
    raise ValueError(f"--workdir={folder} is a file; name a folder.")
  before = read_config(folder)
  if before is not None:
    return before
  try:
    names = [path.name for path in folder.iterdir()]
  except FileNotFoundError:
    return None
  # An evaluation leaves eval/ alone; a start that was cut off, a part of
  # config.json.
  strangers = [
    name
    for name in names
    if name != "eval" and not name.startswith((CONFIG, ".rspo_jax-"))
  ]
  if strangers:
    raise ValueError(
      f"--workdir={folder} holds no run of rspo_jax but {strangers[0]!r}; "
      "choose a new folder."
    )
  return None


def read_config(folder) -> dict | None:
  """The config.json of a run's folder, None where there is none.

  Args:
    folder: a `pathlib.Path`, or an `epath.Path` in a bucket.

  Raises:
    ValueError: it cannot be read, or belongs to something else.
  """
  path = folder / CONFIG
  if not path.exists():
    return None
  try:
    config = json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{path} cannot be read ({error}); choose a new --workdir."
    ) from error
  groups = ("model", "task", "run", "objective")
  if not isinstance(config, dict) or not all(
    isinstance(config.get(group), dict) for group in groups
  ):
    raise ValueError(
      f"{path} is not the config of a run of rspo_jax; choose a new --workdir."
    )
  return config


def defaults() -> dict[str, Any]:
  """Default of every key."""
  return flat(keys.plain(schema.Config()))


def changed_keys(old: dict, new: dict) -> list[str]:
  """Keys in which two configs differ that change the meaning of a run."""
  before, after = flat(old), flat(new)
  # Keys that have come since the run began stood at their defaults then.
  before |= {k: v for k, v in defaults().items() if k in after.keys() - before}
  changed = []
  for key in sorted(before.keys() | after.keys()):
    if key in schema.FREE_KEYS or before.get(key) == after.get(key):
      continue
    if key in before and key not in after and not key.startswith(OPEN_GROUP):
      near = names.nearest(key, after)[:1]
      now = f"; it may be {near[0]} now" if near else ""
      changed.append(f"{key} (was {before[key]!r}) is no key any more{now}")
    else:
      changed.append(f"{key}={after.get(key)!r} (was {before.get(key)!r})")
  return changed


def check_same_run(old: dict, new: dict, workdir: str) -> None:
  """Refuses to continue a run under a config that means something else.

  Raises:
    ValueError: names the keys that differ.
  """
  changed = changed_keys(old, new)
  if changed:
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    raise ValueError(
      f"--workdir={workdir} holds a run with another config: "
      f"{', '.join(changed[:5])}{more}. Use another --workdir, or the config "
      "of that run; --config.run.accept_changes=true goes on with the new one."
    )
