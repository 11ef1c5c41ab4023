"""4x4 sudoku: fill the empty cells so that rows, columns and boxes hold 1..4.

Strict verdict. The answer is the digits of the last closed <answer> tag, in it
of the last box; without any tag it is the whole completion if that is digits,
white space and arrows. Of `PUZZLE -> SOLUTION`, or the puzzle and then the
solution, it is the solution. Correct
means a valid full grid that keeps the clues, whether or not it is the stored
solution. `accuracy` is the share of empty cells that agree with the stored
solution, a short answer counting as zeros at its end.
"""

import re
from collections.abc import Mapping, Sequence

from rspo_jax.datasets import files
from rspo_jax.tasks import answers, base, d1, prompts

WEIGHTS = {"cells": 1.0, "valid": 0.0, "exact": 0.0}
STYLES = ("compact", *prompts.STYLES)

_DIGITS = frozenset("0123456789")
_FULL = frozenset("1234")
_ARROW = re.compile(
  r"[-=]{1,3}>|[\u2190-\u21ff\u27f0-\u27ff\u2794\u279c]"
  r"|\\(?:to|mapsto|implies|(?:long)?rightarrow|(?:Long)?[rR]ightarrow)(?![a-z])"
)


def _units() -> tuple[tuple[int, int, int, int], ...]:
  """Returns the cells of the 4 rows, 4 columns and 4 boxes."""
  rows = [tuple(range(4 * r, 4 * r + 4)) for r in range(4)]
  columns = [tuple(range(c, 16, 4)) for c in range(4)]
  boxes = [(b, b + 1, b + 4, b + 5) for b in (0, 2, 8, 10)]
  return (*rows, *columns, *boxes)


_UNITS = _units()


def prompt(example: base.Example, style: str) -> str:
  """Returns the user's text: the 16 digits, 0 where empty, when compact."""
  base.check_style(style, STYLES)
  if style != "compact":
    return prompts.sudoku(example["puzzle"], style)
  return example["puzzle"]


def demonstration(example: base.Example) -> str:
  """Returns the 16 digits of the solution."""
  return example["ground_truth"]


def corrupt(example: base.Example, rng) -> str:
  """Returns the solution with each empty cell redrawn with probability 1/2."""
  redraw = rng.random(16) < 0.5
  drawn = rng.integers(1, 5, 16)
  return "".join(
    str(d) if clue == "0" and r else cell
    for clue, cell, r, d in zip(
      example["puzzle"], example["ground_truth"], redraw, drawn, strict=True
    )
  )


def _final_digits(text: str, puzzle: str) -> str | None:
  """Returns the digits of the answer, None where there is no answer."""
  if "<answer>" in text:
    inside = answers.last_tag(text)
    if inside is None:
      return None
    boxed = answers.last_box(inside) if "\\boxed" in inside else None
    last = _ARROW.split(inside if boxed is None else boxed)[-1]
    digits = "".join(c for c in last if c in _DIGITS)
  else:
    parts = ["".join(part.split()) for part in _ARROW.split(text)]
    if not all(part.isascii() and part.isdigit() for part in parts):
      return None
    digits = parts[-1]
  # The puzzle first, then its solution.
  return digits[16:] if len(digits) == 32 and digits[:16] == puzzle else digits


def is_valid(puzzle: str, grid: str) -> bool:
  """Whether a grid is full, keeps the clues and breaks no rule."""
  return (
    len(grid) == 16
    and all(p in ("0", g) for p, g in zip(puzzle, grid, strict=True))
    and all(
      {grid[a], grid[b], grid[c], grid[d]} == _FULL for a, b, c, d in _UNITS
    )
  )


def verify(
  example: base.Example,
  completion: str,
  protocol: str = "strict",
  weights: Mapping[str, float] | None = None,
) -> base.Verdict:
  """Judges one completion.

  Args:
    example: with `puzzle` and `ground_truth`, 16 digits each.
    completion: any text.
    protocol: strict, or d1 for the verdicts and rewards of `d1`, which know no
      weights.
    weights: of the parts `cells`, `valid` and `exact`.

  Returns:
    Verdict with parts `accuracy` (share of empty cells as in the stored
    solution), `cells` (the same, but 1 for another valid solution), `valid`
    and `exact` (the stored solution itself).
  """
  base.check_protocol(protocol)
  if protocol == "d1":
    return d1.sudoku(example, completion)
  weights = base.resolve_weights(WEIGHTS, weights)
  puzzle, gold = example["puzzle"], example["ground_truth"]
  digits = _final_digits(answers.clip(completion), puzzle)
  if digits is None:
    parts = {"accuracy": 0.0, "cells": 0.0, "valid": 0.0, "exact": 0.0}
    return base.Verdict(0.0, False, parts, "no answer")
  exact = digits == gold
  valid = exact or is_valid(puzzle, digits)
  padded = digits[:16].ljust(16, "0")
  empties = puzzle.count("0")
  right = sum(
    p == "0" and a == g for p, a, g in zip(puzzle, padded, gold, strict=True)
  )
  accuracy = right / empties if empties else float(exact)
  parts = {
    "accuracy": accuracy,
    "cells": 1.0 if valid else accuracy,
    "valid": float(valid),
    "exact": float(exact),
  }
  reward = sum(weight * parts[name] for name, weight in weights.items())
  if valid:
    reason = "the solution" if exact else "another valid solution"
  elif len(digits) != 16:
    reason = f"{len(digits)} digits instead of 16"
  else:
    reason = f"{right} of {empties} empty cells right"
    if right == empties:
      reason += ", but a clue is overwritten"
  return base.Verdict(reward, valid, parts, reason)


class Examples(Sequence):
  """Columns of generated puzzles as a random-access sequence of examples."""

  def __init__(self, columns):
    self.puzzle = columns["puzzle"]  # S16 [n]
    self.solution = columns["solution"]  # S16 [n]

  def __len__(self) -> int:
    return len(self.puzzle)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    return {
      "puzzle": self.puzzle[index].decode(),
      "ground_truth": self.solution[index].decode(),
    }


def parse_row(row) -> base.Example:
  """Turns a row {"Puzzle": 16 digits, "Solution": 16 digits} into an example."""
  puzzle = str(files.field(row, "Puzzle", "puzzle")).strip()
  solution = str(files.field(row, "Solution", "solution", "ground_truth"))
  solution = solution.strip()
  if len(puzzle) != 16 or not set(puzzle) <= set("01234"):
    raise ValueError(
      f"expected a puzzle of 16 digits 0..4 (0 empty), got {puzzle!r:.40}; keep"
      " leading zeros."
    )
  if not is_valid(puzzle, solution):
    raise ValueError(
      f"the solution {solution!r:.40} is no valid grid with the clues of"
      f" {puzzle}."
    )
  return {"puzzle": puzzle, "ground_truth": solution}


def load(split: str, settings: base.DataSettings) -> Sequence[base.Example]:
  """Loads a split of the generated data, or of `settings.source`."""
  base.check_split(split)
  if settings.source:
    return files.load_split(settings.source, split, parse_row)
  from rspo_jax.datasets import builders

  return Examples(
    builders.load_columns(
      "sudoku", split, settings.size, settings.seed, settings.data_dir
    )
  )


def difficulty(example: base.Example) -> str:
  """The number of empty cells."""
  return f"{example['puzzle'].count('0')} empty"


TASK = base.Task(
  "sudoku",
  load,
  prompt,
  demonstration,
  corrupt,
  verify,
  WEIGHTS,
  STYLES,
  difficulty=difficulty,
)
