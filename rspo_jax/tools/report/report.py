"""Makes one self-contained HTML page of what runs wrote into their folders.

    python launch/report.py runs/ablation --out=report.html

1. `runs` finds and reads runs and gathers those that differ in the seed.
2. `statistics` compares groups before and after, with intervals.
3. `payload` makes of both what the page shows; the template and the script that
   draws it lie in assets/. The page asks nothing of a network.
"""

import json
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rspo_jax.config import cli
from rspo_jax.config.cli import Option
from rspo_jax.tools.report.payload import payload
from rspo_jax.tools.report.runs import (
  Group,
  Run,
  find_runs,
  group_runs,
  read_run,
  sweep_rows,
)

FAULT = 3

_ASSETS = pathlib.Path(__file__).parent / "assets"


def _check(options) -> None:
  """Refuses a page that cannot be written."""
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


PARSER = cli.Parser(
  "python launch/report.py DIR [DIR ...] --out=report.html [options]",
  [
    Option("DIR", "folder of a run or of a sweep", example="runs"),
    Option("--out=FILE", "the page", "report.html"),
    Option("--title=TEXT", "its heading"),
  ],
  "exit status: 0 done, 2 mistake in the command, 3 the page could not be "
  "written.",
  _check,
)


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


def _report(options) -> int:
  """Writes the page of the folders named; returns the exit status."""
  groups, notes = build([pathlib.Path(word) for word in options.words])
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
  return cli.DONE


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  return PARSER.run(_report, argv)
