"""Objectives: what a step minimises.

The optimum of KL-regularised reward maximisation with temperature lambda is
pi* ~ pi_ref exp(A / lambda), so an advantage is a *target* for the relative
log-ratio: log pi*/pi_ref = A / lambda + const(prompt). RSPO (arXiv
2605.10218, sections 3, B and D) moves the policy by the gap between the
target and the ELBO estimate of that log-ratio:

    d_i     = s_theta,i - s_ref,i            nats per token (same masks)
    d^_i    = d_i - stop(mean of d over the centring set)
    gap_i   = stop(A_i - lambda d^_i) = lambda stop(target_i - d^_i)
    loss_i  = - gap_i d^_i

whose gradient is lambda times that of 1/2 mean (d^ - A / lambda)^2. With
`lambda_unit="sequence"` the gap compares nats per sequence, L_i d_i, while
the direction stays that of s_i. With lambda = 0 it is advantage-weighted ELBO
and nothing is divided by lambda.

An objective is a pure function (Terms, ObjectiveSettings) -> (loss [N],
metrics) and an entry of `OBJECTIVES`; `update` sums over micro-batches. Those
of other papers are in baselines.py; advantages and targets are made on the
host, in advantages.py.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.algorithm import advantages, baselines
from rspo_jax.algorithm.baselines import mean as _mean
from rspo_jax.algorithm.types import Terms
from rspo_jax.config import keys, schema


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings(schema.Objective):
  """The objective and its options, with what it must know of the batch.

  Attributes:
    group_size: completions of a prompt, G.
    draw_size: canvases of one independent mask draw (from the estimator).
  """

  group_size: int = 8
  draw_size: int = 1

  def __post_init__(self):
    keys.check(self, "objective.")


def _std(x, keep):
  """Standard deviation (ddof 0) of x [N] over kept sequences."""
  return jnp.sqrt(_mean(jnp.square(x - _mean(x, keep)), keep))


def centre(x, keep, settings: ObjectiveSettings):
  """Mean of x [N, ...] over the centring set of each sequence, stopped."""
  if settings.centring == "none":
    return jnp.zeros_like(x)
  keep = keep.reshape(keep.shape + (1,) * (x.ndim - 1))
  size = settings.group_size if settings.centring == "group" else x.shape[0]
  grouped = (x * keep).reshape(-1, size, *x.shape[1:])
  counted = jnp.maximum(keep.reshape(-1, size, *keep.shape[1:]).sum(1), 1.0)
  mean = grouped.sum(1) / counted  # [N / size, ...]
  return jax.lax.stop_gradient(jnp.repeat(mean, size, axis=0))


def rspo(terms: Terms, settings: ObjectiveSettings):
  """RSPO's gap objective (module docstring; rspo.md, "Objective").

  Args:
    terms: scores, advantages, targets of N sequences.
    settings: lambda and its unit, centring set, masks of the gap.

  Returns:
    (loss f32 [N], metrics): the mean of loss over kept sequences is the
    objective; metrics are device scalars over kept sequences.
  """
  relative, centred, estimate, gap = _compared(terms, settings)
  if settings.gap_masks == "shared":
    loss = -gap * centred
  else:
    loss = _leave_one_out(terms, relative, settings)
  metrics = _gap_metrics(terms, relative, centred, estimate, gap)
  return loss, metrics


def calibration(
  terms: Terms, settings: ObjectiveSettings
) -> dict[str, jax.Array]:
  """What tells how far the policy has come, of each sequence, f32 [N].

  `relative`, d in nats per token, where a reference is scored; for RSPO also
  what its gap is made of: `target`, `advantage`, `estimate`, `gap`.
  """
  entry = OBJECTIVES[settings.name]
  if entry.per_token or not entry.uses_reference(settings):
    return {}
  relative, _, estimate, gap = _compared(terms, settings)
  columns = {"relative": relative.mean(-1)}
  if settings.name == "rspo":
    columns |= {
      "estimate": estimate,
      "gap": gap,
      "advantage": terms.advantage,
      "target": terms.target,
    }
  return columns


def _compared(terms, settings):
  """(d [N, K], d^ [N], estimate [N], gap [N]); estimate in lambda's unit."""
  relative = terms.policy
  if settings.subtract_reference:
    relative = terms.policy - jax.lax.stop_gradient(terms.reference)
  d = relative.mean(-1)
  centred = d - centre(d, terms.keep, settings)
  in_unit = _scale(terms, settings) * d
  estimate = in_unit - centre(in_unit, terms.keep, settings)
  return relative, centred, estimate, _gap(terms, estimate)


def _scale(terms, settings):
  """What makes nats per token those of lambda's unit."""
  return terms.length if settings.lambda_unit == "sequence" else 1.0


def _gap(terms, estimate):
  """Stopped A - lambda * estimate, through the target where it exists."""
  target, advantage = terms.target, terms.advantage
  if estimate.ndim == 2:
    target, advantage = target[:, None], advantage[:, None]
  gap = jnp.where(
    terms.lambda_ == 0, advantage, terms.lambda_ * (target - estimate)
  )
  return jax.lax.stop_gradient(gap)


def _leave_one_out(terms, relative, settings):
  """Loss [N] whose gap for a draw is computed without that draw."""
  n = relative.shape[0]
  by_draw = relative.reshape(n, -1, settings.draw_size).mean(-1)  # [N, U]
  draws = by_draw.shape[1]
  if draws < 2:
    raise ValueError(
      "objective.gap_masks='leave_one_out' needs two independent draws; with "
      f"{settings.draw_size} masks a draw use likelihood.masks="
      f"{2 * settings.draw_size} or more."
    )
  others = (by_draw.sum(-1, keepdims=True) - by_draw) / (draws - 1)
  scale = jnp.reshape(_scale(terms, settings) * jnp.ones(n), (n, 1))
  others = scale * others
  others = others - centre(others, terms.keep, settings)
  gap = _gap(terms, others)  # [N, U]
  centred = by_draw - centre(by_draw, terms.keep, settings)
  return -(gap * centred).mean(-1)


def _gap_metrics(terms, relative, centred, in_unit, gap):
  """Scalars that tell whether the gap is alive and calibrated.

  `centred` is in nats per token, `in_unit` the same in the unit of lambda.
  """
  keep, advantage = terms.keep, terms.advantage
  d = relative.mean(-1)
  spread = _std(in_unit, keep)
  advantage_std = _std(advantage, keep)
  covariance = _mean(
    (in_unit - _mean(in_unit, keep)) * (advantage - _mean(advantage, keep)),
    keep,
  )
  tiny = 1e-12
  lambda_ = jnp.float32(terms.lambda_)
  metrics = {
    "score/policy_mean": _mean(terms.policy.mean(-1), keep),
    "score/relative_mean": _mean(d, keep),
    "score/relative_std": _std(d, keep),
    "score/centred_std": _std(centred, keep),
    "gap/std": _std(gap, keep),
    # 0 where no advantage differs: there is nothing to have a share in.
    "gap/lambda_share": jnp.where(
      advantage_std > tiny,
      lambda_ * spread / jnp.maximum(advantage_std, tiny),
      0.0,
    ),
    "gap/lambda": lambda_,
    "calibration/slope": covariance / jnp.maximum(advantage_std**2, tiny),
    "calibration/correlation": covariance
    / jnp.maximum(advantage_std * spread, tiny),
  }
  if relative.shape[1] > 1:
    variance = jnp.var(relative, axis=-1, ddof=1)
    metrics["score/mask_variance"] = _mean(variance, keep)
  return metrics


def rft(terms: Terms, settings: ObjectiveSettings):
  """Rejection-sampling fine-tuning: plain ELBO on rewarded completions.

  loss_i = - A_i s_i with A from `rewarded_advantages`: the mean of loss is
  -(1 / N+) sum of s over the N+ rewarded completions. No reference acts; the
  relative score is measured all the same.
  """
  del settings
  policy, keep = terms.policy.mean(-1), terms.keep
  relative = policy - terms.reference.mean(-1)
  return -terms.advantage * policy, {
    "score/policy_mean": _mean(policy, keep),
    "score/relative_mean": _mean(relative, keep),
    "score/relative_std": _std(relative, keep),
  }


def sft(terms: Terms, settings: ObjectiveSettings):
  """Masked-diffusion supervised training: loss_i = - s_i.

  RSPO with advantage 1, lambda 0, no centring and no reference.
  """
  del settings
  policy = terms.policy.mean(-1)
  return -policy, {"score/policy_mean": _mean(policy, terms.keep)}


@dataclasses.dataclass(frozen=True)
class Objective:
  """An entry of `OBJECTIVES`.

  Attributes:
    loss: (Terms, ObjectiveSettings) -> (loss [N], metrics).
    advantages: (rewards [b, G], correct bool [b, G], normalize) -> f32 [b, G],
      on the host.
    reference: "always", "kl" (where kl_weight > 0) or "never" scored.
    per_token: sees log-probs of rows instead of scores of masks.
    ratio: weighs by a ratio to the parameters of the rollout.
    off_policy: without such a ratio its equation holds for completions of
      whatever parameters (`on_policy_reason` says with which settings).
    reuse: several updates on one rollout make sense.
    span: the sequences that one sequence's loss depends on: "none", "group",
      or "centring", which is the settings'.
    estimators: the mask schemes it is defined for; None: all.
    needs_difference: groups without a difference say nothing, so that they
      must be dropped.
    finishes: advantages also look at completions of partial canvases
      (`advantages.process_advantages`).
  """

  loss: Callable
  advantages: Callable
  reference: str = "always"
  per_token: bool = False
  ratio: bool = False
  off_policy: bool = False
  reuse: bool = True
  span: str = "none"
  estimators: tuple[str, ...] | None = None
  needs_difference: bool = False
  finishes: bool = False

  def uses_reference(self, settings: ObjectiveSettings) -> bool:
    """Whether the reference's values are needed."""
    if self.reference == "kl":
      return settings.kl_weight > 0
    return self.reference == "always"


def _from_group(rewards, correct, normalize):
  return advantages.group_advantages(rewards, normalize)


OBJECTIVES = {
  "rspo": Objective(rspo, _from_group, span="centring", off_policy=True),
  "rft": Objective(
    rft,
    lambda rewards, correct, norm: advantages.rewarded_advantages(correct),
    off_policy=True,
  ),
  "sft": Objective(
    sft,
    lambda rewards, correct, norm: np.ones_like(rewards, np.float32),
    reference="never",
    reuse=False,
  ),
  "diffu_grpo": Objective(
    baselines.diffu_grpo,
    _from_group,
    reference="kl",
    per_token=True,
    ratio=True,
    estimators=("mean_field",),
  ),
  "sapo": Objective(
    baselines.diffu_grpo,  # the loss is the same, the advantage is not
    _from_group,
    reference="kl",
    per_token=True,
    ratio=True,
    estimators=("mean_field",),
    finishes=True,
  ),
  "wd1": Objective(
    baselines.wd1,
    lambda rewards, correct, norm: advantages.softmax_advantages(rewards, norm),
    reference="never",
    off_policy=True,
  ),
  "espo": Objective(
    baselines.espo,
    lambda rewards, correct, norm: advantages.others_advantages(rewards, norm),
    reference="kl",
    ratio=True,
  ),
  "vrpo": Objective(
    baselines.vrpo,
    _from_group,
    span="group",
    needs_difference=True,
    off_policy=True,
  ),
  "spg": Objective(
    baselines.spg,
    _from_group,
    reference="never",
    per_token=True,
    estimators=("block_random", "uniform", "stratified", "mean_field"),
  ),
  "tracerl": Objective(
    baselines.tracerl,
    lambda rewards, correct, norm: advantages.population_advantages(rewards),
    reference="never",
    per_token=True,
    ratio=True,
    estimators=("trace",),
  ),
  "gdpo": Objective(baselines.gdpo, _from_group, reference="kl", ratio=True),
  "justgrpo": Objective(
    baselines.justgrpo,
    _from_group,
    reference="never",
    per_token=True,
    ratio=True,
    estimators=("trace",),
  ),
  "trafl": Objective(
    baselines.trafl, _from_group, span="group", off_policy=True
  ),
}


def rollout_advantages(
  rewards: np.ndarray,
  correct: np.ndarray,
  settings: ObjectiveSettings,
  keep_groups: int = 0,
  finished: np.ndarray | None = None,
) -> np.ndarray:
  """Advantages f32 [B, G] of a whole rollout.

  Args:
    rewards: f32 [B, G], of all hosts: some advantages are relative to all
      completions.
    correct: bool [B, G].
    settings: the objective, whether groups without a difference are dropped.
    keep_groups: groups that are kept at most; 0: all.
    finished: f32 [F, B, G], rewards of completions of partial canvases, for
      objectives that look at them.
  """

  def among(rewards, correct):
    found = OBJECTIVES[settings.name].advantages(
      rewards, correct, settings.normalize_advantages
    )
    if settings.solved_advantage:
      found = advantages.solved_advantages(
        found, correct, settings.solved_advantage
      )
    return found

  found = among(rewards, correct)
  if settings.skip_equal_groups:
    keep = (found != 0).any(1)
    if keep_groups:
      keep &= keep.cumsum() <= keep_groups
    # Anew: some advantages are relative to all completions that are kept.
    found = np.zeros_like(found)
    found[keep] = among(rewards[keep], correct[keep])
  if finished is not None:
    found = advantages.process_advantages(found, rewards, finished)
  return found


def on_policy_reason(settings: ObjectiveSettings) -> str:
  """Why completions must be of the parameters that are trained; "" if not.

  Ratios correct older completions (but for canvases that are finished later,
  by other parameters). A regression of differences within a group, and the
  likelihood of what was right or preferred, hold for any completions.

  Args:
    settings: the objective and its options.

  Returns:
    The reason with its remedy, or "".
  """
  entry = OBJECTIVES[settings.name]
  name = f"objective.name={settings.name!r}"
  if not entry.reuse:
    return f"{name} has no rollouts"
  if entry.finishes:
    return (
      f"{name} finishes their canvases with the present ones, which did not "
      "sample them; choose 'diffu_grpo'"
    )
  if not (entry.ratio or entry.off_policy):
    ratios = ", ".join(
      repr(key)
      for key, one in OBJECTIVES.items()
      if one.ratio and not one.finishes
    )
    return (
      f"{name} is a gradient of the policy that samples and has no ratio to "
      f"correct them; choose one that has ({ratios})"
    )
  if settings.name != "rspo":
    return ""
  if not settings.lambda_:
    return (
      "objective.lambda_=0 is a gradient of the policy that samples, without a "
      "ratio to correct them; set objective.lambda_ > 0"
    )
  if settings.centring != "group":
    return (
      f"objective.centring={settings.centring!r} leaves the prompt's constant "
      "in the relative score, which only completions of the policy average "
      "out; use objective.centring='group'"
    )
  return ""
