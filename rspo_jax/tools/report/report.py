"""Makes one self-contained HTML page of what runs wrote into their folders.

    python launch/report.py runs/ablation --out=report.html

1. `report_runs` finds and reads runs and gathers those that differ in the seed.
2. `report_statistics` compares groups before and after, with intervals.
3. The rows of metrics.jsonl become columns, thinned to what a screen shows,
   and go with a few completions into a template whose script draws them. The
   page asks nothing of a network.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rspo_jax.config import cli as options_lib
from rspo_jax.config import identity
from rspo_jax.tools.report.runs import (
  FREE_KEYS,
  Group,
  Run,
  changes,
  find_runs,
  group_runs,
  json_lines,
  read_run,
  sweep_rows,
  with_compute,
)
from rspo_jax.tools.report.statistics import KINDS, rounded, summarise

DONE, MISTAKE, FAULT = 0, 2, 3

_ASSETS = pathlib.Path(__file__).parent / "assets"
# Numbers in all the curves of a page: at about 7 bytes each, 1.2 MB.
_CURVE_NUMBERS = 170_000
_POINTS = (60, 600)  # fewest and most points of a curve
_PAIRS = 600  # completions shown before and after, over all runs
_PAIRS_PER_RUN = (3, 24)
_SCATTER_POINTS = 400  # of each calibration file
_SCATTER_FILES = 3  # of each run: first, middle, last
_TEXT_LIMIT = 800  # characters of a prompt or completion


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
    if rounded(value) is not None
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
  for path in sorted(folder.glob("train-*.jsonl")) if folder.is_dir() else ():
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
      if key not in FREE_KEYS
      and all(group.config.get(key) == value for group in groups)
    },
    "environment": _shared_environment(runs),
    "notes": list(notes),
  }


def _mean_dict(dicts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
  """Mean of each key over dicts."""
  keys = list(dict.fromkeys(key for found in dicts for key in found))
  return {
    key: rounded(float(np.mean([d[key] for d in dicts if key in d])))
    for key in keys
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
    for row in sweep_rows(parent):
      if row.get("status") == "failed":
        why = row.get("why") or "no reason is known"
        notes.append(f"{row.get('workdir')} of the sweep failed: {why}")
  groups = group_runs(runs)
  for group in groups:
    seen: dict[int, Run] = {}
    for run in group.runs:
      first = seen.setdefault(run.seed, run)
      if first is not run:
        notes.append(
          f"left out {run.folder}: the same config and seed as {first.folder}."
        )
    group.runs = list(seen.values())
  return groups, notes


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
