"""What of a checkpoint's folder is read: its own regular files, within bounds.

A folder from elsewhere is data. A link in it may point anywhere, and what is
read here is written into exports, which are given away; a pipe or a device
under a file's name would be read for ever. So:

1. only regular files are opened;
2. files that are copied along unchanged may be links within the folder, or
   within the cache of the hub that the folder is a snapshot of
   (`models--owner--name/snapshots/HASH/x -> ../../blobs/SHA`), none else;
3. small files have a largest size;
4. regular expressions that it brings are matched in a worker process, because
   they may go back and forth for ever.
"""

import os
import pathlib
import re
import stat
import warnings
from collections.abc import Sequence

from rspo_jax import workers
from rspo_jax.models.families import CheckpointError

MAX_BYTES = 256 << 20  # of a file other than weights; the largest have 40 MiB

_LIMITS = workers.Limits(time_s=5.0, memory_bytes=512 << 20)


class CorruptFile(CheckpointError):
  """A file is truncated or not what its name says."""


def check_regular(file) -> None:
  """Refuses pipes, devices and folders under a file's name.

  Args:
    file: `epath.Path`, which exists; objects of a bucket are all regular.

  Raises:
    CorruptFile: naming the file.
  """
  path = os.fspath(file)
  if "://" not in path and not stat.S_ISREG(os.stat(path).st_mode):
    raise CorruptFile(
      f"{file} is a pipe, a device or a folder, not a file; put the "
      "checkpoint's file in its place."
    )


def read_small(file) -> bytes:
  """Contents of a file that is not weights.

  Raises:
    CorruptFile: it is no regular file, or larger than `MAX_BYTES`.
  """
  check_regular(file)
  size = file.stat().length
  if size > MAX_BYTES:
    raise CorruptFile(
      f"{file} has {size} bytes, more than the {MAX_BYTES} of any file of its "
      "kind; download it again."
    )
  return file.read_bytes()


def read_companions(folder, names) -> tuple[dict[str, bytes], list[str]]:
  """Contents of files that are copied along, and the names left out.

  Links that leave the folder are not followed; a warning names them once.

  Args:
    folder: `epath.Path` of the checkpoint.
    names: of files; those that are not there are passed over.
  """
  contents, left_out = {}, []
  for name in names:
    file = folder / name
    if not file.exists():
      continue
    target = _outside(folder, file)
    if target is None:
      contents[name] = read_small(file)
    else:
      left_out.append(name)
      warnings.warn(
        f"{file} is a link to {target}, outside the checkpoint's folder: it "
        "is neither read nor exported; copy the file there if it is meant.",
        stacklevel=2,
      )
  return contents, left_out


def _outside(folder, file) -> str | None:
  """Where a link leads that leaves the folder, None for all others."""
  if "://" in os.fspath(folder):
    return None
  home = pathlib.Path(os.path.realpath(folder))
  target = pathlib.Path(os.path.realpath(file))
  homes = [home]
  if home.parent.name == "snapshots" and home.parts[-3].startswith("models--"):
    homes.append(home.parents[1] / "blobs")
  if any(target.is_relative_to(place) for place in homes):
    return None
  return str(target)


def matching(expression: str, names: Sequence[str]) -> list[str]:
  """The names that an expression matches whole, found within limits.

  Raises:
    ValueError: no expression, or one that takes more time than it may.
  """
  target = f"{__name__}:match_here"
  pool = workers.Workers(target, count=1, limits=_LIMITS, quiet=True)
  try:
    (outcome,) = pool.map([[expression, list(names)]])
  finally:
    pool.close()
  if outcome.reason:
    raise ValueError(outcome.reason)
  return outcome.value


def match_here(expression: str, names: Sequence[str]) -> list[str]:
  """`matching` in this process, without limits: what the worker calls."""
  compiled = re.compile(expression)
  return [name for name in names if compiled.fullmatch(name)]
