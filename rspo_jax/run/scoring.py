"""Scores of a batch, as the run's plan asks for them (algorithm/scoring.py)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rspo_jax.algorithm import streams
from rspo_jax.algorithm.types import RolloutBatch
from rspo_jax.run import rollout
from rspo_jax.run.runs import Run

# Nats per token between policy and reference before anything was learnt.
START_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of a batch for one update, from `estimate`.

  Attributes:
    reference: under the reference; None where it is not used.
    policy: under the policy, for the update's two passes; else None.
    old: under the parameters of the rollout, for ratios; else None.
  """

  reference: Any
  policy: Any
  old: Any


def unjudged_batch(run: Run, out: rollout.Completions) -> RolloutBatch:
  """Completions as a batch, before anything is known of them."""
  settings = run.settings.rollout
  found = rollout.before_rewards(settings.prompts, settings.group_size)
  return run.program.batch_fn(out, found)


def mask_key(run: Run, update: int, step: int | None = None) -> jax.Array:
  """Key of the masks of one of a step's updates, shared by all scores.

  Of the present step where none is given.
  """
  step = run.state.step if step is None else step
  return streams.mask_key(run.settings.run.seed, step, update)


def scores_under(run: Run, params, batch, update: int, step: int | None = None):
  """Scores of a batch under parameters, with the masks of an update."""
  key = mask_key(run, update, step)
  return run.program.estimate_fn(params, batch, key)


def scores_of_both(run: Run, batch, update: int):
  """(policy's scores, reference's) of a batch from one pass."""
  state = run.state.train
  params = run.program.policy(state.params, state.reference)
  return run.program.pair_fn(params, batch, mask_key(run, update))


def score(run: Run, batch, old=()) -> list[Scores]:
  """Scores of a batch before its first update, for each of its updates.

  Args:
    run: whose step it is.
    batch: of the step.
    old: those under the parameters that sampled it, where they are older.
  """
  plan, out = run.settings.scores, []
  for update in range(plan.updates):
    needed = plan.before(update)
    reference = policy = None
    if needed.together:
      policy, reference = scores_of_both(run, batch, update)
    else:
      if needed.reference:
        reference = scores_under(run, run.reference, batch, update)
      if needed.policy:
        policy = scores_under(run, run.policy, batch, update)
    # The parameters that sampled are the policy's, if not older.
    sampler = policy if plan.ratio == "updates" else None
    out.append(Scores(reference, policy, old[update] if old else sampler))
  return out


def check_start(run: Run, batch, reference) -> None:
  """Before the first update policy and reference are one: d must be 0."""
  if run.state.step:
    return
  if run.settings.scores.inside:
    policy, reference = scores_of_both(run, batch, 0)
  elif reference is None:
    return
  else:
    policy = scores_under(run, run.policy, batch, 0)
  worst = float(jnp.abs(policy - reference).max())
  if worst != 0.0:
    run.writer.warn(
      f"Relative scores before the first update are off by {worst:.2e} nats "
      "per token where they should be exactly 0: policy and reference are "
      "not scored alike."
    )


def check_first_update(run: Run, values) -> None:
  """Policy and reference inside the gradient's program, before it moved them.

  1e-6 nats per token in float32; with bfloat16 what is measured is the noise
  floor of d, which is said.
  """
  if run.state.step or "score/relative_std" not in values:
    return
  if not run.settings.objective.subtract_reference:
    return  # what is called relative then is the policy's own
  worst = max(abs(values["score/relative_mean"]), values["score/relative_std"])
  dtype = run.program.model.config.compute_dtype
  if dtype != "float32":
    run.writer.say(
      f"Noise floor of d in {dtype}: {worst:.1e} nats per token, measured "
      "where policy and reference are one."
    )
  elif worst > START_TOLERANCE:
    run.writer.warn(
      f"Relative scores inside the first update are off by {worst:.2e} nats "
      f"per token, more than {START_TOLERANCE:.0e}: the gradient's program "
      "does not score as the reference's does."
    )
