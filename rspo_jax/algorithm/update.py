"""One optimisation step: masks, scores, objective, gradients, optax update.

1. Masks of the whole batch are drawn from one key and sliced, never drawn per
   micro-batch; policy and reference share them.
2. `estimate` (no gradient) scores sequences under given parameters: the
   reference's scores, and in the two-pass form the policy's too.
3. `update`, one pass: autodiff through the objective, micro-batch by
   micro-batch; exact where the centring set lies within a micro-batch.
   Two passes: the objective's gradient with respect to the scores of the whole
   batch gives one weight a mask, and the second pass accumulates
   weight * grad(score); exact for any micro-batch, and for a part of a
   sequence's masks at a time (`micro_masks`): memory flat in N and K.
   Both give the same gradient (rspo.md, "What is linear is cheap").
4. AdamW with global-norm clipping and a schedule (optimizer.py), in float32;
   what is stored in bfloat16 is rounded stochastically (rounding.py).

What is trained may be a part of what is computed with: with an adapter the
state holds the adapter alone, and the frozen rest is an argument that every
step shares. Policy and reference are then two streams of one forward pass
(`pair_fn`), so that each frozen weight is read, and gathered, once for both.

Dropped sequences cost nothing: they come last in every shard, and the loop
over micro-batches ends (a traced bound, no recompilation) where no kept
sequence is left.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rspo_jax.algorithm import likelihood, objectives, rounding, streams
from rspo_jax.algorithm.microbatches import MicroBatches, StepSettings
from rspo_jax.algorithm.optimizer import updates_applied
from rspo_jax.algorithm.scoring import ScorePlan
from rspo_jax.algorithm.types import RolloutBatch, Sizes, Terms


def _scores_fn(logprob_fn, mask_id, per_token):
  """scores(params, batch, masks): what an objective sees of sequences.

  Scores f32 [n, K], or row log-probs f32 [n, U, R] `per_token`.
  """
  fn = likelihood.logprobs if per_token else likelihood.score

  def scores(params, batch, masks):
    return fn(
      logprob_fn, params, batch.tokens, batch.token_mask, masks, mask_id
    )

  return scores


def make_estimate(
  logprob_fn: Callable,
  mask_id: int,
  settings: StepSettings,
  mask_settings: likelihood.LikelihoodSettings,
  per_token: bool = False,
) -> Callable:
  """estimate(params, batch, key) -> f32 [N, K]; 0 for skipped sequences.

  Row log-probs f32 [N, U, R] instead for objectives `per_token`; a pair where
  `logprob_fn` scores policy and reference in one pass.
  """
  scores_of = _scores_fn(logprob_fn, mask_id, per_token)

  def estimate(params, batch: RolloutBatch, key):
    masks = likelihood.batch_masks(key, mask_settings, batch)
    cut = MicroBatches(len(batch.keep), settings, *masks.corrupt.shape[1:3])
    pieces = (cut.split(batch), cut.split_masks(masks))

    def one(index):
      piece, mask = jax.tree.map(lambda x: x[index], pieces)
      return scores_of(params, piece, mask)

    def body(index, scores):
      return jax.tree.map(
        lambda all_, new: all_.at[index].set(new), scores, one(index)
      )

    scores = jax.tree.map(
      lambda x: jnp.zeros((cut.count, *x.shape), jnp.float32),
      jax.eval_shape(one, 0),
    )
    scores = jax.lax.fori_loop(0, cut.active(batch.keep), body, scores)
    return jax.tree.map(cut.join, scores)

  return estimate


def make_reorder(settings: StepSettings) -> Callable:
  """reorder(scores [N, ...], batch): as `estimate` would give them for it.

  The scores are those of the rollout's completions in its order, before the
  rewards were known and groups dropped.
  """
  whole = dataclasses.replace(settings, micro_masks=0)

  def reorder(scores, batch: RolloutBatch):
    cut = MicroBatches(len(scores), whole)
    pieces = cut.split(scores[batch.row])
    used = jnp.arange(cut.count) < cut.active(batch.keep)
    used = used.reshape(-1, *(1,) * (pieces.ndim - 1))
    return cut.join(jnp.where(used, pieces, 0.0))

  return reorder


def _counts(masks):
  """Scored tokens of each canvas, f32 [n, K]."""
  counts = (masks.weight > 0).sum(-1).astype(jnp.float32)
  return counts.reshape(len(counts), -1)


def _sizes(batch, masks) -> Sizes:
  """Means over the kept sequences of the whole batch."""
  kept = jnp.maximum(batch.keep.sum(), 1.0)
  counts = _counts(masks)
  rows = (masks.weight > 0).any(2).sum((1, 2))
  mean = lambda x: (x * batch.keep).sum() / kept  # noqa: E731
  return Sizes(
    length=mean(batch.completion_mask.sum(-1)),
    rows=mean(rows),
    canvases=mean((counts > 0).sum(-1)),
  )


@dataclasses.dataclass(frozen=True)
class _Loss:
  """The loss of a batch, or of a micro-batch of it.

  Attributes:
    objective: what is minimised.
    lambda_: f32 [].
    sizes: of the whole batch.
    kept: f32 [], its kept sequences, at least 1.
  """

  objective: objectives.ObjectiveSettings
  lambda_: Any
  sizes: Sizes
  kept: jax.Array

  def terms(self, batch, masks, policy, reference, old) -> Terms:
    """What the objective sees."""
    entry = objectives.OBJECTIVES[self.objective.name]
    return Terms(
      policy=policy,
      reference=reference,
      old=old,
      advantage=batch.advantage,
      target=batch.target,
      lambda_=self.lambda_,
      length=batch.completion_mask.sum(-1).astype(jnp.float32),
      keep=batch.keep,
      count=_counts(masks),
      weight=masks.weight if entry.per_token else None,
      sizes=self.sizes,
    )

  def __call__(self, batch, *arguments):
    """(share of the batch's mean loss, metrics); arguments as of `terms`."""
    entry = objectives.OBJECTIVES[self.objective.name]
    loss, metrics = entry.loss(self.terms(batch, *arguments), self.objective)
    return (loss * batch.keep).sum() / self.kept, metrics


def make_update(
  logprob_fn: Callable,
  mask_id: int,
  optimizer,
  learning_rate: Callable,
  settings: StepSettings,
  mask_settings: likelihood.LikelihoodSettings,
  objective: objectives.ObjectiveSettings,
  plan: ScorePlan,
  join: Callable | None = None,
  pair_fn: Callable | None = None,
  sum_dtype: str = "float32",
) -> Callable:
  """Builds `update`.

  Args:
    logprob_fn, mask_id: score the policy (likelihood.score).
    optimizer, learning_rate, settings, mask_settings, objective, plan: the run's.
    join: (state.params, frozen, state.reference) -> what `logprob_fn` takes;
      None: state.params.
    pair_fn: `logprob_fn` of both streams, where the reference is scored inside.
    sum_dtype: of sums of bfloat16 parameters' gradients. "bfloat16" takes half
      the memory and rounds stochastically: its error grows as M^(1/2).

  Args of `update`: the state (donate it), batch, lambda, MASKS key of the update,
  and scores of the batch from `estimate` with that key: the reference's, for
  two passes the policy's, for ratios those of the parameters that sampled it.
  `frozen` is what `join` wants. Returns (state, metrics,
  `objectives.calibration`). What is not finite, or a batch without a kept
  sequence, leaves all but the step as it was: `update/applied` is 0.
  """
  per_token = objectives.OBJECTIVES[objective.name].per_token
  scores_fn = _scores_fn(
    pair_fn if plan.inside else logprob_fn, mask_id, per_token
  )

  def update(
    state, batch, lambda_, key, reference, policy=None, old=None, frozen=None
  ):
    _check_scores(plan, objective, policy, old)
    masks = likelihood.batch_masks(key, mask_settings, batch)
    cut = MicroBatches(len(batch.keep), settings, *masks.corrupt.shape[1:3])
    kept = jnp.maximum(batch.keep.sum(), 1.0)
    loss_of = _Loss(objective, lambda_, _sizes(batch, masks), kept)

    def scores_of(params, *piece):
      if join is not None:
        params = join(params, frozen, state.reference)
      return scores_fn(params, *piece)

    piece_loss, more = _piece_loss(
      plan, loss_of, scores_of, (batch, masks, policy, reference, old)
    )
    gradients, scores = _accumulated(
      piece_loss,
      state.params,
      (cut.split(batch), *cut.split_masks((masks, *more))),
      cut.count,
      cut.active(batch.keep),
      _no_scores(cut, masks, per_token, 1 + plan.inside),
      streams.summing_key(key),
      sum_dtype,
    )
    policy, *inside = map(cut.join, scores)
    reference = inside[0] if inside else reference
    arguments = (batch, masks, policy, reference, old)
    loss, metrics = loss_of(*arguments)
    state, said = _applied(
      state,
      gradients,
      (loss, policy, reference),
      batch.keep,
      optimizer,
      streams.rounding_key(key),
      learning_rate,
    )
    found = objectives.calibration(loss_of.terms(*arguments), objective)
    return state, metrics | said | {"loss": loss}, found

  return update


def _piece_loss(plan, loss_of, scores_of, whole):
  """What a micro-batch differentiates, and what of the batch it needs for it.

  Args:
    plan: whether in one pass or two, and who scores the reference.
    loss_of: `_Loss` of the batch.
    scores_of: (parameters, piece, masks) -> scores of the policy, or of policy
      and reference where the update scores both.
    whole: arguments of `loss_of` for the whole batch.

  Returns:
    ((parameters, piece, masks, *more) -> (loss, scores of the piece); more,
    of the whole batch, to be cut like the masks).
  """
  batch, masks, policy, reference, old = whole

  def two_passes(params, piece, mask, weight):
    scores = scores_of(params, piece, mask)
    return (weight * scores).sum(), (scores,)

  def both_inside(params, piece, mask, old):
    scores, reference = scores_of(params, piece, mask)
    reference = jax.lax.stop_gradient(reference)
    loss, _ = loss_of(piece, mask, scores, reference, old)
    return loss, (scores, reference)

  def one_pass(params, piece, mask, reference, old):
    scores = scores_of(params, piece, mask)
    return loss_of(piece, mask, scores, reference, old)[0], (scores,)

  if plan.two_passes:
    weigh = lambda policy: loss_of(batch, masks, policy, reference, old)[0]  # noqa: E731
    return two_passes, (jax.grad(weigh)(policy),)  # like the scores
  if plan.inside:
    return both_inside, (old,)
  return one_pass, (reference, old)


def _check_scores(plan, objective, policy, old) -> None:
  """Refuses an update without the scores that it needs."""
  if plan.two_passes and policy is None:
    raise ValueError(
      "policy=None: two passes need the policy's scores of the batch; give "
      "those of `estimate`, or use train.passes='one'."
    )
  if plan.ratio and old is None:
    raise ValueError(
      f"old=None: objective.name={objective.name!r} weighs by a ratio to the "
      "parameters of the rollout, whose scores train.updates_per_rollout="
      f"{plan.updates} needs; give those of `estimate`."
    )


def _no_scores(cut, masks, per_token: bool, count: int):
  """`count` zeros to write scores into, micro-batch by micro-batch."""
  draws, canvases = masks.corrupt.shape[1:3]
  shape = masks.rows.shape[1:] if per_token else (draws * canvases,)
  shape = (shape[0] // cut.parts, *shape[1:])
  return (jnp.zeros((cut.count, cut.size, *shape), jnp.float32),) * count


def _accumulated(
  piece_loss, params, pieces, count, active, empty, key, sum_dtype
):
  """(sum of the micro-batches' gradients, their scores [M, n, ...]).

  Args:
    piece_loss: of `_piece_loss`.
    params: what is trained.
    pieces: arguments of `piece_loss` behind the parameters, each [M, ...].
    count: M.
    active: i32 [], leading micro-batches that have a kept sequence.
    empty: zeros like the scores.
    key: of the bits that round sums.
    sum_dtype: as of `make_update`.
  """

  def gradient_of(index):
    piece = jax.tree.map(lambda x: x[index], pieces)
    (_, scores), gradient = jax.value_and_grad(piece_loss, has_aux=True)(
      params, *piece
    )
    return gradient, scores

  if count == 1:
    # No second copy of the gradients.
    gradients, scores = gradient_of(0)
    return gradients, jax.tree.map(lambda x: x[None], scores)

  def body(index, carry):
    gradient, new = gradient_of(index)
    gradients, scores = carry
    bits = jax.random.fold_in(key, index)
    return rounding.add(gradients, gradient, bits), jax.tree.map(
      lambda all_, x: all_.at[index].set(x), scores, new
    )

  start = jax.tree.map(
    lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, sum_dtype)), params
  )
  return jax.lax.fori_loop(0, active, body, (start, empty))


def _applied(state, gradients, finite, keep, optimizer, key, learning_rate):
  """The state after a step of the optimizer, where it is sound; metrics.

  Args:
    state: before.
    gradients: of the whole batch.
    finite: what must be, or the step is not applied; None is passed over. A
      score that is not finite could cancel out of the loss.
    keep: f32 [N]. Without a kept sequence the gradient is 0, on which momentum
      would act.
    optimizer, learning_rate: as of `make_update`.
    key: of the bits that round what is stored.
  """
  gradients = rounding.widen(gradients)
  norm = optax.global_norm(gradients)
  applied = jnp.isfinite(norm) & (keep.sum() > 0)
  for each in jax.tree.leaves(finite):
    applied &= jnp.isfinite(each).all()
  before = (state.params, state.opt_state)
  wide_params, wide_moments = rounding.widen(before)
  steps, moments = optimizer.update(gradients, wide_moments, wide_params)
  after = rounding.store(
    (optax.apply_updates(wide_params, steps), moments), before, key
  )
  params, opt_state = jax.tree.map(
    lambda new, old: jnp.where(applied, new, old), after, before
  )
  metrics = {
    "grad_norm": norm,
    "lr": learning_rate(updates_applied(state)),
    "update/applied": applied.astype(jnp.float32),
    "update/kept_share": keep.mean(),
  }
  state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
  return state, metrics
