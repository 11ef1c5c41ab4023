"""From a task's examples to batches of token arrays.

1. `load_examples` gives a split as a random-access sequence.
2. Batches are a Grain `MapDataset` indexed by step: examples are shuffled anew
   each epoch, and the batch of step t is a pure function of (seed, t). The only
   state to save is t.
3. Each process takes its rows of the global batch: process p of n has rows
   p*B/n .. (p+1)*B/n - 1, whatever n is.
4. Prompts are tokenised once, the first time they are met, and kept in one
   array; a prompt that does not fit is found before the first batch.

Axis letters as in the README: B prompts a batch, b of them on this process, P
prompt length, L completion length.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rspo_jax.datasets import streams
from rspo_jax.tasks import base

# Above this many, only the prompts with the most characters are tokenised in
# advance to see whether they fit.
_CHECKED_PROMPTS = 4096

_STREAM = 0x6F726472  # keeps the order's draws apart from other ones
_ENDLESS = 2**40  # steps


class DataError(ValueError):
  """The data cannot be used as it is; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class PromptBatch:
  """This process's share of a batch of prompts.

  Attributes:
    tokens: i32 [b, P], padded on the left.
    mask: bool [b, P], False on padding.
    examples: the b examples.
    cut: bool [b], of which only the tail is there.
  """

  tokens: np.ndarray
  mask: np.ndarray
  examples: list[base.Example]
  cut: np.ndarray


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


def load_examples(
  task: base.Task, split: str, settings: base.DataSettings
) -> Sequence[base.Example]:
  """Returns a split of a task's data as a random-access sequence.

  Raises:
    DataError: unknown split or size, a source file that cannot be read, a
      malformed row (file and line named), an empty split.
  """
  try:
    base.check_split(split)
    examples = task.load(split, settings)
  except ValueError as error:
    raise DataError(str(error)) from error
  if not len(examples):
    raise DataError(
      f"the {split} split of {task.name} is empty"
      f" (data.source={settings.source!r}); give a source with rows for it."
    )
  return examples


def prompt_text(
  task: base.Task, example: base.Example, style: str, tokenizer
) -> str:
  """Returns the prompt of an example as the model is given it.

  Every style but the compact one is a message to a general model: it goes
  through the checkpoint's chat template, where it has one.

  Args:
    task: gives the user's text.
    example: of the task.
    style: name of the prompt template.
    tokenizer: of the checkpoint.
  """
  text = task.prompt(example, style)
  if style == "compact" or tokenizer.template is None:
    return text
  return tokenizer.chat([{"role": "user", "content": text}])


class Prompts:
  """The prompts of a split as token rows, each tokenised when first met.

  Args:
    examples: random-access examples.
    prompt: example -> text of the prompt.
    encode: text -> token ids.
    prompt_length: P, the budget.
    pad_id: fills the left of shorter prompts.
    long_prompts: "refuse" a prompt longer than the budget, or "keep_tail" of
      it: the question, which stands at the end.

  Attributes:
    cut: bool [n], the prompts tokenised so far that lost their beginning.

  Raises:
    DataError: a prompt longer than the budget that is to be refused.
  """

  def __init__(
    self,
    examples: Sequence[base.Example],
    prompt: Callable[[base.Example], str],
    encode: Callable[[str], Sequence[int]],
    prompt_length: int,
    pad_id: int,
    long_prompts: str = "refuse",
  ):
    self.examples = examples
    self.cut = np.zeros(len(examples), bool)
    self._keep_tail = long_prompts == "keep_tail"
    self._prompt = prompt
    self._encode = encode
    self._tokens = np.full((len(examples), prompt_length), pad_id, np.int32)
    self._length = np.full(len(examples), -1, np.int32)  # -1: not tokenised
    self._check_longest()

  def _check_longest(self) -> None:
    """Tokenises the prompts most likely to exceed the budget."""
    rows = range(len(self.examples))
    if len(rows) > _CHECKED_PROMPTS:
      sizes = np.array([len(self._prompt(e)) for e in self.examples])
      rows = np.argpartition(sizes, -_CHECKED_PROMPTS)[-_CHECKED_PROMPTS:]
    for row in rows:
      self._fill(int(row))

  def _fill(self, row: int) -> None:
    text = self._prompt(self.examples[row])
    try:
      ids = self._encode(text)
    except ValueError as error:
      raise DataError(f"prompt {row}, {text[:60]!r}: {error}") from error
    budget = self._tokens.shape[1]
    if len(ids) > budget:
      if not self._keep_tail:
        raise DataError(
          f"prompt {row} has {len(ids)} tokens, more than"
          f" data.prompt_length={budget}; set that to at least {len(ids)}, drop"
          " the example, or set data.long_prompts=keep_tail. It begins"
          f" {text[:60]!r}."
        )
      self.cut[row] = True
      ids = ids[-budget:]
    if len(ids):
      self._tokens[row, -len(ids) :] = ids
    self._length[row] = len(ids)

  def __len__(self) -> int:
    return len(self.examples)

  def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens i32 [b, P] and mask bool [b, P] of some examples."""
    for row in indices[self._length[indices] < 0].tolist():
      self._fill(row)
    tokens = self._tokens[indices]
    padding = tokens.shape[1] - self._length[indices]
    return tokens, np.arange(tokens.shape[1]) >= padding[:, None]


class _Order:
  """The endless order of examples: every epoch reads each once.

  An epoch's order is the ranking of random words drawn from (seed, epoch): the
  same under every version of every library, and cheap for few examples too.
  """

  def __init__(self, count: int, seed: int, shuffle: bool):
    self._count, self._seed, self._shuffle = count, seed, shuffle
    self._recent: dict[int, np.ndarray] = {}

  def _epoch(self, epoch: int) -> np.ndarray:
    """Returns the order of one epoch: i64 [count]."""
    if epoch not in self._recent:
      if len(self._recent) > 1:
        del self._recent[min(self._recent)]
      words = streams.raw_words((_STREAM, self._seed, epoch), self._count)
      self._recent[epoch] = words.argsort(kind="stable")
    return self._recent[epoch]

  def indices(self, positions: np.ndarray) -> np.ndarray:
    """Returns the examples at positions counted from the start of the run."""
    epochs, rows = np.divmod(positions, self._count)
    if not self._shuffle:
      return rows
    found = np.empty(len(rows), np.int64)
    for epoch in np.unique(epochs).tolist():
      mine = epochs == epoch
      found[mine] = self._epoch(epoch)[rows[mine]]
    return found


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


class Batches:
  """Batches by step: `batches[t]` is a function of (seed, t) alone.

  Iterating starts at `start_step` and never ends. `dataset` is the same as a
  Grain dataset, for those who want to go on from it.

  Args:
    prompts: of the split.
    make: (prompts, indices i64 [b], positions i64 [b]) -> batch; a position
      counts examples from the start of the run, over all epochs.
    batch_size: B, over all processes.
    seed: of the order.
    start_step: where iteration begins.
    rows: i64 [b], places in a batch of those that this process wants
      (`sharding.Split.held`); None: all.
    shuffle: whether to shuffle each epoch.
  """

  def __init__(
    self,
    prompts: Prompts,
    make: Callable[[Prompts, np.ndarray, np.ndarray], Any],
    batch_size: int,
    seed: int,
    *,
    start_step: int = 0,
    rows: np.ndarray | None = None,
    shuffle: bool = True,
  ):
    if batch_size < 1:
      raise DataError(f"batch size {batch_size} must be positive.")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    outside = rows[(rows < 0) | (rows >= batch_size)]
    if len(outside):
      raise DataError(
        f"row {outside[0]} must be in 0..{batch_size - 1}, the rows of a batch."
      )
    self._prompts = prompts
    self._make = make
    self._batch_size = batch_size
    self._rows = rows
    self._start_step = start_step
    if not 0 <= seed < 2**32:
      raise DataError(f"data seed {seed} must be in 0..2^32-1.")
    self._order = _Order(len(prompts), seed, shuffle)
    # Imported here: it takes most of a second, which a first line of output or
    # a verifier should not wait for.
    import grain

    self.dataset = grain.MapDataset.range(_ENDLESS).map(self._batch)

  def _batch(self, step: int):
    positions = int(step) * self._batch_size + self._rows
    return self._make(self._prompts, self._order.indices(positions), positions)

  def __getitem__(self, step: int):
    """Returns this process's share of the batch of a step."""
    if not 0 <= step < _ENDLESS:
      raise IndexError(f"step {step} must be in 0..{_ENDLESS - 1}")
    return self.dataset[step]

  def __iter__(self) -> Iterator[Any]:
    step = self._start_step
    while True:
      yield self[step]
      step += 1


class Ahead:
  """Batches of which the next one is made while this one is used.

  One thread makes them all, so that what they share needs no lock. Whatever
  order the steps are asked for in, each is what `batches[step]` is.

  Args:
    batches: by step.
    steps: number of steps; none is made past the last.
  """

  def __init__(self, batches: Batches, steps: int):
    self._batches = batches
    self._steps = steps
    self._thread = concurrent.futures.ThreadPoolExecutor(
      1, thread_name_prefix="data"
    )
    self._next: tuple[int, concurrent.futures.Future] | None = None

  def __getitem__(self, step: int):
    """Returns the batch of a step and begins with the one after it.

    Raises:
      DataError: this batch cannot be made; of a later one it comes later.
    """
    if self._next is None or self._next[0] != step:
      self._begin(step)
    batch = self._next[1].result()
    if step + 1 < self._steps:
      self._begin(step + 1)
    return batch

  def _begin(self, step: int) -> None:
    self._next = step, self._thread.submit(self._batches.__getitem__, step)

  def close(self) -> None:
    """Ends the thread; a batch under way is thrown away."""
    self._thread.shutdown(wait=True, cancel_futures=True)


def prompt_batches(
  examples: Sequence[base.Example],
  prompt: Callable[[base.Example], str],
  encode: Callable[[str], Sequence[int]],
  batch_size: int,
  seed: int,
  *,
  prompt_length: int,
  pad_id: int,
  long_prompts: str = "refuse",
  **placement,
) -> Batches:
  """Returns batches of prompts for rollouts.

  Args:
    examples: see `load_examples`.
    prompt: example -> text of the prompt.
    encode: text -> token ids.
    batch_size: B, over all processes.
    seed: of the order.
    prompt_length: P.
    pad_id: fills the left of shorter prompts.
    long_prompts: as in `Prompts`.
    **placement: start_step, rows and shuffle of `Batches`.

  Returns:
    `Batches` of `PromptBatch`.
  """

  def make(prompts, indices, positions):
    del positions
    tokens, mask = prompts.rows(indices)
    picked = [examples[i] for i in indices.tolist()]
    return PromptBatch(tokens, mask, picked, prompts.cut[indices])

  prompts = Prompts(
    examples, prompt, encode, prompt_length, pad_id, long_prompts
  )
  return Batches(prompts, make, batch_size, seed, **placement)


def encode_prompts(
  examples: Sequence[base.Example],
  prompt: Callable[[base.Example], str],
  encode: Callable[[str], Sequence[int]],
  prompt_length: int,
  pad_id: int,
  long_prompts: str = "refuse",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tokenises all prompts in the order given (evaluation).

  Args:
    examples: n examples.
    prompt: example -> text of the prompt.
    encode: text -> token ids.
    prompt_length: P.
    pad_id: fills the left of shorter prompts.
    long_prompts: as in `Prompts`.

  Returns:
    tokens i32 [n, P], mask bool [n, P], False on padding, and bool [n], True
    where only the tail of a prompt was kept.

  Raises:
    DataError: a prompt longer than P that is to be refused.
  """
  prompts = Prompts(
    examples, prompt, encode, prompt_length, pad_id, long_prompts
  )
  return *prompts.rows(np.arange(len(examples))), prompts.cut


def demonstration_batches(
  examples: Sequence[base.Example],
  task: base.Task,
  prompt: Callable[[base.Example], str],
  encode: Callable[[str], Sequence[int]],
  batch_size: int,
  seed: int,
  *,
  prompt_length: int,
  completion_length: int,
  pad_id: int,
  eos_id: int,
  corrupt_share: float = 0.0,
  long_prompts: str = "refuse",
  **placement,
) -> Batches:
  """Returns batches of demonstrations for supervised training.

  Whether a demonstration is corrupt, and how, is drawn from (seed, position),
  so it differs from epoch to epoch and not between process counts.

  Args:
    examples: see `load_examples`.
    task: gives `demonstration` and `corrupt`.
    prompt: example -> text of the prompt.
    encode: text -> token ids.
    batch_size: B, over all processes.
    seed: of the order and of the corruption.
    prompt_length: P.
    completion_length: L.
    pad_id: fills the left of shorter prompts.
    eos_id: fills the right of shorter completions.
    corrupt_share: expected share of corrupt demonstrations, 0..1.
    long_prompts: as in `Prompts`.
    **placement: start_step, rows and shuffle of `Batches`.

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
  streams = _Streams(seed)
  clean_ids: dict[int, Sequence[int]] = {}

  def encode_answer(text: str) -> Sequence[int]:
    try:
      ids = encode(text)
    except ValueError as error:
      raise DataError(f"demonstration {text[:60]!r}: {error}") from error
    if len(ids) > completion_length:
      raise DataError(
        f"the demonstration {text[:60]!r} has {len(ids)} tokens, more than"
        f" sampler.completion_length={completion_length}; set that to at least"
        f" {len(ids)}."
      )
    return ids

  def make(prompts, indices, positions):
    tokens, mask = prompts.rows(indices)
    corrupt = np.zeros(len(indices), bool)
    completion = np.full((len(indices), completion_length), eos_id, np.int32)
    pairs = zip(indices.tolist(), positions.tolist(), strict=True)
    for row, (index, position) in enumerate(pairs):
      rng = streams.at(position) if corrupt_share else None
      if rng is not None and rng.random() < corrupt_share:
        corrupt[row] = True
        ids = encode_answer(task.corrupt(examples[index], rng))
      else:
        ids = clean_ids.get(index)
        if ids is None:
          ids = encode_answer(task.demonstration(examples[index]))
          clean_ids[index] = ids
      completion[row, : len(ids)] = ids
    cut = prompts.cut[indices]
    return DemonstrationBatch(tokens, mask, completion, corrupt, cut)

  prompts = Prompts(
    examples, prompt, encode, prompt_length, pad_id, long_prompts
  )
  return Batches(prompts, make, batch_size, seed, **placement)
