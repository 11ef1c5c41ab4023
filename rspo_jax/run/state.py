"""What a run is, apart from its folder and what serves it.

Exactly what a checkpoint holds: arrays, which lie on the devices, and a record,
which is JSON. A run that starts from both is the run that was saved.
"""

import dataclasses
from typing import Any

import jax

from rspo_jax.algorithm.types import TrainState
from rspo_jax.run import collapse, incident
from rspo_jax.run import program as program_lib
from rspo_jax.run.rollout import Completions

# What the record holds as it is.
_PLAIN = (
  "lambda_",
  "computed",
  "seconds",
  "first_eval",
  "last_eval",
  "by_difficulty",
)


@dataclasses.dataclass
class Sampled:
  """A rollout, done or under way.

  Attributes:
    step: whose completions they are.
    prompts: of this process, a batch of data.py.
    completions: of all processes.
    begun_s: clock when it was dispatched; None: by an earlier process.
    seconds: until it was seen to be done; None: it was not yet.
    old: where ratios are to parameters of the step before, scores of the
      completions under them for each of the step's updates, in the rollout's
      order.
  """

  step: int
  prompts: Any
  completions: Completions
  begun_s: float | None = None
  seconds: float | None = None
  old: list[jax.Array] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class RunState:
  """A run between two steps.

  Attributes:
    lambda_: of the next step.
    train: what updates change; None in an evaluation of the model as loaded.
    step: steps done.
    ahead: rollout of the next step, where it is done already.
    pending: row of metrics that is still to be written, or None.
    computed: forwards of one whole sequence, since the start.
    seconds: spent so far, by what on.
    first_eval, last_eval: metrics of evaluations; empty before the first.
    by_difficulty: the last one's.
    tally: of mishaps.
    watch: what collapses by and by.
  """

  lambda_: float
  train: TrainState | None = None
  step: int = 0
  ahead: Sampled | None = None
  pending: dict[str, float] | None = dataclasses.field(default_factory=dict)
  computed: float = 0.0
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  first_eval: dict[str, float] = dataclasses.field(default_factory=dict)
  last_eval: dict[str, float] = dataclasses.field(default_factory=dict)
  by_difficulty: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  tally: incident.Tally = dataclasses.field(default_factory=incident.Tally)
  watch: collapse.Watch = dataclasses.field(default_factory=collapse.Watch)

  def count_seconds(self, key: str, value: float) -> None:
    """Adds to what the run has spent on something."""
    self.seconds[key] = self.seconds.get(key, 0.0) + value

  def arrays(self) -> dict[str, Any]:
    """The part of a checkpoint that lies on the devices."""
    ahead = self.ahead and {
      "completions": self.ahead.completions,
      "old": self.ahead.old,
    }
    return {"train": self.train, "ahead": ahead}

  def record(self) -> dict[str, Any]:
    """The part that is JSON."""
    return {name: getattr(self, name) for name in _PLAIN} | {
      "pending": incident.encode(self.pending),
      "tally": dataclasses.asdict(self.tally),
      "watch": dataclasses.asdict(self.watch),
      "ahead": self.ahead and {"seconds": self.ahead.seconds},
    }


def template(
  program: program_lib.Program, record: dict[str, Any]
) -> dict[str, Any]:
  """Abstract `RunState.arrays` of a checkpoint with this record."""
  ahead = program.ahead_template() if record["ahead"] else None
  return {"train": program.state_template, "ahead": ahead}


def from_checkpoint(
  step: int, arrays: dict[str, Any], record: dict[str, Any], batches=None
) -> RunState:
  """The state that was saved.

  Args:
    step: of the checkpoint.
    arrays, record: as `RunState` gave them.
    batches: of the run, for the prompts of the rollout that waits; None: it is
      not wanted.
  """
  ahead = None
  if arrays["ahead"] and batches is not None:
    ahead = Sampled(
      step, batches[step], **arrays["ahead"], seconds=record["ahead"]["seconds"]
    )
  return RunState(
    train=arrays["train"],
    step=step,
    ahead=ahead,
    pending=incident.decode(record["pending"]),
    tally=incident.Tally(**record["tally"]),
    watch=collapse.Watch(**record["watch"]),
    **{name: record[name] for name in _PLAIN},
  )
