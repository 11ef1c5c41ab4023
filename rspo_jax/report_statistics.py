"""Accuracies before and after with intervals, and differences of groups.

Intervals are 95 % bootstrap ones over seeds and prompts together: a replicate
draws seeds with replacement, prompts with replacement, and takes the mean of
the crossed table [seed, prompt] of verdicts. All replicates share their draws,
so that a gain, or a difference of two groups on the same prompts, is paired by
seed and by prompt. A bootstrap over S seeds sees (S - 1) / S of their variance and
nothing of how poorly few seeds tell it: where Student's t over the seeds' own
means is wider, that is the interval. With one seed it is over prompts alone.

A gain, and a difference of groups, is certain where its interval leaves 0 out:
both tests have to agree, each of which errs in at most some 5 % of null cases
where the other may not (seeds that differ, prompts that all seeds share). One
seed says what its model gained, not which of two configs is better.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rspo_jax.report_runs import Group, Run

REPLICATES = 2000
KINDS = ("greedy", "sampled")
# Keys that have to agree for two groups to be paired by prompt.
_PAIRING_KEYS = ("task.", "data.", "eval.")


def rounded(value: Any) -> float | int | None:
  """Five digits of a number; None where it is none."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  if not math.isfinite(value):
    return None
  return value if isinstance(value, int) else float(f"{value:.5g}")


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


def wider_interval(
  replicates: np.ndarray, by_seed: Sequence[float]
) -> tuple[float, float]:
  """`interval`, out to the ends of `t_interval` over seeds where they lie outside.

  Args:
    replicates: bootstrap means over seeds and prompts, [R].
    by_seed: the value of each seed, [S].
  """
  low, high = interval(replicates)
  ends = t_interval(by_seed) or (low, high)
  return min(low, ends[0]), max(high, ends[1])


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
  """Share right [S, n] before (0) or after (1); None where files are missing.

  Rows are seeds, columns the prompts that all of them were evaluated on; of
  several samples of a prompt the mean.
  """
  by_run = []
  for run in runs:
    found = collections.defaultdict(list)
    rows = run.completions(run.before_and_after[when], kind)
    for place, row in enumerate(rows):
      found[row.get("index", place)].append(bool(row.get("correct")))
    by_run.append({index: np.mean(right) for index, right in found.items()})
  if not by_run or not all(by_run):
    return None
  shared = sorted(set.intersection(*(set(found) for found in by_run)))
  if not shared:
    return None
  return np.array([[found[i] for i in shared] for found in by_run])


def _estimate(value: float, ends: tuple[float, float] | None) -> list:
  """[value, low, high] as JSON takes it."""
  low, high = ends or (None, None)
  return [rounded(float(value)), rounded(low), rounded(high)]


def _share(table: np.ndarray, replicates: np.ndarray) -> list:
  """`_estimate` of a table's mean, a share."""
  low, high = wider_interval(replicates, table.mean(1))
  return _estimate(table.mean(), (max(low, 0.0), min(high, 1.0)))


def change(table: np.ndarray, replicates: np.ndarray) -> list:
  """[value, low, high, sign] of the mean of a table of paired differences.

  Args:
    table: [S, n].
    replicates: of that mean, [R].

  Returns:
    `sign` is 1 or -1 where the interval leaves 0 out on that side, else 0.
  """
  low, high = wider_interval(replicates, table.mean(1))
  return [*_estimate(table.mean(), (low, high)), int(low > 0) - int(high < 0)]


def _logged(runs: Sequence[Run], when: int, kind: str) -> list:
  """Accuracy from metrics.jsonl, where the completions are not at hand."""
  end = "" if kind == "greedy" else "_sampled"
  rows = [run.row(run.before_and_after[when]) for run in runs]
  values = [
    row[f"eval/accuracy{end}"]
    for row in rows
    if rounded(row.get(f"eval/accuracy{end}")) is not None
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
    (rows, differences): a row has before and after of each kind as
    [value, low, high] and gain as `change` gives it; `differences[i][kind][j]`
    is the accuracy after of group i minus that of group j, in the same form,
    None where their prompts are not the same.
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
        row[kind] = {
          "before": _share(tables[0], means[0]),
          "after": _share(tables[1], means[1]),
          "gain": change(tables[1] - tables[0], means[1] - means[0]),
          "n": int(tables[1].shape[1]),
          "how": "bootstrap over prompts"
          if len(runs) == 1
          else "bootstrap over seeds and prompts, or Student's t over seeds "
          "where that is wider",
        }
        found[kind] = (tables[1], means[1])
      else:
        first, last = (_logged(runs, when, kind) for when in (0, 1))
        gain = None
        if first[0] is not None and last[0] is not None:
          gain = rounded(last[0] - first[0])
        row[kind] = {
          "before": first,
          "after": last,
          "gain": [gain, None, None, 0],
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
          and mine[kind][0].shape == other[kind][0].shape
        )
        if not paired or i == j:
          cells.append(None)
          continue
        tables, means = zip(mine[kind], other[kind], strict=True)
        cell = change(tables[0] - tables[1], means[0] - means[1])
        if len(tables[0]) == 1:
          cell[-1] = 0  # nothing is known of the spread between seeds
        cells.append(cell)
      by_kind[kind] = cells
    out.append(by_kind)
  return out
