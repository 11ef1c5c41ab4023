"""What a task is: the one object that owns prompt, data, verifier and metric.

The same `prompt` serves training and evaluation and the same `verify` gives the
reward and the verdict, so that the two cannot drift apart.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rspo_jax.config import schema

Example = dict[str, Any]

PROTOCOLS = ("strict", "d1")
SPLITS = ("train", "validation", "test")

# How the reason of a completion begins whose verifier hung, crashed or gave
# nothing that can be used: it counts as wrong, with reward 0.
NO_VERDICT = "no verdict: "


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


@dataclasses.dataclass(frozen=True)
class Task:
  """One benchmark.

  Attributes:
    name: key in `TASKS`.
    load: (split, schema.Data) -> random-access sequence of examples.
    prompt: (example, style) -> text of the prompt.
    demonstration: example -> the clean compact answer; None where the task has
      no demonstrations.
    corrupt: (example, np.random.Generator) -> a mixed-quality compact answer;
      None where the task has none.
    verify: (example, completion, protocol="strict", weights=None) -> Verdict;
      never raises on a completion.
    weights: the default weight of each rewarded part.
    styles: names of the prompt templates.
    verify_all: (pairs of example and completion, protocol, weights) -> their
      verdicts, where a verifier is faster on many (it has worker processes);
      None: `verify` one by one.
    difficulty: example -> name of its class, by which accuracies are split, or
      None where it says nothing; None where the task knows no classes.
  """

  name: str
  load: Callable[[str, schema.Data], Sequence[Example]]
  prompt: Callable[[Example, str], str]
  demonstration: Callable[[Example], str] | None
  corrupt: Callable[[Example, Any], str] | None
  verify: Callable[..., Verdict]
  weights: Mapping[str, float]
  styles: tuple[str, ...] = ("compact",)
  verify_all: Callable[..., list[Verdict]] | None = None
  difficulty: Callable[[Example], str | None] | None = None

  def judge(
    self,
    pairs: Sequence[tuple[Example, str]],
    protocol: str = "strict",
    weights: Mapping[str, float] | None = None,
  ) -> list[Verdict]:
    """Returns the verdicts of pairs of example and completion."""
    if self.verify_all is not None:
      return self.verify_all(pairs, protocol, weights)
    return [
      self.verify(example, completion, protocol, weights)
      for example, completion in pairs
    ]


def resolve_weights(
  defaults: Mapping[str, float], weights: Mapping[str, float] | None
) -> Mapping[str, float]:
  """Returns the defaults overridden by `weights`, whose keys must be known."""
  if weights is None:
    return defaults
  unknown = sorted(set(weights) - set(defaults))
  if unknown:
    raise ValueError(
      f"reward weight for unknown part {unknown[0]!r}; this task has the parts"
      f" {', '.join(defaults)}."
    )
  return {**defaults, **weights}


def check_protocol(protocol: str) -> None:
  """Raises ValueError unless `protocol` is one of PROTOCOLS."""
  if protocol not in PROTOCOLS:
    raise ValueError(
      f"protocol={protocol!r} is not known; use one of {', '.join(PROTOCOLS)}."
    )


def check_split(split: str) -> None:
  """Raises ValueError unless `split` is one of SPLITS."""
  if split not in SPLITS:
    raise ValueError(
      f"split={split!r} does not exist; use one of {', '.join(SPLITS)}."
    )


def check_style(style: str, styles: Sequence[str]) -> None:
  """Raises ValueError unless the task has a prompt template of that name."""
  if style not in styles:
    raise ValueError(
      f"prompt style {style!r} is not known to this task; use one of"
      f" {', '.join(styles)}."
    )
