"""Random integers that are the same under every version of numpy.

numpy keeps the raw output of a bit generator fixed for ever, but not what
`Generator` makes of it. Datasets are versioned by their bytes, so they draw from
the raw 64-bit words alone.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np


def raw_words(key: tuple[int, ...], count: int) -> np.ndarray:
  """Returns `count` random uint64 words, a function of `key` alone."""
  return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def below(words: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
  """Maps uint64 words to integers in 0..bound-1.

  Multiplies the upper 32 bits by the bound and shifts: off uniform by at most
  bound / 2^32.
  """
  bound = np.asarray(bound, np.uint64)
  return (((words >> np.uint64(32)) * bound) >> np.uint64(32)).astype(np.int64)


def mix(values: np.ndarray) -> np.ndarray:
  """Hashes uint64 values (the finaliser of splitmix64); stable for ever."""
  values = np.asarray(values, np.uint64)
  with np.errstate(over="ignore"):
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(
      0xBF58476D1CE4E5B9
    )
    values = (values ^ (values >> np.uint64(27))) * np.uint64(
      0x94D049BB133111EB
    )
  return values ^ (values >> np.uint64(31))


def first_rows(
  block: Callable[[int], Sequence[np.ndarray]],
  count: int,
  keys: Callable[..., Iterable[Hashable]] | None = None,
) -> list[np.ndarray]:
  """Returns the first rows of an endless sequence of blocks, as columns.

  Args:
    block: number of a block -> its columns.
    count: how many rows.
    keys: columns -> what tells each row from others, none of which is then
      returned twice; None: rows may repeat.
  """
  seen, blocks, have = set(), [], 0
  for number in itertools.count():
    columns = block(number)
    if keys is not None:
      rows = enumerate(keys(*columns))
      keep = [i for i, key in rows if not (key in seen or seen.add(key))]
      columns = [column[keep] for column in columns]
    blocks.append(columns)
    have += len(columns[0])
    if have >= count:
      return [np.concatenate(c)[:count] for c in zip(*blocks, strict=True)]
