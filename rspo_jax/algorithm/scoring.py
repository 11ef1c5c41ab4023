"""Which scores a step needs, of whom, when, and what they cost.

A score is nats per token of a batch's completions under some parameters, with
the masks of one of the step's updates. An update may need three kinds:

1. the reference's, for objectives that compare with it;
2. the policy's own before the update, where its centring set does not fit a
   micro-batch (two passes) or micro-batches hold a part of the masks;
3. those under the parameters that sampled, where a ratio corrects for what
   has changed since: earlier updates of the step, or a whole step.

Policy and reference that share a frozen base are scored together, in one pass:
inside the update where it is one pass itself, else before it. `plan` decides
all of this once, from the settings; update, program, step, planner and records
read it.
"""

import dataclasses
import math

from rspo_jax.algorithm import objectives
from rspo_jax.algorithm.microbatches import StepSettings


@dataclasses.dataclass(frozen=True)
class Needed:
  """Scores that are computed before one of a step's updates.

  Attributes:
    reference, policy: whether theirs are.
    together: both of them, from one pass.
  """

  reference: bool
  policy: bool
  together: bool


@dataclasses.dataclass(frozen=True)
class ScorePlan:
  """The decisions of `plan`.

  Attributes:
    updates: updates on one rollout.
    masks: K, canvases that one score of a sequence takes.
    uses_reference: the objective compares with the reference.
    ratio: "": none is taken; "updates": to the policy before the step's first
      update; "sampler": to older parameters that sampled the completions.
    two_passes: an update takes the policy's scores from outside.
    shared_base: one pass scores policy and reference.
    early: nothing about the scores depends on the rewards, so that the device
      works on them while the host verifies.
  """

  updates: int
  masks: int
  uses_reference: bool
  ratio: str
  two_passes: bool
  shared_base: bool
  early: bool

  @property
  def inside(self) -> bool:
    """Whether the update scores the reference itself."""
    return self.shared_base and not self.two_passes

  def before(self, update: int) -> Needed:
    """Scores computed before the first update, for one of the updates.

    Of later updates of two passes the policy's are those for the ratio: their
    own are computed when it is their turn, by `policy_again`.
    """
    policy = self.ratio == "updates" or (self.two_passes and not update)
    reference = self.uses_reference and not self.inside
    together = self.shared_base and policy and reference
    return Needed(reference, policy, together)

  def policy_again(self, update: int) -> bool:
    """Whether an update needs the policy's scores as it stands by then."""
    return self.two_passes and update > 0

  def score_forwards(self, kept: float) -> float:
    """Forwards of one sequence that a step's scores take, over all masks.

    Args:
      kept: share of the batch that is not dropped.
    """
    scored = self.updates * self.uses_reference
    if self.ratio == "updates" or self.two_passes:
      scored += self.updates
    if self.ratio == "updates" and self.two_passes:
      # The first update's are the rollout's own.
      scored += self.updates - 1
    scored *= 1.0 if self.early else kept
    if self.ratio == "sampler":
      # By older parameters, before the rewards were known: all of them.
      scored += self.updates
    return scored * self.masks

  @property
  def calls(self) -> int:
    """Calls of a step that score outside its updates.

    Where policy and reference are scored together, in calls of that kind.
    """
    forwards = self.score_forwards(1.0) / self.masks
    forwards -= self.updates * self.inside
    return math.ceil(forwards / (1 + self.before(0).together))

  def update_forwards(self, kept: float) -> float:
    """The same for the updates themselves; a backward pass counts two."""
    return 3.0 * self.updates * self.masks * kept


def plan(
  objective: objectives.ObjectiveSettings,
  step: StepSettings,
  masks: int,
  sequences: int,
  *,
  shared_base: bool = False,
  stale: bool = False,
) -> ScorePlan:
  """Decides which scores a step needs.

  Args:
    objective: what is minimised.
    step: how a batch is cut.
    masks: K.
    sequences: of a step, N.
    shared_base: policy and reference are adapters of one frozen base and may
      be scored together.
    stale: completions are of the parameters before the last update.

  Raises:
    ValueError: one pass was asked for and would not be exact.
  """
  entry = objectives.OBJECTIVES[objective.name]
  uses_reference = entry.uses_reference(objective)
  ratio = ""
  if entry.ratio and stale:
    ratio = "sampler"
  elif entry.ratio and step.updates_per_rollout > 1:
    ratio = "updates"
  return ScorePlan(
    updates=step.updates_per_rollout,
    masks=masks,
    uses_reference=uses_reference,
    ratio=ratio,
    two_passes=_two_passes(step, objective, sequences),
    shared_base=shared_base and uses_reference,
    # Dropped groups make waiting cheaper; where the next rollout is under way
    # already, two programs at a time would take room.
    early=entry.reuse and not (objective.skip_equal_groups or stale),
  )


def _two_passes(
  settings: StepSettings, objective: objectives.ObjectiveSettings, total: int
) -> bool:
  """Whether the centring set does not lie within a micro-batch, or it is asked.

  A sequence whose masks come one part after another is no whole set either.

  Raises:
    ValueError: one pass was asked for and would not be exact.
  """
  per_shard = settings.micro_batch // settings.shards
  span = objectives.OBJECTIVES[objective.name].span
  fits = {
    "none": True,
    "group": per_shard % objective.group_size == 0,
    "batch": settings.micro_batch == total,
  }[objective.centring if span == "centring" else span]
  if settings.micro_masks:
    if settings.passes == "one":
      raise ValueError(
        "train.passes='one' differentiates all masks of a sequence together, "
        f"but train.micro_masks={settings.micro_masks}; use "
        "train.passes='two', or train.micro_masks=0."
      )
    return True
  if settings.passes == "one" and not fits:
    what = f"objective.centring={objective.centring!r}"
    if span != "centring":
      what = f"objective.name={objective.name!r}, which compares whole groups,"
    raise ValueError(
      f"train.passes='one' is not exact with {what} and train.micro_batch="
      f"{settings.micro_batch}: use train.passes='two', or a multiple of "
      f"{objective.group_size} sequences a device with groups alone centred."
    )
  return settings.passes == "two" or not fits
