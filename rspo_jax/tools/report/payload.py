"""What the page of a report shows: curves, completions, points, times.

The rows of metrics.jsonl become columns, thinned to what a screen shows, and go
with a few completions into one object that the page's script reads.
"""

import collections
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rspo_jax.config import identity
from rspo_jax.tools.report.runs import (
  FREE_KEYS,
  Group,
  Run,
  changes,
  json_lines,
  with_compute,
)
from rspo_jax.tools.report.statistics import KINDS, rounded, summarise

# Numbers in all the curves of a page: at about 7 bytes each, 1.2 MB.
_CURVE_NUMBERS = 170_000
_POINTS = (60, 600)  # fewest and most points of a curve
_PAIRS = 600  # completions shown before and after, over all runs
_PAIRS_PER_RUN = (3, 24)
_SCATTER_POINTS = 400  # of each calibration file
_TEXT_LIMIT = 800  # characters of a prompt or completion
# Right before and after, in the order in which completions are picked.
_CHANGES = ((False, True), (True, False), (False, False), (True, True))


# Curves.


def columns(
  rows: Sequence[Mapping[str, Any]], width: int
) -> dict[str, list[float | None]]:
  """Rows of training steps as columns, means over `width` steps at a time.

  A bin ends at a multiple of `width`, so that the bins of all seeds agree; the
  counters `x/...` keep the bin's last value, as its step does.
  """
  keys = sorted(
    {key for row in rows for key in row if not key.startswith("eval/")}
    - {"step"}
  )
  bins: dict[int, list] = {}
  for row in rows:
    if row["step"] > 0:
      bins.setdefault(-(-row["step"] // width), []).append(row)
  out: dict[str, list] = {
    "step": [
      min(index * width, found[-1]["step"]) for index, found in bins.items()
    ]
  }
  for key in keys:
    column = []
    for found in bins.values():
      values = [row[key] for row in found if rounded(row.get(key)) is not None]
      if key.startswith("x/"):
        values = values[-1:]
      column.append(rounded(float(np.mean(values))) if values else None)
    if any(value is not None for value in column):
      out[key] = column
  return out


def _verdict(row: Mapping[str, Any]) -> dict[str, Any]:
  """The verifier's verdict in a row of samples; {} where it is damaged."""
  verdict = row.get("verdict")
  return verdict if isinstance(verdict, dict) else {}


def _means(dicts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """Mean of each key over dicts, of what is a number."""
  values = collections.defaultdict(list)
  for found in dicts:
    for key, value in found.items():
      if rounded(value) is not None:
        values[key].append(value)
  return {key: rounded(float(np.mean(found))) for key, found in values.items()}


def mean_parts(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """Mean of each reward part over rows of samples."""
  return _means(_verdict(row).get("parts") or {} for row in rows)


def sparse(run: Run) -> dict[str, dict[str, list]]:
  """Series of few points: evaluations, and parts of sampled rewards."""
  out: dict[str, dict[str, list]] = {}

  def add(key, step, value):
    value = rounded(value)
    if value is not None:
      series = out.setdefault(key, {"step": [], "value": []})
      series["step"].append(step)
      series["value"].append(value)

  for row in run.rows:
    for key, value in row.items():
      if key.startswith("eval/"):
        add(key, row["step"], value)
  folder = run.folder / "samples"
  for path in sorted(folder.glob("train-*.jsonl")):
    match = re.fullmatch(r"train-(\d+)", path.stem)
    if match:
      for key, value in mean_parts(json_lines(path)).items():
        add(f"parts/{key}", int(match.group(1)), value)
  return out


# Pieces of the page.


def _cut(text: str) -> str:
  """A text of bounded length."""
  if len(text) <= _TEXT_LIMIT:
    return text
  return f"{text[:_TEXT_LIMIT]} … ({len(text) - _TEXT_LIMIT:,} more characters)"


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
  """What the page shows of a completion."""
  out = {
    "text": _cut(row["completion"]),
    "correct": bool(row.get("correct")),
    "reward": rounded(row.get("reward")),
    "reason": _cut(str(_verdict(row).get("reason", ""))),
  }
  pieces, steps = row.get("pieces"), row.get("commit_step")
  if (
    isinstance(pieces, list)
    and isinstance(steps, list)
    and 0 < len(pieces) == len(steps) <= _TEXT_LIMIT
    and all(type(step) is int for step in steps)
  ):
    out["pieces"] = [str(piece) for piece in pieces]
    out["commit_step"] = steps
  return out


def pairs(run: Run, count: int) -> dict[str, list]:
  """Completions of the same prompts before and after, by kind.

  Prompts whose verdict changed come first, then those it did not.
  """
  out: dict[str, list] = {}
  if not run.before_and_after:
    return out
  for kind in KINDS:
    first, last = (
      {row["index"]: row for row in run.completions(step, kind)}
      for step in run.before_and_after
    )
    indices: dict[tuple, list] = {change: [] for change in _CHANGES}
    for index in sorted(first.keys() & last.keys()):
      right = (bool(row[index].get("correct")) for row in (first, last))
      indices[tuple(right)].append(index)
    # In turn, one of each kind of change.
    rounds = itertools.zip_longest(*indices.values())
    picked = [index for turn in rounds for index in turn if index is not None]
    out[kind] = [
      {
        "index": index,
        "prompt": _cut(str(last[index].get("prompt", ""))),
        "before": _shown(first[index]),
        "after": _shown(last[index]),
      }
      for index in picked[:count]
    ]
  return {kind: found for kind, found in out.items() if found}


def scatter(run: Run) -> list[dict[str, Any]]:
  """Points of samples/calibration-*.jsonl, the first, a middle and the last.

  The regression is over all rows of a file; points are thinned.
  """
  folder = run.folder / "samples"
  paths = sorted(folder.glob("calibration-*.jsonl"))
  if len(paths) > 3:
    paths = [paths[0], paths[round((len(paths) - 1) / 2)], paths[-1]]
  out = []
  for path in paths:
    match = re.fullmatch(r"calibration-(\d+)", path.stem)
    points = np.array(
      [
        (row["target"], row["estimate"])
        for row in json_lines(path)
        if rounded(row.get("target")) is not None
        and rounded(row.get("estimate")) is not None
      ],
      np.float64,
    ).reshape(-1, 2)
    if not match or len(points) < 2:
      continue
    x, y = points.T
    slope = intercept = correlation = None
    if x.std() > 0:
      slope = float(((x - x.mean()) * (y - y.mean())).mean() / x.var())
      intercept = float(y.mean() - slope * x.mean())
      if y.std() > 0:
        correlation = slope * float(x.std() / y.std())
    kept = points[:: -(-len(points) // _SCATTER_POINTS)]
    out.append(
      {
        "step": int(match.group(1)),
        "n": len(points),
        "slope": rounded(slope),
        "intercept": rounded(intercept),
        "correlation": rounded(correlation),
        "points": [[rounded(float(v)) for v in point] for point in kept],
      }
    )
  return out


def phases(run: Run) -> dict[str, float]:
  """Mean seconds a step of each phase, without the first step's compilation.

  What no phase accounts for is "other"; "first step" is that step as a whole.
  """
  rows = [row for row in run.rows if rounded(row.get("time/step_s"))]
  if not rows:
    return {}
  first, rest = rows[0], rows[1:] or rows
  keys = sorted(
    {key for row in rest for key in row if re.fullmatch(r"time/\w+_s", key)}
    - {"time/step_s"}
  )
  out = {
    key.removeprefix("time/").removesuffix("_s"): float(
      np.mean([row.get(key) or 0.0 for row in rest])
    )
    for key in keys
  }
  step = float(np.mean([row["time/step_s"] for row in rest]))
  out["other"] = max(0.0, step - sum(out.values()))
  out["first step"] = float(first["time/step_s"])
  return {key: rounded(value) for key, value in out.items()}


def _number_of_points(groups: Sequence[Group]) -> int:
  """Points a curve, so that the page stays small."""
  runs = [run for group in groups for run in group.runs]
  keys = len({key for run in runs for row in run.rows[-1:] for key in row})
  fewest, most = _POINTS
  return max(
    fewest, min(most, _CURVE_NUMBERS // max(1, len(runs) * max(1, keys)))
  )


def payload(groups: Sequence[Group], notes: Sequence[str]) -> dict[str, Any]:
  """Everything that the page's script reads."""
  runs = [run for group in groups for run in group.runs]
  longest = max(run.rows[-1]["step"] for run in runs)
  width = max(1, -(-longest // _number_of_points(groups)))
  fewest, most = _PAIRS_PER_RUN
  count = max(fewest, min(most, _PAIRS // (len(KINDS) * len(runs))))
  table, differences = summarise(groups)
  out_groups = []
  for group, row, particular, versus in zip(
    groups, table, changes(groups), differences, strict=True
  ):
    out_runs = []
    parts: dict[str, list] = {"before": [], "after": []}
    for run in group.runs:
      out_runs.append(
        {
          "seed": run.seed,
          "folder": run.folder.name,
          "step": run.rows[-1]["step"],
          "steps": run.config.get("run.steps"),
          "finished": run.summary is not None,
          "columns": columns(with_compute(run), width),
          "sparse": sparse(run),
          "pairs": pairs(run, count),
          "scatter": scatter(run),
          "phases": phases(run),
        }
      )
      if run.before_and_after:
        for when, step in zip(parts, run.before_and_after, strict=True):
          parts[when].append(mean_parts(run.completions(step, "greedy")))
    out_groups.append(
      {
        "name": group.name,
        "changes": particular,
        "objective": group.config.get("objective.name"),
        "lambda": group.config.get("objective.lambda_"),
        "unit": group.config.get("objective.lambda_unit"),
        "masks": group.config.get("likelihood.masks"),
        "split": group.config.get("eval.split"),
        "task": group.config.get("task.name"),
        "summary": row,
        "versus": versus,
        "parts": {when: _means(found) for when, found in parts.items()},
        "runs": out_runs,
      }
    )
  return {
    "groups": out_groups,
    "bin": width,
    "config": {
      key: value
      for key, value in sorted(groups[0].config.items())
      if key not in FREE_KEYS
      and all(group.config.get(key) == value for group in groups)
    },
    "environment": _shared_environment(runs),
    "notes": list(notes),
  }


def _shared_environment(runs: Sequence[Run]) -> dict[str, list[str]]:
  """The values of each key of environment.json over the runs."""
  out: dict[str, list[str]] = {}
  for run in runs:
    for key, value in identity.flat(run.environment).items():
      text = value if isinstance(value, str) else json.dumps(value)
      found = out.setdefault(key, [])
      if text not in found:
        found.append(text)
  return out
