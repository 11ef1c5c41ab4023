"""reasoning-gym's generators and scorers (in a worker).

The package brings SymPy, plotting and games along, and some of its scorers can
be kept busy by what they score, so this module is imported by worker processes
only; `gym` calls it through `workers`. An entry is named by generator, options,
seed, size and index rather than sent: it is made again where it is needed,
since what its scorer wants to know of it need not be anything that JSON can say.
"""

import copy
import functools
import inspect
import json
import random
import zlib

import numpy as np
import reasoning_gym
from reasoning_gym.factory import DATASETS


def names() -> list[str]:
  """Every generator that makes data by itself."""
  return sorted(set(DATASETS) - {"composite"})


def _settle(*key) -> None:
  """Sets the global randomness, which some generators draw from."""
  random.seed(repr(key))
  np.random.seed(zlib.crc32(repr(key).encode()))


@functools.lru_cache(maxsize=4)
def _dataset(name: str, options: str, seed: int, size: int):
  _settle(name, options, seed, size)
  return reasoning_gym.create_dataset(
    name, seed=seed, size=size, **json.loads(options)
  )


@functools.lru_cache(maxsize=256)
def _entry(name: str, options: str, seed: int, size: int, index: int):
  dataset = _dataset(name, options, seed, size)
  _settle(name, options, seed, size, index)
  return dataset[index]


def check(name: str, options: str) -> list[str]:
  """What is wrong with a generator's options: its parameters, if anything.

  Raises:
    Exception: what the generator has to say of their values.
  """
  known = set(inspect.signature(DATASETS[name][1]).parameters)
  if not set(json.loads(options)) <= known - {"seed", "size"}:
    return sorted(known - {"seed", "size"})
  _dataset(name, options, 0, 16)
  return []


def entry(
  name: str, options: str, seed: int, size: int, index: int
) -> list[str | None]:
  """[question, answer] of an entry; the answer is None where many are right."""
  found = _entry(name, options, seed, size, index)
  answer = found["answer"]
  return [str(found["question"]), None if answer is None else str(answer)]


def score(
  name: str,
  options: str,
  seed: int,
  size: int,
  index: int,
  checksum: int,
  answer: str,
) -> list:
  """[the generator's own score of an answer, why it could not be scored].

  A scorer that fails on an answer has said that it is none.

  Args:
    name, options, seed, size, index: of the entry.
    checksum: CRC-32 of its question, by which it is known to be the same.
    answer: what is to be scored.
  """
  found = _entry(name, options, seed, size, index)
  if zlib.crc32(str(found["question"]).encode()) != checksum:
    raise RuntimeError(
      f"{name} makes another entry {index} than before, so that answers to it"
      " cannot be scored"
    )
  dataset = _dataset(name, options, seed, size)
  try:
    return [float(dataset.score_answer(answer, copy.deepcopy(found))), ""]
  except Exception as error:  # the scorers are not ours
    return [0.0, f"{type(error).__name__}: {error}"[:80]]


def call(function: str, *arguments):
  """The worker's entry."""
  return {"names": names, "check": check, "entry": entry, "score": score}[
    function
  ](*arguments)
