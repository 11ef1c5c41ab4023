"""What the generated data looks like, as Markdown tables.

    python -m rspo_jax.datasets.statistics

prints the tables of docs/data.md: seed 0, the small training split and the
held-out ones, counted over every example.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from rspo_jax.datasets import countdown, sudoku

SIZES = {"train": 16_384, "validation": 4_096, "test": 4_096}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def share(flags: np.ndarray) -> str:
  """The share of true values, as a cell."""
  return f"{100 * np.mean(flags):.1f} %"


def countdown_table(seed: int = 0) -> str:
  """Sizes, numbers, targets and operators of each Countdown split."""
  rows = []
  for split, count in SIZES.items():
    made = countdown.generate(seed, split, count)
    texts = [made.solution(i) for i in range(len(made))]
    ordered = np.sort(made.numbers, axis=1)
    problems = np.column_stack([ordered, made.target])
    low, middle, high = np.percentile(made.target, (25, 50, 75))
    doubled = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    row = [split, f"{count:,}", f"{len(np.unique(problems, axis=0)):,}"]
    row += [f"{made.numbers.mean():.1f}", share(doubled)]
    row.append(f"{low:.0f} / {middle:.0f} / {high:.0f}")
    row += [share([o in text for text in texts]) for o in "+-*/("]
    rows.append(row)
  header = ["split", "examples", "distinct problems", "mean number"]
  header += ["with a double", "target, quartiles"]
  header += [f"with {o}" for o in ("+", "-", "\\*", "/", "( )")]
  return table(header, rows)


def operators_table(seed: int = 0) -> str:
  """How often the solutions of the training split use which two operators."""
  made = countdown.generate(seed, "train", SIZES["train"])
  pairs = [
    "".join(sorted(c for c in made.solution(i) if c in "+-*/"))
    for i in range(len(made))
  ]
  rows = []
  for pair in itertools.combinations_with_replacement("*+-/", 2):
    found = np.array([each == "".join(sorted(pair)) for each in pairs])
    name = " ".join("\\*" if o == "*" else o for o in pair)
    rows.append((found.mean(), [name, share(found)]))
  rows.sort(key=lambda row: -row[0])
  return table(["operators of the solution", "share"], [row for _, row in rows])


def sudoku_table(seed: int = 0) -> str:
  """Sizes, grids and empty cells of each Sudoku split."""
  rows = []
  levels = range(sudoku.EMPTY_MIN, sudoku.EMPTY_MAX + 1)
  for split, count in SIZES.items():
    made = sudoku.generate(seed, split, count)
    empties = (made.puzzle == 0).sum(1)
    rows.append(
      [
        split,
        f"{count:,}",
        f"{len(np.unique(made.puzzle, axis=0)):,}",
        f"{len(np.unique(made.solution, axis=0))}",
        *(share(empties == level) for level in levels),
      ]
    )
  header = ["split", "examples", "distinct puzzles", "solution grids"]
  return table([*header, *(f"{level} empty" for level in levels)], rows)


def tables(seed: int = 0) -> list[str]:
  """Every table of docs/data.md."""
  return [countdown_table(seed), operators_table(seed), sudoku_table(seed)]


if __name__ == "__main__":
  print("\n\n".join(tables()))
