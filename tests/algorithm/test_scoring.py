"""Which scores a step needs: what the plan says is what the work costs."""

import itertools

import pytest

from rspo_jax.algorithm import scoring
from rspo_jax.algorithm.microbatches import StepSettings
from rspo_jax.algorithm.objectives import ObjectiveSettings

GROUP, SEQUENCES, MASKS = 4, 16, 2

CASES = [
  pytest.param(name, *options, id="-".join(map(str, (name, *options))))
  for name in ("rspo", "rft", "espo", "sft")
  for options in itertools.product(
    (1, 3), (GROUP, 2), (False, True), (False, True), (False, True)
  )
]


def planned(name, updates, micro, skip, shared, stale):
  """A plan; `micro` 2 holds no whole group, so that centring takes two passes."""
  objective = ObjectiveSettings(
    name=name, group_size=GROUP, kl_weight=0.1, skip_equal_groups=skip
  )
  step = StepSettings(micro, updates_per_rollout=updates)
  return scoring.plan(
    objective, step, MASKS, SEQUENCES, shared_base=shared, stale=stale
  )


@pytest.mark.parametrize(
  ("name", "updates", "micro", "skip", "shared", "stale"), CASES
)
def test_counted_forwards_are_those_of_the_scores_that_are_asked_for(
  name, updates, micro, skip, shared, stale
):
  plan = planned(name, updates, micro, skip, shared, stale)
  kept = 0.5
  asked = 0.0
  for update in range(updates):
    needed = plan.before(update)
    # One pass over both streams is two forwards of work.
    asked += needed.reference + needed.policy + plan.policy_again(update)
    asked += plan.inside
  asked *= 1.0 if plan.early else kept
  asked += updates * (plan.ratio == "sampler")
  assert plan.score_forwards(kept) == asked * MASKS
  assert plan.update_forwards(kept) == 3.0 * updates * MASKS * kept


def test_the_reference_is_scored_once_however():
  for case in CASES:
    plan = planned(*case.values)
    for update in range(plan.updates):
      outside = plan.before(update).reference
      assert outside + plan.inside == plan.uses_reference


def test_calls_outside_the_updates_make_all_the_forwards_there():
  for case in CASES:
    plan = planned(*case.values)
    forwards = plan.updates * (plan.ratio == "sampler")
    for update in range(plan.updates):
      needed = plan.before(update)
      forwards += needed.reference + needed.policy + plan.policy_again(update)
    each = 2 if plan.before(0).together else 1
    assert plan.calls == -(-forwards // each)


def test_a_ratio_is_to_what_has_changed_since_the_rollout():
  assert planned("espo", 1, GROUP, False, False, False).ratio == ""
  assert planned("espo", 3, GROUP, False, False, False).ratio == "updates"
  assert planned("espo", 1, GROUP, False, False, True).ratio == "sampler"
  assert planned("rspo", 3, GROUP, False, False, True).ratio == ""


def test_policy_and_reference_share_a_pass_where_they_share_a_base():
  inside = planned("rspo", 1, GROUP, False, True, False)
  assert inside.inside and not inside.before(0).reference
  outside = planned("rspo", 1, 2, False, True, False)
  assert not outside.inside and outside.before(0).together
  apart = planned("rspo", 1, 2, False, False, False)
  assert apart.before(0) == scoring.Needed(True, True, False)


def two_passes(centring, micro_batch, **options):
  """Whether a plan takes two passes."""
  objective = ObjectiveSettings(centring=centring, group_size=GROUP)
  step = StepSettings(micro_batch, **options)
  return scoring.plan(objective, step, MASKS, SEQUENCES).two_passes


def test_one_pass_where_the_centring_set_fits():
  assert not two_passes("group", 4)
  assert two_passes("group", 2)
  assert not two_passes("group", 8, shards=2)
  assert two_passes("group", 4, shards=2)  # half a group a shard
  assert not two_passes("batch", 16)
  assert two_passes("batch", 8)
  assert not two_passes("none", 1)
  assert two_passes("none", 1, passes="two")
  with pytest.raises(ValueError, match=r"'one' is not exact .*multiple of 4"):
    two_passes("group", 2, passes="one")
  with pytest.raises(ValueError, match=r"train\.passes='three'"):
    two_passes("group", 4, passes="three")


def test_one_pass_wants_all_masks_of_a_sequence_together():
  assert two_passes("group", GROUP, micro_masks=2)
  with pytest.raises(ValueError, match=r"train\.micro_masks=2.*'two'"):
    two_passes("group", GROUP, micro_masks=2, passes="one")
