"""Runs as a report sees them: found, read, gathered into groups.

Folders are searched for runs (`config.json` beside `metrics.jsonl`). Runs whose
configs differ in the seed alone are a group: one line of a chart, one row of
the table.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rspo_jax.config import identity, schema
from rspo_jax.reporting import metrics

_CHILD_DEPTH = 3
_SKIPPED_FOLDERS = ("checkpoints", "model", "samples", "tensorboard", "eval")
# Keys by which runs of one group may differ.
FREE_KEYS = {"run.seed", *schema.FREE_KEYS}


@dataclasses.dataclass(eq=False)
class Run:
  """What one folder holds.

  Attributes:
    folder: of the run.
    config: flat, {"group.key": value}.
    rows: of metrics.jsonl, by step.
    summary: of a finished run, else None.
    entry: its name in the sweep it belongs to, or "".
    environment: of environment.json, {} without one.
  """

  folder: pathlib.Path
  config: dict[str, Any]
  rows: list[dict[str, Any]]
  summary: dict[str, Any] | None
  entry: str = ""
  environment: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def seed(self) -> int:
    """Value of run.seed."""
    return self.config.get("run.seed", 0)

  @property
  def evaluated(self) -> list[int]:
    """Steps with an evaluation."""
    return [row["step"] for row in self.rows if "eval/accuracy" in row]

  @functools.cached_property
  def before_and_after(self) -> tuple[int, int] | None:
    """Steps of the first and last evaluation; None with fewer than two."""
    steps = self.evaluated
    return (steps[0], steps[-1]) if len(steps) > 1 else None

  def row(self, step: int) -> dict[str, Any]:
    """The row of a step."""
    return next(row for row in self.rows if row["step"] == step)

  @functools.lru_cache(maxsize=8)  # noqa: B019 - a run lives for one page
  def completions(self, step: int, kind: str) -> tuple[dict, ...]:
    """Rows of an evaluation's samples, by prompt; () without the file."""
    name = f"eval-{step:06d}-{kind}.jsonl"
    rows = [
      row
      for row in json_lines(self.folder / "samples" / name)
      if isinstance(row.get("completion"), str) and "index" in row
    ]
    return tuple(sorted(rows, key=lambda row: row["index"]))


@dataclasses.dataclass
class Group:
  """Runs whose configs differ in the seed alone.

  Attributes:
    name: short; says what is particular about it.
    runs: by seed.
  """

  name: str
  runs: list[Run]

  @property
  def config(self) -> dict[str, Any]:
    """The config that its runs share, but for the seed."""
    return self.runs[0].config


def json_lines(path: pathlib.Path) -> Iterable[dict[str, Any]]:
  """The objects of a JSON-lines file; what is no object is passed over."""
  if not path.is_file():
    return
  with path.open("rb") as file:
    for line in file:
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if isinstance(row, dict):
        yield row


def json_object(path: pathlib.Path) -> dict[str, Any] | None:
  """A JSON file's object; None if it has none."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) else None


def _natural(path: pathlib.Path) -> list:
  """Sort key by which seed10 comes after seed9."""
  return [
    (1, int(part), "") if part.isdigit() else (0, 0, part)
    for part in re.split(r"(\d+)", str(path))
  ]


def find_runs(folder: pathlib.Path) -> list[pathlib.Path]:
  """Folders of runs at or below a folder, in the order of their names.

  Raises:
    ValueError: it does not exist or holds none.
  """
  if not folder.is_dir():
    raise ValueError(
      f"{folder} is not a folder; give a run's folder or a sweep's."
    )
  found, level = [], [folder]
  for _ in range(_CHILD_DEPTH + 1):
    below = []
    for path in level:
      if (path / "config.json").is_file() and (
        path / "metrics.jsonl"
      ).is_file():
        found.append(path)
        continue
      try:
        below += [
          child
          for child in path.iterdir()
          if child.is_dir() and child.name not in _SKIPPED_FOLDERS
        ]
      except PermissionError:
        continue
    level = below
  if not found:
    raise ValueError(
      f"{folder} holds no run (a folder with config.json and metrics.jsonl); "
      "give a run's folder or a sweep's."
    )
  # A sweep lists its runs in the order of its entries.
  listed: dict[pathlib.Path, int] = {}
  for parent in dict.fromkeys(path.parent for path in found):
    for row in sweep_rows(parent):
      listed.setdefault(parent / str(row.get("workdir")), len(listed))
  return sorted(
    found, key=lambda path: (listed.get(path, len(listed)), _natural(path))
  )


def sweep_rows(folder: pathlib.Path) -> list[dict[str, Any]]:
  """How the runs of a sweep's folder stand; [] of any other folder."""
  runs = (json_object(folder / "sweep.json") or {}).get("runs")
  if not isinstance(runs, dict):
    return []
  return [row for row in runs.values() if isinstance(row, dict)]


def read_run(folder: pathlib.Path) -> Run:
  """Reads a run's folder.

  Raises:
    ValueError: its config is damaged or it has no rows yet.
  """
  config = json_object(folder / "config.json")
  if config is None:
    raise ValueError(f"{folder}: config.json is damaged")
  rows = {}
  for row in metrics.read_rows(folder / "metrics.jsonl"):
    rows.setdefault(row["step"], row)
  if not rows:
    raise ValueError(f"{folder}: metrics.jsonl has no rows yet")
  entry = ""
  for row in sweep_rows(folder.parent):
    if row.get("workdir") == folder.name:
      entry = str(row.get("entry", ""))
  return Run(
    folder=folder,
    config=identity.flat(config),
    rows=[rows[step] for step in sorted(rows)],
    summary=json_object(folder / "summary.json"),
    entry=entry,
    environment=json_object(folder / "environment.json") or {},
  )


def group_runs(runs: Sequence[Run]) -> list[Group]:
  """Gathers runs whose configs differ in the seed (or in outputs) alone."""
  by_config = collections.defaultdict(list)
  for run in runs:
    fixed = {k: v for k, v in run.config.items() if k not in FREE_KEYS}
    by_config[json.dumps(fixed, sort_keys=True)].append(run)
  groups = [
    Group("", sorted(found, key=lambda run: (run.seed, str(run.folder))))
    for found in by_config.values()
  ]
  particular = changes(groups)
  names = []
  for group, values in zip(groups, particular, strict=True):
    entries = {run.entry for run in group.runs}
    name = entries.pop() if len(entries) == 1 else ""
    if not name and values and len(values) <= 3:
      name = ", ".join(
        f"{key.split('.')[-1].strip('_')}={value}"
        for key, value in values.items()
      )
    names.append(
      name or re.sub(r"[-_]?seed\d+$", "", group.runs[0].folder.name)
    )
  for index, group in enumerate(groups):
    same = names[: index + 1].count(names[index])
    twice = names.count(names[index]) > 1
    group.name = f"{names[index]} ({same})" if twice else names[index]
  return groups


def changes(groups: Sequence[Group]) -> list[dict[str, Any]]:
  """What of each group's config is not what most groups have.

  Keys that have come since a run began stood at their defaults then.
  """
  keys = sorted({key for group in groups for key in group.config} - FREE_KEYS)
  defaults = identity.defaults()

  def value_of(group, key):
    return group.config.get(key, defaults.get(key))

  out: list[dict[str, Any]] = [{} for _ in groups]
  for key in keys:
    values = [json.dumps(value_of(g, key), sort_keys=True) for g in groups]
    if len(set(values)) == 1:
      continue
    usual = collections.Counter(values).most_common(1)[0]
    for found, group, value in zip(out, groups, values, strict=True):
      # Where every group has its own value, each is particular.
      if usual[1] == 1 or value != usual[0]:
        found[key] = value_of(group, key)
  return out


def with_compute(run: Run) -> list[dict[str, Any]]:
  """Rows with seconds, forwards of a sequence and share of the target so far.

  The share is slope times lambda: 1 where estimates meet their targets.
  """
  lambda_ = run.config.get("objective.lambda_", 0.0)
  seconds = forwards = 0.0
  out = []
  for row in run.rows:
    seconds += row.get("time/step_s") or 0.0
    forwards = row.get("compute/cumulative") or forwards
    row = row | {"x/seconds": seconds, "x/forwards": forwards}
    slope = row.get("calibration/slope")
    if slope is not None and lambda_:
      row["calibration/target_share"] = slope * lambda_
    out.append(row)
  return out
