"""Advantages, reward-implied targets, and the objectives that use them.

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
metrics) and an entry of `OBJECTIVES`; `train_step` sums over micro-batches.
The first two functions run on the host, in numpy, on rewards.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

LAMBDA_UNITS = ("token", "sequence")
CENTRINGS = ("group", "batch", "none")
GAP_MASKS = ("shared", "leave_one_out")


def group_advantages(rewards: np.ndarray, normalize: bool = True) -> np.ndarray:
  """Advantage of each completion within its prompt's group.

  (r - mean) / (std + 1e-4) with ddof 1, or r - mean without `normalize`.
  Exactly 0 where all rewards of a group are equal, which is tested by their
  extremes: float32 means of equal numbers need not equal them.

  Args:
    rewards: f32 [b, G].
    normalize: divide by the group's standard deviation.

  Returns:
    f32 [b, G].

  Raises:
    ValueError: a group of one, or a reward that is not finite.
  """
  rewards = np.asarray(rewards, np.float64)
  if rewards.ndim != 2 or rewards.shape[1] < 2:
    raise ValueError(
      f"rewards of shape {rewards.shape} have no groups to compare; "
      "rollout.group_size must be at least 2."
    )
  if not np.isfinite(rewards).all():
    prompt, completion = np.argwhere(~np.isfinite(rewards))[0]
    raise ValueError(
      f"the reward of completion {completion} of prompt {prompt} is "
      f"{rewards[prompt, completion]}; a verifier must return finite numbers."
    )
  advantages = rewards - rewards.mean(1, keepdims=True)
  if normalize:
    advantages /= rewards.std(1, ddof=1, keepdims=True) + 1e-4
  equal = equal_groups(rewards)
  return np.where(equal[:, None], 0.0, advantages).astype(np.float32)


def rewarded_advantages(correct: np.ndarray) -> np.ndarray:
  """Advantage of rejection sampling: N' / N+ for right completions, else 0.

  N+ counts the right completions, N' the completions of groups that have one
  (groups without any are dropped); the mean over kept sequences of A_i x_i is
  then the plain mean of x over right completions.

  Args:
    correct: bool [b, G].

  Returns:
    f32 [b, G].
  """
  correct = np.asarray(correct, bool)
  right = correct.sum()
  kept = correct.any(1).sum() * correct.shape[1]
  return (correct * (kept / max(right, 1))).astype(np.float32)


def equal_groups(rewards: np.ndarray) -> np.ndarray:
  """bool [b]: groups all of whose rewards [b, G] are the same."""
  rewards = np.asarray(rewards)
  return rewards.max(1) == rewards.min(1)


def targets(advantages: np.ndarray, lambda_: float) -> np.ndarray:
  """Reward-implied relative log-ratio A / lambda, f32 like `advantages`.

  In the unit of lambda; zeros, which nothing reads, where lambda is 0.
  """
  if lambda_ == 0:
    return np.zeros_like(advantages, dtype=np.float32)
  return (np.asarray(advantages, np.float64) / lambda_).astype(np.float32)


@struct.dataclass
class Terms:
  """What an objective sees of N = B * G sequences, groups contiguous.

  Attributes:
    policy, reference: f32 [N, K], scores a mask, nats per token.
    advantage, target: f32 [N].
    length: f32 [N], scored tokens L_i.
    keep: f32 [N], 1 for sequences that count, 0 for dropped groups.
  """

  policy: jax.Array
  reference: jax.Array
  advantage: jax.Array
  target: jax.Array
  length: jax.Array
  keep: jax.Array


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
  """The objective and its options (allowed values in configs/base.py).

  Attributes:
    name: key of `OBJECTIVES`.
    lambda_: temperature of the KL-regularised problem, in `lambda_unit`.
    lambda_unit: "token" (meets d) or "sequence" (meets L d).
    centring: set over which the mean relative score is taken out.
    subtract_reference: False drops the reference from the gap (ablation).
    gap_masks: "shared" uses all masks in gap and direction; "leave_one_out"
      computes the gap that multiplies a draw without that draw.
    group_size: completions a prompt, G.
    draw_size: canvases of one independent mask draw (from the estimator).
  """

  name: str = "rspo"
  lambda_: float = 0.01
  lambda_unit: str = "sequence"
  centring: str = "group"
  subtract_reference: bool = True
  gap_masks: str = "shared"
  group_size: int = 8
  draw_size: int = 1

  def __post_init__(self):
    if self.name not in OBJECTIVES:
      raise ValueError(
        f"objective.name={self.name!r} is unknown; choose one of "
        f"{', '.join(sorted(OBJECTIVES))}."
      )
    if not (np.isfinite(self.lambda_) and self.lambda_ >= 0):
      raise ValueError(
        f"objective.lambda_={self.lambda_} must be a finite number >= 0."
      )
    for key, allowed in (
      ("lambda_unit", LAMBDA_UNITS),
      ("centring", CENTRINGS),
      ("gap_masks", GAP_MASKS),
    ):
      if getattr(self, key) not in allowed:
        raise ValueError(
          f"objective.{key}={getattr(self, key)!r} must be one of {allowed}."
        )


def _mean(x, keep):
  """Mean of x [N] over kept sequences, 0 where none is kept."""
  return (x * keep).sum() / jnp.maximum(keep.sum(), 1.0)


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
  relative = terms.policy - jax.lax.stop_gradient(terms.reference)  # [N, K]
  if not settings.subtract_reference:
    relative = terms.policy
  scale = terms.length if settings.lambda_unit == "sequence" else 1.0
  d = relative.mean(-1)  # [N]
  centred = d - centre(d, terms.keep, settings)
  in_unit = scale * d
  in_unit = in_unit - centre(in_unit, terms.keep, settings)
  gap = _gap(terms, in_unit, settings)
  if settings.gap_masks == "shared":
    loss = -gap * centred
  else:
    loss = _leave_one_out(terms, relative, scale, settings)
  metrics = _gap_metrics(terms, relative, d, in_unit, gap, settings)
  return loss, metrics


def _gap(terms, estimate, settings):
  """Stopped A - lambda * estimate, through the target where it exists."""
  target, advantage = terms.target, terms.advantage
  if estimate.ndim == 2:
    target, advantage = target[:, None], advantage[:, None]
  if settings.lambda_ == 0:
    return jnp.broadcast_to(advantage, estimate.shape)
  return jax.lax.stop_gradient(settings.lambda_ * (target - estimate))


def _leave_one_out(terms, relative, scale, settings):
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
  scale = jnp.reshape(scale * jnp.ones(n), (n, 1))
  others = scale * others
  others = others - centre(others, terms.keep, settings)
  gap = _gap(terms, others, settings)  # [N, U]
  centred = by_draw - centre(by_draw, terms.keep, settings)
  return -(gap * centred).mean(-1)


def _gap_metrics(terms, relative, d, in_unit, gap, settings):
  """Scalars that tell whether the gap is alive and calibrated."""
  keep, advantage = terms.keep, terms.advantage
  spread = _std(in_unit, keep)
  advantage_std = _std(advantage, keep)
  covariance = _mean(
    (in_unit - _mean(in_unit, keep)) * (advantage - _mean(advantage, keep)),
    keep,
  )
  tiny = 1e-12
  metrics = {
    "score/policy_mean": _mean(terms.policy.mean(-1), keep),
    "score/relative_mean": _mean(d, keep),
    "score/relative_std": _std(d, keep),
    "score/centred_std": spread,
    "gap/std": _std(gap, keep),
    # 0 where no advantage differs: there is nothing to have a share in.
    "gap/lambda_share": jnp.where(
      advantage_std > tiny,
      settings.lambda_ * spread / jnp.maximum(advantage_std, tiny),
      0.0,
    ),
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
    uses_reference: whether the reference's scores are needed.
  """

  loss: Callable
  advantages: Callable
  uses_reference: bool = True


OBJECTIVES = {
  "rspo": Objective(
    rspo, lambda rewards, correct, norm: group_advantages(rewards, norm)
  ),
  "rft": Objective(
    rft, lambda rewards, correct, norm: rewarded_advantages(correct)
  ),
  "sft": Objective(
    sft,
    lambda rewards, correct, norm: np.ones_like(rewards, np.float32),
    uses_reference=False,
  ),
}
