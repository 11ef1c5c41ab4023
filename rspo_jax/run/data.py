"""From a task's examples to batches of token arrays.

1. `load_examples` gives a split as a random-access sequence.
2. Batches are a Grain `MapDataset` indexed by step: examples are shuffled anew
   each epoch, and the batch of step t is a pure function of (seed, t). The only
   state to save is t.
3. Each process takes its rows of the global batch (`sharding.Split`).
4. Prompts are tokenised once, the first time they are met, and kept in one
   array; a prompt that does not fit is found before the first batch.

Axis letters as in the README: B prompts a batch, b of them on this process, P
prompt length, L completion length.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rspo_jax.config import schema
from rspo_jax.tasks import base

# Above this many, only the prompts with the most characters are tokenised in
# advance to see whether they fit.
_CHECKED_PROMPTS = 4096


class DataError(ValueError):
  """The data cannot be used as it is; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class PromptBatch:
  """This process's share of a batch of prompts, or a split's in its order.

  Attributes:
    tokens: i32 [b, P], padded on the left.
    mask: bool [b, P], False on padding.
    examples: the b examples.
    cut: bool [b], of which only the tail is there.
  """

  tokens: np.ndarray
  mask: np.ndarray
  examples: Sequence[base.Example]
  cut: np.ndarray


def load_examples(
  task: base.Task, split: str, settings: schema.Data
) -> Sequence[base.Example]:
  """Returns a split of a task's data as a random-access sequence.

  Raises:
    DataError: unknown split or size, a source file that cannot be read, a
      malformed row (file and line named), an empty split.
  """
  try:
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
  through the checkpoint's chat template. `d1` and `espo` write the format of
  the reply themselves, so that a base model without template can read them.

  Args:
    task: gives the user's text.
    example: of the task.
    style: name of the prompt template.
    tokenizer: of the checkpoint.

  Raises:
    DataError: style "chat" without a template, or one that renders nothing.
  """
  text = task.prompt(example, style)
  if style == "compact" or (style != "chat" and tokenizer.template is None):
    return text
  if tokenizer.template is None:
    raise DataError(
      "task.prompt_style='chat' needs a chat template, and the checkpoint has "
      "none: put the original model's into chat_template.jinja, or use "
      "task.prompt_style=compact."
    )
  prompt = tokenizer.chat([{"role": "user", "content": text}])
  if not prompt.strip():
    raise DataError(
      f"the checkpoint's chat template makes nothing of {text[:60]!r}; correct "
      "chat_template, or use task.prompt_style=compact."
    )
  return prompt


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
    user_text: example -> the part of the prompt that differs; its characters
      say which prompts are the longest, without a rendering of each. None:
      the prompt itself.

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
    user_text: Callable[[base.Example], str] | None = None,
  ):
    self.examples = examples
    self._user_text = user_text or prompt
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
      sizes = np.array([len(self._user_text(e)) for e in self.examples])
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

  def batch(self, indices: np.ndarray) -> PromptBatch:
    """Returns some examples with their prompts."""
    tokens, mask = self.rows(indices)
    picked = [self.examples[i] for i in indices.tolist()]
    return PromptBatch(tokens, mask, picked, self.cut[indices])


class Batches:
  """Batches by step: `batches[t]` is a function of (seed, t) alone.

  Grain shuffles the examples anew each epoch and cuts their endless order into
  batches; `dataset` is the Grain dataset, for those who want to go on from it.

  Args:
    make: (indices i64 [b], positions i64 [b]) -> batch; a position counts
      examples from the start of the run, over all epochs.
    count: examples of the split.
    batch_size: B, over all processes.
    seed: of the order.
    rows: i64 [b], places in a batch of those that this process wants
      (`sharding.Split.held`); None: all.
    shuffle: whether to shuffle each epoch.
  """

  def __init__(
    self,
    make: Callable[[np.ndarray, np.ndarray], Any],
    count: int,
    batch_size: int,
    seed: int,
    *,
    rows: np.ndarray | None = None,
    shuffle: bool = True,
  ):
    # Imported here: it takes most of a second, which a first line of output or
    # a verifier should not wait for.
    import grain

    if batch_size < 1:
      raise DataError(f"batch size {batch_size} must be positive.")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    outside = rows[(rows < 0) | (rows >= batch_size)]
    if len(outside):
      raise DataError(
        f"row {outside[0]} must be in 0..{batch_size - 1}, the rows of a batch."
      )
    if not 0 <= seed < 2**32:
      raise DataError(f"data seed {seed} must be in 0..2^32-1.")

    def share(step, indices):
      return make(indices[rows], step * batch_size + rows)

    order = grain.MapDataset.range(count)
    if shuffle:
      order = order.shuffle(seed=seed)
    self.dataset = order.repeat().batch(batch_size).map_with_index(share)

  def __getitem__(self, step: int):
    """Returns this process's share of the batch of a step."""
    return self.dataset[step]


class Ahead:
  """Batches of which the next ones are made while this one is used.

  Whatever order the steps are asked for in, each is what `batches[step]` is.

  Args:
    batches: by step.
    steps: number of steps; none is made past the last.
  """

  def __init__(self, batches: Batches, steps: int):
    self._dataset, self._steps = batches.dataset, steps
    self._iterator, self._next = None, -1

  def __getitem__(self, step: int):
    """Returns the batch of a step and begins with the one after it.

    Raises:
      DataError: this batch cannot be made; of a later one it comes later.
    """
    import grain

    if step != self._next:
      self.close()
      # One thread makes them all, so that what they share needs no lock.
      options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
      rest = self._dataset[step : self._steps]
      self._iterator = iter(rest.to_iter_dataset(options))
    self._next = step + 1
    return next(self._iterator)

  def close(self) -> None:
    """Ends the thread; a batch under way is thrown away."""
    if self._iterator is not None:
      self._iterator.close()


def prompt_batches(
  prompts: Prompts, batch_size: int, seed: int, **placement
) -> Batches:
  """Returns batches of prompts for rollouts: `Batches` of `PromptBatch`.

  Args:
    prompts: of the split.
    batch_size, seed, **placement: as of `Batches`.
  """
  return Batches(
    lambda indices, positions: prompts.batch(indices),
    len(prompts),
    batch_size,
    seed,
    **placement,
  )
