"""A task of the user's own: rows with prompts, and a function that scores them.

`task.name=MODULE:FUNCTION` with `data.source=FILE` is a task. The function is
called in worker processes (`workers`) as

    FUNCTION(row, completion) -> score

with a row of the file, and gives one of

- a number, the reward; 1 and above counts as correct,
- True or False, for 1 and 0,
- {"reward": number, "correct": bool, "parts": {name: number}, "reason": text},
  all but the first optional.

`reward.extra=MODULE:FUNCTION` adds the score of such a function to the reward of
any task, times the weight of the part `extra`.

A call that takes too long, ends its process or returns anything else counts as
wrong, with reward 0, and its verdict says why.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rspo_jax.config import schema
from rspo_jax.datasets import files
from rspo_jax.devices import workers
from rspo_jax.tasks import base, prompts

STYLES = ("compact", "chat", *prompts.STYLES)
WEIGHTS = {"reward": 1.0}

_MAX_REASON = 200
_MAX_PARTS = 32


@dataclasses.dataclass(frozen=True)
class RewardSettings:
  """How users' functions are called.

  Attributes:
    extra: `module:function` whose score is added to a task's reward; empty:
      none.
    processes: how many call it at a time.
    limits: of one call.
  """

  extra: str = ""
  processes: int = 2
  limits: workers.Limits = dataclasses.field(default_factory=workers.Limits)


def _number(value: Any) -> float | None:
  """Returns a finite number as float, None for anything else."""
  if not isinstance(value, int | float):
    return None
  try:
    value = float(value)
  except OverflowError:
    return None
  return value if math.isfinite(value) else None


def verdict(outcome: workers.Outcome) -> base.Verdict:
  """Reads what a user's function returned."""

  def failed(why: str) -> base.Verdict:
    return base.Verdict(0.0, False, {}, f"{base.NO_VERDICT}{why}")

  if outcome.reason:
    return failed(outcome.reason)
  value = outcome.value
  if not isinstance(value, dict):
    value = {"reward": value}
  reward = _number(value.get("reward"))
  if reward is None:
    return failed(f"a score must be a finite number, got {value!r:.60}")
  parts = value.get("parts", {})
  if not isinstance(parts, dict) or len(parts) > _MAX_PARTS:
    return failed(f"parts must be at most {_MAX_PARTS} named numbers")
  numbers = {str(name): _number(part) for name, part in parts.items()}
  if None in numbers.values():
    return failed(f"parts must be finite numbers, got {parts!r:.60}")
  correct = bool(value.get("correct", reward >= 1.0))
  reason = str(value.get("reason", f"scored {reward:g}"))[:_MAX_REASON]
  # Whatever it says must be fit for a file and a terminal.
  reason = reason.encode("utf-8", "replace").decode("utf-8")
  return base.Verdict(reward, correct, numbers | {"reward": reward}, reason)


def prompt(example: base.Example, style: str) -> str:
  """Returns the row's prompt, in the words of a style where it has some."""
  if style in prompts.STYLES:
    return prompts.question(example["prompt"], style)
  return example["prompt"]


def _demonstration(example: base.Example) -> str:
  if not isinstance(example.get("demonstration"), str):
    raise ValueError(
      f"the row with the prompt {example['prompt']!r:.60} has no text"
      " 'demonstration', which supervised training needs."
    )
  return example["demonstration"]


def parse_row(row) -> base.Example:
  """Turns a row into an example: all its fields, the text as `prompt`."""
  prompt = files.field(row, "prompt", "question", "problem")
  if not isinstance(prompt, str) or not prompt:
    raise ValueError(f"expected text as the prompt, got {prompt!r:.60}.")
  return {**row, "prompt": prompt}


def difficulty(example: base.Example) -> str | None:
  """The field `difficulty` of a row, where it has one."""
  found = example.get("difficulty")
  return None if found is None else str(found)


def make_task(target: str, settings: RewardSettings) -> base.Task:
  """Makes the task that a user's function scores.

  Args:
    target: `module:function`.
    settings: how it is called.

  Raises:
    ValueError: the name is not of that form.
  """
  pool = workers.pool(target, settings.processes, settings.limits)

  def examples(split: str, data: schema.Data) -> Sequence[base.Example]:
    if not data.source:
      raise ValueError(
        f"task.name={target} needs data.source=PATH, a JSONL file with a prompt"
        " and what else the function wants to know in each row; write {split}"
        " in the path for one file a split."
      )
    found = files.load_split(data.source, split, parse_row)
    pool.start()
    return found

  def strict(pairs: base.Pairs) -> list[base.Finding]:
    found = [verdict(outcome) for outcome in pool.map(pairs)]
    return [(each.correct, each.parts, each.reason) for each in found]

  return base.Task(
    name=target,
    examples=examples,
    words=prompt,
    demonstration=_demonstration,
    strict=strict,
    weights=WEIGHTS,
    styles=STYLES,
    difficulty=difficulty,
  )


def with_extra(task: base.Task, settings: RewardSettings) -> base.Task:
  """Adds the score of `settings.extra` to a task's rewards.

  Its part is called `extra`, with weight 1 unless the weights say otherwise; a
  score of its own never makes an answer correct.
  """
  pool = workers.pool(settings.extra, settings.processes, settings.limits)

  def examples(split: str, data: schema.Data) -> Sequence[base.Example]:
    pool.start()
    return task.examples(split, data)

  def extra(pairs: base.Pairs) -> list[base.Verdict]:
    return [verdict(outcome) for outcome in pool.map(pairs)]

  return dataclasses.replace(
    task,
    examples=examples,
    extra=extra,
    weights={**task.weights, base.EXTRA: 1.0},
  )
