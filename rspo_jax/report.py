"""Makes one self-contained HTML page of what runs wrote into their folders.

    python launch/report.py runs/ablation --out=report.html

1. Folders are searched for runs (`config.json` beside `metrics.jsonl`). Runs
   whose configs differ in the seed alone are a group: one line of a chart, one
   row of the table.
2. Accuracies before and after come with 95 % bootstrap intervals over seeds
   and prompts together: a replicate draws seeds with replacement, prompts with
   replacement, and takes the mean of the crossed table [seed, prompt] of
   verdicts. All replicates share their draws, so that a gain, or a difference
   of two groups on the same prompts, is paired by seed and by prompt. With one
   seed the interval is over prompts alone. A bootstrap over S seeds sees
   (S - 1) / S of their variance: with few seeds it is a lower bound.
3. The rows of metrics.jsonl become columns, thinned to what a screen shows,
   and go with a few completions into a template whose script draws them. The
   page asks nothing of a network.

Compute is counted in denoiser forwards of a sequence: the sampler's calls, one
per mask and score, and three per mask for the update (a backward pass costs
two), where a run does not log `compute/cumulative` itself.
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rspo_jax import metrics, run_config
from rspo_jax import options as options_lib

DONE, MISTAKE, FAULT = 0, 2, 3
REPLICATES = 2000
KINDS = ("greedy", "sampled")

_ASSETS = pathlib.Path(__file__).parent / "assets"
# Numbers in all the curves of a page: at about 7 bytes each, 1.2 MB.
_CURVE_NUMBERS = 170_000
_POINTS = (60, 600)  # fewest and most points of a curve
_PAIRS = 600  # completions shown before and after, over all runs
_PAIRS_PER_RUN = (3, 24)
_SCATTER_POINTS = 400  # of each calibration file
_SCATTER_FILES = 3  # of each run: first, middle, last
_TEXT_LIMIT = 800  # characters of a prompt or completion
_CHILD_DEPTH = 3
_SKIPPED_FOLDERS = ("checkpoints", "model", "samples", "tensorboard", "eval")
# Keys by which runs of one group may differ.
_FREE_KEYS = {"run.seed", *run_config.FREE_KEYS}
# Keys that have to agree for two groups to be paired by prompt.
_PAIRING_KEYS = ("task.", "data.", "eval.")


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
      for row in _json_lines(self.folder / "samples" / name)
      if isinstance(row.get("completion"), str)
    ]
    return tuple(sorted(rows, key=lambda row: row.get("index", 0)))


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


# Reading.


def _json_lines(path: pathlib.Path) -> Iterable[dict[str, Any]]:
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


def _json_object(path: pathlib.Path) -> dict[str, Any] | None:
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
    for row in _sweep_rows(parent):
      listed.setdefault(parent / str(row.get("workdir")), len(listed))
  return sorted(
    found, key=lambda path: (listed.get(path, len(listed)), _natural(path))
  )


def _sweep_rows(folder: pathlib.Path) -> list[dict[str, Any]]:
  """How the runs of a sweep's folder stand; [] of any other folder."""
  runs = (_json_object(folder / "sweep.json") or {}).get("runs")
  if not isinstance(runs, dict):
    return []
  return [row for row in runs.values() if isinstance(row, dict)]


def read_run(folder: pathlib.Path) -> Run:
  """Reads a run's folder.

  Raises:
    ValueError: its config is damaged or it has no rows yet.
  """
  config = _json_object(folder / "config.json")
  if config is None:
    raise ValueError(f"{folder}: config.json is damaged")
  rows = {}
  for row in metrics.read_rows(folder / "metrics.jsonl"):
    rows.setdefault(row["step"], row)
  if not rows:
    raise ValueError(f"{folder}: metrics.jsonl has no rows yet")
  entry = ""
  for row in _sweep_rows(folder.parent):
    if row.get("workdir") == folder.name:
      entry = str(row.get("entry", ""))
  return Run(
    folder=folder,
    config=run_config.flat(config),
    rows=[rows[step] for step in sorted(rows)],
    summary=_json_object(folder / "summary.json"),
    entry=entry,
    environment=_json_object(folder / "environment.json") or {},
  )


def group_runs(runs: Sequence[Run]) -> list[Group]:
  """Gathers runs whose configs differ in the seed (or in outputs) alone."""
  by_config = collections.defaultdict(list)
  for run in runs:
    fixed = {k: v for k, v in run.config.items() if k not in _FREE_KEYS}
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
  """What of each group's config is not what most groups have."""
  keys = sorted({key for group in groups for key in group.config} - _FREE_KEYS)
  out: list[dict[str, Any]] = [{} for _ in groups]
  for key in keys:
    values = [json.dumps(g.config.get(key), sort_keys=True) for g in groups]
    if len(set(values)) == 1:
      continue
    usual = collections.Counter(values).most_common(1)[0]
    for found, group, value in zip(out, groups, values, strict=True):
      # Where every group has its own value, each is particular.
      if usual[1] == 1 or value != usual[0]:
        found[key] = group.config.get(key)
  return out


# Curves.


def with_compute(run: Run) -> list[dict[str, Any]]:
  """Rows with seconds, denoiser forwards and share of the target so far.

  The share is slope times lambda: 1 where estimates meet their targets.
  """
  config = run.config
  sequences = config.get("rollout.prompts", 0) * config.get(
    "rollout.group_size", 1
  )
  masks = config.get("likelihood.masks", 0)
  lambda_ = config.get("objective.lambda_", 0.0)
  two = (
    config.get("train.passes") == "two"
    or config.get("train.micro_masks", 0) not in (0, masks)
    or (
      config.get("objective.centring") == "batch"
      and config.get("train.micro_batch") != sequences
    )
  )
  seconds = forwards = 0.0
  out = []
  for row in run.rows:
    scored = 3 + ("score/relative_std" in row) + two
    kept = row.get("update/kept_share") or 0.0
    if "update/kept_share" not in row:
      kept = 1.0
    of_step = sequences * (
      (row.get("rollout/denoiser_calls") or 0) + kept * masks * scored
    )
    if "loss" not in row and "time/step_s" not in row:
      of_step = 0.0  # an evaluation alone
    seconds += row.get("time/step_s") or 0.0
    forwards = row.get("compute/cumulative") or forwards + of_step
    row = row | {"x/seconds": seconds, "x/forwards": forwards}
    slope = row.get("calibration/slope")
    if slope is not None and lambda_:
      row["calibration/target_share"] = slope * lambda_
    out.append(row)
  return out


def _rounded(value: Any) -> float | int | None:
  """Five digits of a number; None where it is none."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  if not math.isfinite(value):
    return None
  return value if isinstance(value, int) else float(f"{value:.5g}")


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
      values = [row[key] for row in found if _rounded(row.get(key)) is not None]
      if key.startswith("x/"):
        values = values[-1:]
      column.append(_rounded(float(np.mean(values))) if values else None)
    if any(value is not None for value in column):
      out[key] = column
  return out


def _parts(row: Mapping[str, Any]) -> dict[str, float]:
  """Reward parts of a row of samples."""
  verdict = row.get("verdict")
  parts = verdict.get("parts") if isinstance(verdict, dict) else None
  parts = parts or row.get("parts")
  if not isinstance(parts, dict):
    return {}
  return {
    str(key): float(value)
    for key, value in parts.items()
    if _rounded(value) is not None
  }


def _reason(row: Mapping[str, Any]) -> str:
  """The verifier's reason in a row of samples."""
  verdict = row.get("verdict")
  if isinstance(verdict, dict) and "reason" in verdict:
    return str(verdict["reason"])
  return str(row.get("reason", ""))


def mean_parts(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """Mean of each reward part over rows of samples."""
  values = collections.defaultdict(list)
  for row in rows:
    for key, value in _parts(row).items():
      values[key].append(value)
  return {key: float(np.mean(found)) for key, found in values.items()}


def sparse(run: Run) -> dict[str, dict[str, list]]:
  """Series of few points: evaluations, and parts of sampled rewards."""
  out: dict[str, dict[str, list]] = {}

  def add(key, step, value):
    value = _rounded(value)
    if value is not None:
      series = out.setdefault(key, {"step": [], "value": []})
      series["step"].append(step)
      series["value"].append(value)

  for row in run.rows:
    for key, value in row.items():
      if key.startswith("eval/"):
        add(key, row["step"], value)
  folder = run.folder / "samples"
  for path in sorted(folder.glob("train-*.jsonl")) if folder.is_dir() else ():
    match = re.fullmatch(r"train-(\d+)", path.stem)
    if match:
      for key, value in mean_parts(_json_lines(path)).items():
        add(f"parts/{key}", int(match.group(1)), value)
  return out


# Intervals.


class Bootstrap:
  """Replicates over seeds and prompts whose draws all groups share."""

  def __init__(self, replicates: int = REPLICATES, seed: int = 0):
    self.replicates = replicates
    self._seed = seed
    self._weights: dict[tuple[str, int], np.ndarray] = {}

  def _draws(self, what: str, n: int) -> np.ndarray:
    """Weights of n things in each replicate, [R, n]; rows sum to 1."""
    key = (what, n)
    if key not in self._weights:
      rng = np.random.default_rng([self._seed, len(what), n])
      self._weights[key] = (
        rng.multinomial(n, np.full(n, 1 / n), self.replicates) / n
      ).astype(np.float32)
    return self._weights[key]

  def means(self, table: np.ndarray) -> np.ndarray:
    """Mean of a table [S seeds, n prompts] in each replicate, f32 [R]."""
    seeds, n = table.shape
    by_prompt = self._draws("seed", seeds) @ table.astype(np.float32)
    return np.einsum("rn,rn->r", by_prompt, self._draws("prompts", n))


def interval(replicates: np.ndarray) -> tuple[float, float]:
  """The central 95 % of replicates (percentile bootstrap)."""
  low, high = np.quantile(replicates, (0.025, 0.975))
  return float(low), float(high)


# Two-sided 95 % quantile of Student's t by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
  """95 % interval of the mean of a few values; None for one."""
  n = len(values)
  if n < 2:
    return None
  quantile = _T[n - 2] if n - 2 < len(_T) else 1.96 + 2.4 / (n - 1)
  half = quantile * np.std(values, ddof=1) / math.sqrt(n)
  return float(np.mean(values) - half), float(np.mean(values) + half)


def verdict_table(runs: Sequence[Run], when: int, kind: str):
  """Verdicts [S, n] before (0) or after (1); None where files are missing.

  Rows are seeds, columns the prompts that all of them were evaluated on.
  """
  by_run = [
    {
      row.get("index", place): bool(row.get("correct"))
      for place, row in enumerate(
        run.completions(run.before_and_after[when], kind)
      )
    }
    for run in runs
  ]
  if not by_run or not all(by_run):
    return None
  shared = sorted(set.intersection(*(set(found) for found in by_run)))
  if not shared:
    return None
  return np.array([[found[i] for i in shared] for found in by_run])


def _estimate(value: float, ends: tuple[float, float] | None) -> list:
  """[value, low, high] as JSON takes it."""
  low, high = ends or (None, None)
  return [_rounded(float(value)), _rounded(low), _rounded(high)]


def _logged(runs: Sequence[Run], when: int, kind: str) -> list:
  """Accuracy from metrics.jsonl, where the completions are not at hand."""
  end = "" if kind == "greedy" else "_sampled"
  rows = [run.row(run.before_and_after[when]) for run in runs]
  values = [
    row[f"eval/accuracy{end}"]
    for row in rows
    if _rounded(row.get(f"eval/accuracy{end}")) is not None
  ]
  if not values:
    return [None, None, None]
  ends = t_interval(values)
  low, high = (rows[0].get(f"eval/ci_{side}{end}") for side in ("low", "high"))
  if len(values) == 1 and low is not None and high is not None:
    ends = (low, high)
  return _estimate(float(np.mean(values)), ends)


def summarise(groups: Sequence[Group]) -> tuple[list[dict], list[dict]]:
  """Table rows of the groups, and their paired differences.

  Returns:
    (rows, differences): a row has before, after and gain of each kind as
    [value, low, high]; `differences[i][kind][j]` is the accuracy after of
    group i minus that of group j, None where their prompts are not the same.
  """
  bootstrap = Bootstrap()
  rows, after = [], []
  for group in groups:
    runs = [run for run in group.runs if run.before_and_after]
    row: dict[str, Any] = {"runs": len(runs)}
    found: dict[str, Any] = {}
    for kind in KINDS:
      if not runs:
        break
      tables = [verdict_table(runs, when, kind) for when in (0, 1)]
      if all(table is not None for table in tables) and (
        tables[0].shape == tables[1].shape
      ):
        means = [bootstrap.means(table) for table in tables]
        ends = [interval(replicates) for replicates in means]
        values = [float(table.mean()) for table in tables]
        row[kind] = {
          "before": _estimate(values[0], ends[0]),
          "after": _estimate(values[1], ends[1]),
          "gain": _estimate(
            values[1] - values[0], interval(means[1] - means[0])
          ),
          "n": int(tables[1].shape[1]),
          "how": "bootstrap over prompts"
          if len(runs) == 1
          else "bootstrap over seeds and prompts",
        }
        found[kind] = (values[1], means[1], tables[1].shape)
      else:
        first, last = (_logged(runs, when, kind) for when in (0, 1))
        gain = None
        if first[0] is not None and last[0] is not None:
          gain = _rounded(last[0] - first[0])
        row[kind] = {
          "before": first,
          "after": last,
          "gain": [gain, None, None],
          "n": None,
          "how": "Wilson" if len(runs) == 1 else "Student's t over seeds",
        }
    rows.append(row)
    after.append(found)
  return rows, _differences(groups, after)


def _differences(groups, after) -> list[dict]:
  """Paired differences of the accuracies after, group by group."""

  def prompts(group):
    return {
      key: value
      for key, value in group.config.items()
      if key.startswith(_PAIRING_KEYS)
    }, [run.seed for run in group.runs if run.before_and_after]

  keys = [prompts(group) for group in groups]
  out = []
  for i, mine in enumerate(after):
    by_kind: dict[str, list] = {}
    for kind in KINDS:
      cells = []
      for j, other in enumerate(after):
        paired = (
          kind in mine
          and kind in other
          and keys[i] == keys[j]
          and mine[kind][2] == other[kind][2]
        )
        if not paired or i == j:
          cells.append(None)
          continue
        cells.append(
          _estimate(
            mine[kind][0] - other[kind][0],
            interval(mine[kind][1] - other[kind][1]),
          )
        )
      by_kind[kind] = cells
    out.append(by_kind)
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
    "reward": _rounded(row.get("reward")),
    "reason": _cut(_reason(row)),
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
      {row.get("index", place): row for place, row in enumerate(found)}
      for found in (
        run.completions(step, kind) for step in run.before_and_after
      )
    )
    by_change = collections.defaultdict(list)
    for index in sorted(first.keys() & last.keys()):
      change = (
        bool(first[index].get("correct")),
        bool(last[index].get("correct")),
      )
      by_change[change].append(index)
    order = [(False, True), (True, False), (False, False), (True, True)]
    queues = [by_change[change] for change in order]
    picked: list[int] = []
    for place in range(max(map(len, queues), default=0)):
      picked += [queue[place] for queue in queues if place < len(queue)]
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
  """Points of samples/calibration-*.jsonl: target against estimate.

  The regression is over all rows of a file; points are thinned.
  """
  folder = run.folder / "samples"
  paths = sorted(folder.glob("calibration-*.jsonl")) if folder.is_dir() else []
  if len(paths) > _SCATTER_FILES:
    last = len(paths) - 1
    paths = [
      paths[round(i * last / (_SCATTER_FILES - 1))]
      for i in range(_SCATTER_FILES)
    ]
  out = []
  for path in paths:
    match = re.fullmatch(r"calibration-(\d+)", path.stem)
    points = np.array(
      [
        (row["target"], row["estimate"])
        for row in _json_lines(path)
        if _rounded(row.get("target")) is not None
        and _rounded(row.get("estimate")) is not None
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
        "slope": _rounded(slope),
        "intercept": _rounded(intercept),
        "correlation": _rounded(correlation),
        "points": [[_rounded(float(v)) for v in point] for point in kept],
      }
    )
  return out


def phases(run: Run) -> dict[str, float]:
  """Mean seconds a step of each phase, without the first step's compilation.

  What no phase accounts for is "other"; "first step" is that step as a whole.
  """
  rows = [row for row in run.rows if _rounded(row.get("time/step_s"))]
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
  return {key: _rounded(value) for key, value in out.items()}


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
        "parts": {when: _mean_dict(found) for when, found in parts.items()},
        "runs": out_runs,
      }
    )
  return {
    "groups": out_groups,
    "bin": width,
    "config": {
      key: value
      for key, value in sorted(groups[0].config.items())
      if key not in _FREE_KEYS
      and all(group.config.get(key) == value for group in groups)
    },
    "environment": _shared_environment(runs),
    "notes": list(notes),
  }


def _mean_dict(dicts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
  """Mean of each key over dicts."""
  keys = list(dict.fromkeys(key for found in dicts for key in found))
  return {
    key: _rounded(float(np.mean([d[key] for d in dicts if key in d])))
    for key in keys
  }


def _shared_environment(runs: Sequence[Run]) -> dict[str, list[str]]:
  """The values of each key of environment.json over the runs."""
  out: dict[str, list[str]] = {}
  for run in runs:
    for key, value in run_config.flat(run.environment).items():
      text = value if isinstance(value, str) else json.dumps(value)
      found = out.setdefault(key, [])
      if text not in found:
        found.append(text)
  return out


def page(data: Mapping[str, Any], title: str) -> str:
  """The HTML page with everything it needs inside."""
  # "<" never occurs in the data, so that no completion can end the script.
  text = json.dumps(data, allow_nan=False, separators=(",", ":"))
  pieces = {
    "DATA": text.replace("<", "\\u003c"),
    "TITLE": title.replace("&", "&amp;").replace("<", "&lt;"),
    "LICENSE": (_ASSETS / "uplot.LICENSE").read_text("utf-8").strip(),
  }
  for name, file in (
    ("UPLOT_CSS", "uplot.min.css"),
    ("CSS", "report.css"),
    ("UPLOT_JS", "uplot.min.js"),
    ("JS", "report.js"),
  ):
    pieces[name] = (_ASSETS / file).read_text("utf-8").strip()
  template = (_ASSETS / "report.html").read_text("utf-8")
  # One pass: what is put in is not read again for further marks.
  return re.sub(
    r"@@([A-Z_]+)@@", lambda match: pieces[match.group(1)], template
  )


def build(
  folders: Sequence[pathlib.Path],
) -> tuple[list[Group], list[str]]:
  """Reads all runs of some folders.

  Returns:
    (groups, notes): notes name what had to be left out.

  Raises:
    ValueError: a folder holds no run, or none could be read.
  """
  paths = dict.fromkeys(
    path for folder in folders for path in find_runs(folder)
  )
  runs, notes = [], []
  for path in paths:
    try:
      runs.append(read_run(path))
    except ValueError as error:
      notes.append(f"left out {error}.")
  if not runs:
    raise ValueError(f"no run could be read: {' '.join(notes)}")
  # A comparison should say whom it lacks.
  for parent in dict.fromkeys(path.parent for path in paths):
    for row in _sweep_rows(parent):
      if row.get("status") == "failed":
        why = row.get("why") or "no reason is known"
        notes.append(f"{row.get('workdir')} of the sweep failed: {why}")
  return group_runs(runs), notes


# Command line.

HELP = """usage: python launch/report.py DIR [DIR ...] --out=report.html [options]

  DIR             folder of a run or of a sweep
  --out=FILE      the page (default report.html)
  --title=TEXT    its heading

exit status: 0 done, 2 mistake in the command, 3 the page could not be
written."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Options of a command line, without the program's name.

  Raises:
    ValueError: one message with value and remedy.
  """
  parser = options_lib.Parser()
  parser.add_argument("folders", nargs="*")
  parser.add_argument("--out", default="report.html")
  parser.add_argument("--title", default="")
  options, _ = parser.read(argv)
  if not options.folders:
    raise ValueError(
      "no folder is given; try: python launch/report.py runs --out=report.html"
    )
  out = pathlib.Path(options.out)
  if out.is_dir():
    raise ValueError(
      f"--out={out} is a folder; name a file, such as {out / 'report.html'}."
    )
  if not out.absolute().parent.is_dir() or not os.access(
    out.absolute().parent, os.W_OK
  ):
    raise ValueError(
      f"--out={out} cannot be written: {out.absolute().parent} is not a "
      "writable folder; choose another."
    )
  return options


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if options_lib.wants_help(argv, HELP):
    return DONE
  try:
    options = parse(argv)
    groups, notes = build([pathlib.Path(word) for word in options.folders])
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return MISTAKE
  for note in notes:
    print(f"warning: {note}", file=sys.stderr)
  tasks = dict.fromkeys(str(g.config.get("task.name", "")) for g in groups)
  title = options.title or f"rspo_jax: {', '.join(filter(None, tasks))}"
  text = page(payload(groups, notes), title)
  try:
    pathlib.Path(options.out).write_text(text, encoding="utf-8")
  except OSError as error:
    print(
      f"error: {error}. Make room or choose another --out.", file=sys.stderr
    )
    return FAULT
  runs = sum(len(group.runs) for group in groups)
  print(
    f"{options.out}: {runs} runs in {len(groups)} groups, "
    f"{len(text.encode()) / 1e6:.2f} MB"
  )
  return DONE


if __name__ == "__main__":
  sys.exit(main())
