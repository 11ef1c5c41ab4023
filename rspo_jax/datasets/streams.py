"""Random integers that are the same under every version of numpy.

numpy keeps the raw output of a bit generator fixed for ever, but not what
`Generator` makes of it. Datasets are versioned by their bytes, so they draw from
the raw 64-bit words alone.
"""

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
