"""What a task is: the one object that owns prompt, data, verifier and metric.

The same `prompt` serves training and evaluation and the same `verify` gives the
reward and the verdict, so that the two cannot drift apart.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rspo_jax.config import keys, schema

Example = dict[str, Any]

PROTOCOLS = ("strict", "d1")
SPLITS = ("train", "validation", "test")

# How the reason of a completion begins whose verifier hung, crashed or gave
# nothing that can be used: it counts as wrong, with reward 0.
NO_VERDICT = "no verdict: "
# Part of the reward that a function of the user's adds to any task.
EXTRA = "extra"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
  """What a verifier says of one completion.

  Attributes:
    reward: what training maximises; a weighted sum of `parts` under the strict
      protocol.
    correct: whether the answer counts as solved.
    parts: named terms in [0, 1] (sudoku: `accuracy` = share of empty cells
      right).
    reason: one clause saying why.
  """

  reward: float
  correct: bool
  parts: dict[str, float]
  reason: str


# What the strict protocol finds in a completion: whether it is correct, the named
# terms, and why.
Finding = tuple[bool, dict[str, float], str]
Pairs = Sequence[tuple[Example, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One benchmark.

  Attributes:
    name: key in `TASKS`.
    examples: (split, schema.Data) -> random-access sequence of examples.
    words: (example, style) -> text of the prompt.
    demonstration: example -> the clean compact answer; None where the task has
      no demonstrations.
    corrupt: (example, np.random.Generator) -> a mixed-quality compact answer;
      None where the task has none.
    strict: (pairs of example and completion) -> what the strict protocol finds
      in each; never raises on a completion.
    d1: (example, completion) -> the verdict of the d1 protocol, which knows no
      weights; None: that of the strict protocol.
    extra: pairs -> verdicts whose rewards are added, times the weight of the
      part `EXTRA`; None: none.
    weights: the default weight of each rewarded part.
    styles: names of the prompt templates.
    difficulty: example -> name of its class, by which accuracies are split, or
      None where it says nothing; None where the task knows no classes.
  """

  name: str
  examples: Callable[[str, schema.Data], Sequence[Example]]
  words: Callable[[Example, str], str]
  strict: Callable[[Pairs], list[Finding]]
  weights: Mapping[str, float]
  styles: tuple[str, ...]
  demonstration: Callable[[Example], str] | None = None
  corrupt: Callable[[Example, Any], str] | None = None
  d1: Callable[[Example, str], Verdict] | None = None
  extra: Callable[[Pairs], list[Verdict]] | None = None
  difficulty: Callable[[Example], str | None] | None = None

  def load(self, split: str, data: schema.Data) -> Sequence[Example]:
    """Loads a split of the task's data, or of `data.source`."""
    keys.one_of("split", split, SPLITS)
    return self.examples(split, data)

  def prompt(self, example: Example, style: str) -> str:
    """Returns the text of the user's turn."""
    keys.one_of("prompt style", style, self.styles)
    return self.words(example, style)

  def verify(
    self,
    example: Example,
    completion: str,
    protocol: str = "strict",
    weights: Mapping[str, float] | None = None,
  ) -> Verdict:
    """Judges one completion; `judge` is faster on many."""
    return self.judge([(example, completion)], protocol, weights)[0]

  def judge(
    self,
    pairs: Pairs,
    protocol: str = "strict",
    weights: Mapping[str, float] | None = None,
  ) -> list[Verdict]:
    """Returns the verdicts of pairs of example and completion.

    Args:
      pairs: any text as completion.
      protocol: one of PROTOCOLS.
      weights: of parts, in place of the task's own.
    """
    if protocol not in PROTOCOLS:
      keys.one_of("protocol", protocol, PROTOCOLS)
    all_weights = self._weights(weights)
    if protocol == "d1" and self.d1 is not None:
      verdicts = [self.d1(*pair) for pair in pairs]
    else:
      verdicts = []
      rewarded = [item for item in all_weights.items() if item[0] != EXTRA]
      for correct, parts, reason in self.strict(pairs):
        reward = sum(weight * parts.get(part, 0.0) for part, weight in rewarded)
        verdicts.append(Verdict(reward, correct, parts, reason))
    if self.extra is None:
      return verdicts
    return [
      Verdict(
        own.reward + all_weights[EXTRA] * more.reward,
        own.correct,
        own.parts | {EXTRA: more.reward},
        f"{own.reason}; {EXTRA}: {more.reason}",
      )
      for own, more in zip(verdicts, self.extra(pairs), strict=True)
    ]

  def _weights(self, weights) -> Mapping[str, float]:
    """The task's weights with others in their place; parts must be known."""
    if weights is None:
      return self.weights
    unknown = sorted(set(weights) - set(self.weights))
    if unknown:
      raise ValueError(
        f"reward weight for unknown part {unknown[0]!r}; this task has the"
        f" parts {', '.join(self.weights)}."
      )
    return {**self.weights, **weights}


class Examples(Sequence):
  """Columns of generated data as a random-access sequence of examples.

  Args:
    columns: arrays of one length.
    make: (one value of each column) -> example.
  """

  def __init__(self, columns: Mapping[str, Any], make: Callable[..., Example]):
    self._columns = tuple(columns.values())
    self._make = make

  def __len__(self) -> int:
    return len(self._columns[0])

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    return self._make(*(column[index] for column in self._columns))
