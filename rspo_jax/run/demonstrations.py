"""Batches of demonstrations, for supervised training."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rspo_jax.run.data import Batches, DataError, Prompts
from rspo_jax.tasks import base


@dataclasses.dataclass(frozen=True)
class DemonstrationBatch:
  """This process's share of a batch of demonstrations.

  Attributes:
    tokens: i32 [b, P], prompts padded on the left.
    mask: bool [b, P], False on padding.
    completion: i32 [b, L], filled up with EOS.
    corrupt: bool [b], which demonstrations are of mixed quality.
    cut: bool [b], of whose prompts only the tail is there.
  """

  tokens: np.ndarray
  mask: np.ndarray
  completion: np.ndarray
  corrupt: np.ndarray
  cut: np.ndarray


class _Streams:
  """One random generator that is set to the stream of a position when asked.

  Building a generator takes longer than drawing what a demonstration needs;
  setting the counter of an existing one does not.
  """

  def __init__(self, seed: int):
    self._bits = np.random.Philox(np.random.SeedSequence(seed))
    self._state = self._bits.state
    self._generator = np.random.Generator(self._bits)

  def at(self, position: int) -> np.random.Generator:
    """Returns the generator at the start of a position's stream."""
    self._state["state"]["counter"][:] = (0, 0, position, 0)
    self._state["buffer_pos"] = 4  # 4: the buffer of drawn words is empty
    self._state["has_uint32"] = 0
    self._bits.state = self._state
    return self._generator


class _Answers:
  """Demonstrations as token rows; those that are right are tokenised once.

  Arguments are those of `demonstration_batches`.
  """

  def __init__(
    self, examples, task, encode, length, eos_id, corrupt_share, seed
  ):
    self._examples, self._task, self._encode = examples, task, encode
    self._length, self._eos_id = length, eos_id
    self._corrupt_share, self._streams = corrupt_share, _Streams(seed)
    self._right: dict[int, Sequence[int]] = {}

  def rows(
    self, indices: np.ndarray, positions: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns i32 [b, L] and bool [b], which of them are corrupt."""
    corrupt = np.zeros(len(indices), bool)
    rows = np.full((len(indices), self._length), self._eos_id, np.int32)
    pairs = zip(indices.tolist(), positions.tolist(), strict=True)
    for row, (index, position) in enumerate(pairs):
      rng = self._streams.at(position) if self._corrupt_share else None
      if rng is not None and rng.random() < self._corrupt_share:
        corrupt[row] = True
        ids = self._ids(self._task.corrupt(self._examples[index], rng))
      else:
        ids = self._right.get(index)
        if ids is None:
          ids = self._ids(self._task.demonstration(self._examples[index]))
          self._right[index] = ids
      rows[row, : len(ids)] = ids
    return rows, corrupt

  def _ids(self, text: str) -> Sequence[int]:
    try:
      ids = self._encode(text)
    except ValueError as error:
      raise DataError(f"demonstration {text[:60]!r}: {error}") from error
    if len(ids) > self._length:
      raise DataError(
        f"the demonstration {text[:60]!r} has {len(ids)} tokens, more than"
        f" sampler.completion_length={self._length}; set that to at least"
        f" {len(ids)}."
      )
    return ids


def demonstration_batches(
  prompts: Prompts,
  task: base.Task,
  encode: Callable[[str], Sequence[int]],
  batch_size: int,
  seed: int,
  *,
  completion_length: int,
  eos_id: int,
  corrupt_share: float = 0.0,
  **placement,
) -> Batches:
  """Returns batches of demonstrations for supervised training.

  Whether a demonstration is corrupt, and how, is drawn from (seed, position),
  so it differs from epoch to epoch and not between process counts.

  Args:
    prompts: of the split.
    task: gives `demonstration` and `corrupt`.
    encode: text -> token ids.
    batch_size: B, over all processes.
    seed: of the order and of the corruption.
    completion_length: L.
    eos_id: fills the right of shorter completions.
    corrupt_share: expected share of corrupt demonstrations, 0..1.
    **placement: rows and shuffle of `Batches`.

  Returns:
    `Batches` of `DemonstrationBatch`.

  Raises:
    DataError: a task without demonstrations, or a share outside 0..1; on
      reading, a demonstration longer than L.
  """
  if task.demonstration is None or (corrupt_share and task.corrupt is None):
    raise DataError(
      f"task {task.name} has no {'corrupt ' if task.demonstration else ''}"
      "demonstrations, which supervised training on it would need."
    )
  if not 0.0 <= corrupt_share <= 1.0:
    raise DataError(f"corrupt_share={corrupt_share} must be in 0..1.")
  answers = _Answers(
    prompts.examples,
    task,
    encode,
    completion_length,
    eos_id,
    corrupt_share,
    seed,
  )

  def make(indices, positions):
    tokens, mask = prompts.rows(indices)
    completion, corrupt = answers.rows(indices, positions)
    cut = prompts.cut[indices]
    return DemonstrationBatch(tokens, mask, completion, corrupt, cut)

  return Batches(make, len(prompts), batch_size, seed, **placement)
