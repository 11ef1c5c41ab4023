"""A plan as text."""

from typing import Any

# Label, key of a program's row, how it is printed.
_FIGURES = (
  ("memory of the program, GB", "hbm_gb", ".2f"),
  ("resident beside it, GB", "resident_gb", ".2f"),
  ("capacity, GB", "capacity_gb", ".2f"),
  ("FLOPs executed", "flops", ".3g"),
  ("FLOPs useful", "useful_flops", ".3g"),
  ("memory traffic, GB", "moved_gb", ".3g"),
  ("collectives, GB", "collective_gb", ".3g"),
  ("seconds", "seconds", ".3g"),
  ("MFU", "mfu", ".2f"),
)


def render(plan: dict[str, Any]) -> str:
  """The plan as text."""
  rows = plan["programs"]
  lines = [*_heading(plan), "", *_table(rows), ""]
  for name, row in rows.items():
    lines += [f"{name}: {line}" for line in _details(row)]
  if plan["executed_over_useful"]:
    lines.append(
      f"executed over useful FLOPs of update and scores: "
      f"{plan['executed_over_useful']:.2f}"
    )
  if plan["step_seconds"]:
    lines.append(f"a step: {plan['step_seconds']:.3g} s")
  if any(row.get("readings") for row in rows.values()):
    lines.append(
      "Seconds are the compiler's own estimates, never compared with "
      'hardware; "sync" overlaps what the program overlaps. Expect any of '
      "the three readings, or worse."
    )
  lines += [f"note: {note}" for note in plan["notes"]]
  if plan["advice"]:
    lines += ["", "what would help:"]
    lines += [f"  {line}" for line in plan["advice"]]
  return "\n".join(lines)


def _heading(plan: dict[str, Any]) -> list[str]:
  """The verdict, and what was planned."""
  compiled = any(row["hbm_gb"] for row in plan["programs"].values())
  if plan["estimate"]:
    how = "estimated, no compiler"
  elif plan["fits"]:
    how = "compiles and fits"
  else:
    how = "the compiler's answer" if compiled else "by its state alone"
  verdict = "fits" if plan["fits"] else "does not fit"
  mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
  part = plan["micro_masks"] < plan["masks"]
  at_a_time = f" with {plan['micro_masks']} masks at a time" if part else ""
  passes = {"one": "one pass", "two": "two passes"}[plan["passes"]]
  return [
    f"{plan['topology']}: {verdict} ({how}; nothing was run on hardware)",
    f"{plan['chips']} chip{'s' * (plan['chips'] > 1)} as {mesh}; {plan['sequences']} sequences x "
    f"{plan['masks']} masks x {plan['prompt']}+{plan['completion']} tokens, "
    f"{plan['micro_batches']} micro-batches{at_a_time}, {passes}",
  ]


def _table(rows: dict[str, dict[str, Any]]) -> list[str]:
  """Figures of all programs, aligned: labels left, numbers right."""
  table = [("per chip", *rows)]
  for label, key, form in _FIGURES:
    values = [row[key] for row in rows.values()]
    table.append(
      (label, *("-" if v is None else format(v, form) for v in values))
    )
  fits = ("yes" if row["fits"] else "NO" for row in rows.values())
  table.append(("fits", *fits))
  first, *widths = (max(map(len, each)) for each in zip(*table, strict=True))
  return [
    "  ".join([label.ljust(first), *map(str.rjust, cells, widths)])
    for label, *cells in table
  ]


def _details(row: dict[str, Any]) -> list[str]:
  """What fills a program's memory, its collectives, its readings."""
  lines = []
  if "filled_by_gb" in row:
    filled = sorted(row["filled_by_gb"].items(), key=lambda item: -item[1])
    parts = [f"{part} {size:.2f}" for part, size in filled if size >= 0.005]
    lines.append(f"memory is {', '.join(parts) or '0.00'} GB")
  for kind, wire in row.get("collectives", {}).items():
    lines.append(
      f"{kind} {wire['gb']:.2f} GB, {wire['blocking_gb']:.2f} of it blocking, "
      f"{wire['count']:.0f} times"
    )
  if "readings" in row:
    lines.append(
      ", ".join(
        f"{reading} {value['seconds']:.3g} s (MFU {value['mfu']:.2f})"
        for reading, value in row["readings"].items()
      )
    )
  return lines + row["notes"]
