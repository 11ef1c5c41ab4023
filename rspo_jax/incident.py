"""What a run does about numbers that are not numbers.

1. The update itself refuses a step whose loss, gradient or scores are not
   finite (train_step.py): parameters and moments stay as they were.
2. `write` puts what the step was made of into `incident/step_00000004/`:
   `incident.json` (values, seed, random keys, texts) and one
   `arrays-<process>.safetensors` a process. `load` reads it back, so that the
   step can be computed again, elsewhere and under a debugger.
3. `Tally` counts: steps that were not applied, how many of them in a row, and
   degenerate batches. It travels in the checkpoint: a run that is interrupted
   amid a bad stretch counts on.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

FOLDER = "incident"
RECORD = "incident.json"
# Folders of a run: the first ones tell the story, and a run that goes on
# through thousands of bad steps should not fill the disk with them.
KEPT = 20


class IncidentError(Exception):
  """Too many steps in a row were not finite; names the last good state."""


@dataclasses.dataclass
class Tally:
  """Counts of a run's mishaps.

  Attributes:
    not_finite: steps that were not applied because something was not finite.
    in_a_row: how many of them are the latest steps.
    applied: of those in a row, how many were applied all the same (only a
      metric was not finite): what came of them is not known to be good.
    wasted: what those in a row have cost, in forwards of one sequence.
    degenerate: steps whose batch had nothing to tell apart: all rewards of
      every group equal, all completions empty, or no sequence kept.
  """

  not_finite: int = 0
  in_a_row: int = 0
  applied: int = 0
  wasted: float = 0.0
  degenerate: int = 0

  def count(
    self,
    bad: Mapping[str, float],
    values: Mapping[str, float],
    cost: float = 0.0,
  ) -> dict[str, int]:
    """Counts one step in.

    Args:
      bad: what `not_finite` found.
      values: metrics of the step.
      cost: of the step, in forwards of one sequence.

    Returns:
      The counts so far, as metrics.
    """
    self.not_finite += bool(bad)
    self.in_a_row = self.in_a_row + 1 if bad else 0
    self.wasted = self.wasted + cost if bad else 0.0
    applied = values.get("update/applied") != 0.0
    self.applied = self.applied + applied if bad else 0
    self.degenerate += is_degenerate(values)
    return {
      "faults/not_finite": self.not_finite,
      "faults/degenerate": self.degenerate,
    }


def is_degenerate(values: Mapping[str, float]) -> bool:
  """Whether a step's batch had nothing to tell apart."""
  return (
    values.get("reward/equal_groups") == 1.0
    or values.get("rollout/empty_share") == 1.0
    or values.get("update/kept_share") == 0.0
  )


def not_finite(values: Mapping[str, float]) -> dict[str, float]:
  """Metrics of a step that are no numbers, or that not all was applied."""
  bad = {key: v for key, v in values.items() if not math.isfinite(v)}
  if (
    not bad
    and values.get("update/applied", 1.0) < 1.0
    and values.get("update/kept_share", 1.0) > 0.0
  ):
    bad["update/applied"] = values["update/applied"]
  return bad


def encode(values: Mapping[str, float] | None) -> dict[str, Any] | None:
  """Metrics as JSON can say them: "nan" and "inf" as text."""
  if values is None:
    return None
  return {k: v if math.isfinite(v) else str(v) for k, v in values.items()}


def decode(values: Mapping[str, Any] | None) -> dict[str, float] | None:
  """The inverse of `encode`."""
  if values is None:
    return None
  return {k: float(v) if isinstance(v, str) else v for k, v in values.items()}


def folder_of(workdir: str | os.PathLike, step: int) -> pathlib.Path:
  """Where the incident of a step is kept."""
  return pathlib.Path(workdir) / FOLDER / f"step_{step:08d}"


def write(
  folder: pathlib.Path, record: Mapping[str, Any], arrays: Any
) -> str | None:
  """Writes this process's part of an incident.

  Args:
    folder: of the step (`folder_of`).
    record: JSON; written by process 0.
    arrays: any pytree of arrays; of those that are split over processes, each
      writes its rows, and what several hold the first of them.

  Returns:
    None, or one line saying why nothing more is there: enough incidents are
    kept already, or the disk refuses. A run does not stop for either.
  """
  from safetensors import numpy as safetensors

  try:
    others = [p for p in folder.parent.glob("step_*") if p.name != folder.name]
    if len(others) >= KEPT:
      return f"{folder.parent} holds {KEPT} incidents; no more are written."
    folder.mkdir(parents=True, exist_ok=True)
    flat, _ = jax.tree_util.tree_flatten_with_path(arrays)
    rows = {
      jax.tree_util.keystr(path, simple=True, separator="."): _local(leaf)
      for path, leaf in flat
    }
    name = f"arrays-{jax.process_index()}.safetensors"
    safetensors.save_file(rows, folder / name)
    if jax.process_index() == 0:
      text = json.dumps(dict(record), indent=2, allow_nan=False)
      (folder / RECORD).write_text(text + "\n", encoding="utf-8")
  except OSError as error:
    return f"The incident could not be written to {folder}: {error}."
  return None


def load(
  folder: str | os.PathLike,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Reads an incident back: its record, and its arrays by name.

  Rows of several processes are joined in their order.
  """
  from safetensors import numpy as safetensors

  folder = pathlib.Path(folder)
  record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
  parts = [
    safetensors.load_file(folder / f"arrays-{index}.safetensors")
    for index in range(record["processes"])
  ]
  arrays = {
    name: np.concatenate([part[name] for part in parts])
    if parts[0][name].ndim
    else parts[0][name]
    for name in parts[0]
  }
  return record, arrays


def _local(leaf: Any) -> np.ndarray:
  """What this process writes of an array: each row is one process's."""
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    return np.ascontiguousarray(leaf)
  if leaf.ndim == 0:
    return np.asarray(leaf.addressable_data(0))
  first = [s for s in leaf.addressable_shards if s.replica_id == 0]
  first.sort(key=lambda shard: shard.index[0].start or 0)
  parts = [np.asarray(shard.data) for shard in first]
  return np.concatenate([np.empty((0, *leaf.shape[1:]), leaf.dtype), *parts])
