"""Generates 4x4 sudoku puzzles that have exactly one solution.

1. There are 288 full grids. A seed-free hash orders them; the first 44 belong to
   validation, the next 44 to test, the other 200 to train: splits are disjoint
   by solution grid.
2. Draw a grid of the split, a number of empty cells in 6..11 and an order of the
   16 cells, all uniformly; empty the first cells of that order.
3. Keep the puzzle when only one of the 288 grids agrees with its clues.

Emptying many cells rarely leaves one solution, so plain rejection would favour
few empties; instead each number of empties is filled to its own quota.
"""

import dataclasses
import functools
import itertools

import numpy as np

from rspo_jax.datasets import streams

VERSION = "1.0.0"
EMPTY_MIN, EMPTY_MAX = 6, 11
HELD_OUT_GRIDS = 44  # in validation, and as many in test

_SPLIT_IDS = {"train": 0, "validation": 1, "test": 2}
_DRAWS_PER_BLOCK = 8192
_STREAM = 0x7375646F  # keeps this generator's draws apart from other ones


@functools.cache
def all_grids() -> np.ndarray:
  """Returns the 288 valid grids in lexicographic order: i8 [288, 16]."""
  rows = list(itertools.permutations((1, 2, 3, 4)))
  # A band is two rows whose boxes are full; a grid is two bands whose columns
  # are.
  bands = [
    (*top, *low)
    for top, low in itertools.product(rows, repeat=2)
    if len({*top[:2], *low[:2]}) == 4 == len({*top[2:], *low[2:]})
  ]
  grids = [
    (*upper, *lower)
    for upper, lower in itertools.product(bands, repeat=2)
    if all(
      len({upper[c], upper[c + 4], lower[c], lower[c + 4]}) == 4
      for c in range(4)
    )
  ]
  return np.array(grids, np.int8)


@functools.cache
def grids_of(split: str) -> np.ndarray:
  """Returns the indices into `all_grids()` that belong to a split."""
  order = np.argsort(streams.mix(np.arange(len(all_grids()))), kind="stable")
  held_out = 2 * HELD_OUT_GRIDS
  return {
    "validation": order[:HELD_OUT_GRIDS],
    "test": order[HELD_OUT_GRIDS:held_out],
    "train": order[held_out:],
  }[split]


def count_solutions(puzzles: np.ndarray) -> np.ndarray:
  """Counts the grids that agree with the clues.

  Args:
    puzzles: i8 [n, 16], 0 where empty.

  Returns:
    i32 [n].
  """
  # A grid agrees when its one-hot cells cover as many clues as there are: one
  # matrix product in place of n * 288 comparisons of 16 cells.
  digits = np.arange(1, 5)
  onehot_grids = (all_grids()[:, :, None] == digits).reshape(-1, 64)
  onehot_clues = (puzzles[:, :, None] == digits).reshape(-1, 64)
  overlap = onehot_clues.astype(np.float32) @ onehot_grids.T.astype(np.float32)
  clues = (puzzles != 0).sum(axis=1)
  return (overlap == clues[:, None]).sum(axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Puzzles:
  """Columns of generated puzzles.

  Attributes:
    puzzle: i8 [n, 16], 0 where empty.
    solution: i8 [n, 16].
  """

  puzzle: np.ndarray
  solution: np.ndarray

  def __len__(self) -> int:
    return len(self.puzzle)

  def columns(self) -> dict[str, np.ndarray]:
    """Returns puzzle and solution as text, as the dataset holds them."""
    return {
      "puzzle": _digits_text(self.puzzle),
      "solution": _digits_text(self.solution),
    }


def _digits_text(cells: np.ndarray) -> np.ndarray:
  """Writes cells i8 [n, 16] as byte strings of 16 digits, S16 [n]."""
  digits = (cells + ord("0")).astype(np.uint8)
  return np.ascontiguousarray(digits).view("S16")[:, 0]


def _block(seed: int, split: str, empties: int, block: int):
  """Generates unique puzzles with a given number of empty cells."""
  n = _DRAWS_PER_BLOCK
  words = streams.raw_words(
    (_STREAM, seed, _SPLIT_IDS[split], empties, block), 17 * n
  )
  mine = grids_of(split)
  solution = all_grids()[mine[streams.below(words[:n], len(mine))]]
  ranks = words[n:].reshape(n, 16).argsort(axis=1).argsort(axis=1)
  puzzle = np.where(ranks < empties, 0, solution).astype(np.int8)
  unique = count_solutions(puzzle) == 1
  return puzzle[unique], solution[unique]


def generate(seed: int, split: str, count: int) -> Puzzles:
  """Generates the first `count` puzzles of a split.

  Validation and test hold no puzzle twice; train may repeat one.

  Args:
    seed: of the data.
    split: train, validation or test.
    count: how many.
  """
  levels = range(EMPTY_MIN, EMPTY_MAX + 1)
  words = streams.raw_words((_STREAM, seed, _SPLIT_IDS[split]), count)
  empties = EMPTY_MIN + streams.below(words, len(levels))
  puzzle = np.zeros((count, 16), np.int8)
  solution = np.zeros((count, 16), np.int8)
  for level in levels:
    rows = np.flatnonzero(empties == level)
    block = functools.partial(_block, seed, split, level)
    keys = None if split == "train" else _keys
    puzzle[rows], solution[rows] = streams.first_rows(block, len(rows), keys)
  return Puzzles(puzzle, solution)


def _keys(puzzle, solution):
  """What makes a puzzle: its clues."""
  del solution
  return (row.tobytes() for row in puzzle)
