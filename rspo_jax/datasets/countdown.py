"""Generates Countdown problems with three numbers, many at a time.

1. Draw three numbers uniformly from 1..100; duplicates may occur.
2. Evaluate every expression that uses each number once, exactly: a value is a
   pair of integers (numerator, denominator). Up to equality as rational
   functions there are 68 such expressions; of equal ones the most preferred is
   kept (see `FORMS`).
3. Draw the target uniformly from the distinct integers in 10..100 that are
   reached; a triple that reaches none is dropped.
4. The solution is the most preferred expression with that value.

A problem is (sorted numbers, target). Its hash says which split it belongs to,
so splits are disjoint by problem however many examples are asked for, and a
smaller training split is the beginning of a larger one.
"""

import dataclasses
import fractions
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from rspo_jax.datasets import streams

VERSION = "1.0.0"
NUMBER_MAX = 100
TARGET_MIN, TARGET_MAX = 10, 100

# One problem in 16 belongs to validation, one to test, the rest to train.
_BUCKETS = 16
_SPLIT_IDS = {"train": 0, "validation": 1, "test": 2}
_DRAWS_PER_BLOCK = 16384
_STREAM = 0x636F756E  # keeps this generator's draws apart from other ones


@dataclasses.dataclass(frozen=True)
class Form:
  """An expression over the numbers {0}, {1}, {2}, with minimal parentheses."""

  text: str
  order: tuple[int, int, int]
  operators: tuple[str, str]
  left: bool  # (x o1 y) o2 z when True, x o1 (y o2 z) otherwise


def _render(order, operators, left) -> str:
  """Writes one tree without the parentheses that do not change its value."""
  x, y, z = (f"{{{i}}}" for i in order)
  first, second = operators
  if left:
    if first in "+-" and second in "*/":
      return f"({x}{first}{y}){second}{z}"
    return f"{x}{first}{y}{second}{z}"
  if (
    first == "+"
    or (first == "*" and second in "*/")
    or (first == "-" and second in "*/")
  ):
    return f"{x}{first}{y}{second}{z}"
  return f"{x}{first}({y}{second}{z})"


def _apply(operator, a, b):
  """Applies an operator to two (numerator, denominator) pairs."""
  (p, q), (r, s) = a, b
  if operator == "+":
    return p * s + r * q, q * s
  if operator == "-":
    return p * s - r * q, q * s
  if operator == "*":
    return p * r, q * s
  return p * s, q * r


def evaluate(form: Form, numbers):
  """Returns (numerator, denominator); denominator 0 where undefined.

  Args:
    form: the expression.
    numbers: three integers or integer arrays of one shape.
  """
  x, y, z = ((numbers[i], 1) for i in form.order)
  first, second = form.operators
  if form.left:
    return _apply(second, _apply(first, x, y), z)
  return _apply(first, x, _apply(second, y, z))


@functools.cache
def trees() -> tuple[Form, ...]:
  """Returns all 192 binary trees over three numbers, each order and operator."""
  return tuple(
    Form(_render(order, operators, left), order, operators, left)
    for left in (True, False)
    for operators in itertools.product("+-*/", repeat=2)
    for order in itertools.permutations(range(3))
  )


def _preference(form: Form):
  """Sorts forms: no parentheses first, then + before - before * before /."""
  cost = {"+": 0, "-": 1, "*": 3, "/": 4}
  tier = 0 if set(form.operators) <= set("+-") else 1
  return (
    tier,
    "(" in form.text,
    sum(cost[o] for o in form.operators),
    form.operators,
    form.order,
    not form.left,
  )


@functools.cache
def forms() -> tuple[Form, ...]:
  """Returns the 68 distinct expressions, most preferred first.

  Two trees are the same expression when they agree as rational functions, which
  is decided at two generic points.
  """
  points = ((101, 907, 10007), (1009, 211, 50021))
  seen, kept = set(), []
  for form in sorted(trees(), key=_preference):
    value = tuple(
      fractions.Fraction(*evaluate(form, point)) for point in points
    )
    if value not in seen:
      seen.add(value)
      kept.append(form)
  return tuple(kept)


def solve(numbers: np.ndarray) -> np.ndarray:
  """Finds the preferred expression for every target in range.

  Args:
    numbers: i64 [n, 3].

  Returns:
    i8 [n, TARGET_MAX - TARGET_MIN + 1]: index into `forms()`, -1 where the
    target cannot be reached.
  """
  columns = numbers.T.astype(np.int64)
  width = TARGET_MAX - TARGET_MIN + 1
  best = np.full((len(numbers), width), -1, np.int8)
  # From the least preferred on, so that a better form overwrites a worse one.
  for index, form in reversed(list(enumerate(forms()))):
    numerator, denominator = evaluate(form, columns)
    denominator = np.broadcast_to(denominator, numerator.shape)
    defined = denominator != 0
    safe = np.where(defined, denominator, 1)
    value = numerator // safe
    hit = defined & (value * safe == numerator)
    hit &= (value >= TARGET_MIN) & (value <= TARGET_MAX)
    rows = np.flatnonzero(hit)
    best[rows, value[rows] - TARGET_MIN] = index
  return best


def split_of(numbers: np.ndarray, target: np.ndarray) -> np.ndarray:
  """Returns which split problems belong to: i64 [n], 0 train, 1, 2."""
  ordered = np.sort(numbers, axis=-1).astype(np.uint64)
  key = np.asarray(target).astype(np.uint64)
  for column in range(ordered.shape[-1]):
    key = key * np.uint64(1009) + ordered[..., column]
  bucket = streams.mix(key) % np.uint64(_BUCKETS)
  return np.where(bucket == 0, 1, np.where(bucket == 1, 2, 0))


@dataclasses.dataclass(frozen=True)
class Problems:
  """Columns of generated problems.

  Attributes:
    numbers: i32 [n, 3].
    target: i32 [n].
    form: i8 [n], index into `forms()`.
  """

  numbers: np.ndarray
  target: np.ndarray
  form: np.ndarray

  def __len__(self) -> int:
    return len(self.target)

  def solution(self, index: int) -> str:
    """Returns the canonical solution as text."""
    return forms()[self.form[index]].text.format(*self.numbers[index].tolist())

  def columns(self) -> dict[str, np.ndarray]:
    """Returns numbers, target and solution (text), as the dataset holds them."""
    templates = [form.text for form in forms()]
    rows = zip(self.form.tolist(), self.numbers.tolist(), strict=True)
    solution = np.array([templates[f].format(*row) for f, row in rows])
    return {
      "numbers": self.numbers,
      "target": self.target,
      "solution": solution.astype(np.bytes_),
    }


def _block(seed: int, split: str, block: int) -> Sequence[np.ndarray]:
  """Generates the problems of one block that belong to the split."""
  n = _DRAWS_PER_BLOCK
  words = streams.raw_words((_STREAM, seed, _SPLIT_IDS[split], block), 4 * n)
  numbers = 1 + streams.below(words[: 3 * n].reshape(n, 3), NUMBER_MAX)
  best = solve(numbers)
  reachable = best >= 0
  count = reachable.sum(axis=1)
  keep = np.flatnonzero(count)
  numbers, best, reachable = numbers[keep], best[keep], reachable[keep]
  pick = streams.below(words[3 * n :][keep], count[keep])
  column = (np.cumsum(reachable, axis=1) == pick[:, None] + 1).argmax(axis=1)
  target = column + TARGET_MIN
  form = best[np.arange(len(best)), column]
  mine = split_of(numbers, target) == _SPLIT_IDS[split]
  numbers, target = numbers.astype(np.int32), target.astype(np.int32)
  return numbers[mine], target[mine], form[mine]


def generate(seed: int, split: str, count: int) -> Problems:
  """Generates the first `count` problems of a split.

  Validation and test hold no problem twice; train may repeat one, in another
  order of its numbers as a rule, as independent draws do.

  Args:
    seed: of the data.
    split: train, validation or test.
    count: how many.
  """
  block = functools.partial(_block, seed, split)
  keys = None if split == "train" else _keys
  return Problems(*streams.first_rows(block, count, keys))


def _keys(numbers, target, form):
  """What makes a problem: its numbers in whatever order, and its target."""
  del form
  ordered = np.sort(numbers, axis=1)
  return map(tuple, np.column_stack([ordered, target]).tolist())
