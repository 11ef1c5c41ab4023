"""Says when a policy is collapsing, by its own rollouts.

Each sign compares the mean of the last steps with that of the first ones:

| sign | metric | warned about when |
|---|---|---|
| entropy | minus `score/policy_mean`, nats per token | below a tenth of the start |
| diversity | `rollout/distinct_share` | all completions of a group alike |
| length | `rollout/length_mean`, tokens | below a quarter of the start |
| equal groups | `reward/equal_groups` | above 95 %: no more signal |

The score is an ELBO of the policy's own completions, so minus its mean bounds
their entropy from above: where it is small, so is the entropy. A warning is
given once, and again only when the sign comes back.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

ENTROPY_SHARE = 0.1
LENGTH_SHARE = 0.25
EQUAL_GROUPS = 0.95

_METRICS = {
  "entropy": "score/policy_mean",
  "diversity": "rollout/distinct_share",
  "length": "rollout/length_mean",
  "equal_groups": "reward/equal_groups",
}


@dataclasses.dataclass
class Watch:
  """The signs of one run so far; `dataclasses.asdict` of it is JSON.

  Attributes:
    first: values of the first steps, by sign.
    last: values of the latest steps, by sign.
    told: signs that were warned about and are still there.
  """

  first: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  last: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  told: list[str] = dataclasses.field(default_factory=list)

  def see(
    self, values: Mapping[str, Any], window: int, group_size: int
  ) -> list[str]:
    """Takes note of a step.

    Args:
      values: its metrics.
      window: steps of a mean; 0: nothing is looked for.
      group_size: completions of a prompt, G.

    Returns:
      A line for every sign that has just appeared.
    """
    if not window or not values.get("update/kept_share", 1.0):
      return []
    warnings = []
    for sign, metric in _METRICS.items():
      if metric not in values:
        continue
      first = self.first.setdefault(sign, [])
      last = self.last.setdefault(sign, [])
      if len(first) < window:
        first.append(float(values[metric]))
      last.append(float(values[metric]))
      del last[:-window]
      if len(last) < window:
        continue
      start, now = statistics.fmean(first), statistics.fmean(last)
      text = _collapsed(sign, start, now, group_size)
      if text and sign not in self.told:
        self.told.append(sign)
        warnings.append(f"Over the last {window} steps {text}")
      elif not text and sign in self.told:
        self.told.remove(sign)
    return warnings


def _collapsed(sign: str, start: float, now: float, group_size: int) -> str:
  """The clause of a warning, empty where all is well."""
  if sign == "entropy" and -now < ENTROPY_SHARE * -start:
    return (
      f"the policy gave its completions {-now:.3g} nats per token, at the "
      f"start {-start:.3g}: its entropy is collapsing. Raise "
      "objective.lambda_ or rollout.temperature, or lower "
      "optimizer.learning_rate."
    )
  if sign == "diversity" and now <= 1.0 / group_size + 1e-6:
    return (
      "all completions of a prompt were alike: there is nothing left to "
      "compare. Raise rollout.temperature, or stop here."
    )
  if sign == "length" and now < LENGTH_SHARE * start:
    return (
      f"completions had {now:.3g} tokens, at the start {start:.3g}: they are "
      "collapsing to nothing. Look at samples/ for what the reward pays for."
    )
  if sign == "equal_groups" and now > EQUAL_GROUPS:
    return (
      f"{100 * now:.0f} % of the groups had equal rewards and taught "
      "nothing. The task is solved or out of reach: use other prompts, or a "
      "larger rollout.group_size."
    )
  return ""
