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
Those of other papers are in baselines.py. The first functions run on the host,
in numpy, on rewards.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rspo_jax import baselines
from rspo_jax.baselines import mean as _mean

LAMBDA_UNITS = ("token", "sequence")
CENTRINGS = ("group", "batch", "none")
GAP_MASKS = ("shared", "leave_one_out")
CHOICES = {
  "lambda_unit": LAMBDA_UNITS,
  "centring": CENTRINGS,
  "gap_masks": GAP_MASKS,
  "kl_reduction": baselines.KL_REDUCTIONS,
  "ratio_norm": baselines.RATIO_NORMS,
  "pairs": baselines.PAIRS,
  "negative_score": baselines.NEGATIVE_SCORES,
}


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


def solved_advantages(
  advantages: np.ndarray, correct: np.ndarray, value: float
) -> np.ndarray:
  """Advantages with `value` where a group is all right and its rewards equal.

  Relative rewards say nothing of such a group; with a positive value it is
  learnt from as rejection sampling does. (Not in the paper, whose value is 0.)
  Where they differ, among right completions too, they keep the word.

  Args:
    advantages: f32 [b, G].
    correct: bool [b, G].
    value: advantage, >= 0.

  Returns:
    f32 [b, G].
  """
  solved = np.asarray(correct, bool).all(1, keepdims=True)
  silent = (advantages == 0).all(1, keepdims=True)
  return np.where(solved & silent, np.float32(value), advantages)


def rewarded_advantages(correct: np.ndarray) -> np.ndarray:
  """Advantage of rejection sampling: N / N+ for right completions, else 0.

  N counts all completions, N+ the right ones: given those that are kept, with
  or without groups that have none, the mean over them of A_i x_i is the plain
  mean of x over right completions.

  Args:
    correct: bool [b, G], of the groups that are kept.

  Returns:
    f32 [b, G].
  """
  correct = np.asarray(correct, bool)
  return (correct * (correct.size / max(correct.sum(), 1))).astype(np.float32)


def others_advantages(rewards: np.ndarray, normalize: bool) -> np.ndarray:
  """r - mean of the group's other rewards, f32 [b, G] (leave-one-out).

  G / (G - 1) times the difference to the group's own mean.
  """
  size = np.asarray(rewards).shape[1]
  return group_advantages(rewards, normalize) * np.float32(size / (size - 1))


def population_advantages(rewards: np.ndarray) -> np.ndarray:
  """Z-scores with the population's standard deviation, f32 [b, G]."""
  advantages = group_advantages(rewards, normalize=False)
  std = np.asarray(rewards, np.float64).std(1, keepdims=True)
  return (advantages / np.where(std > 0, std, 1.0)).astype(np.float32)


def softmax_advantages(rewards: np.ndarray, normalize: bool) -> np.ndarray:
  """G (w+ - w-), w+ and w- the group's softmax of A and of -A, f32 [b, G].

  Exactly 0 where all rewards of a group are equal.
  """
  advantages = group_advantages(rewards, normalize).astype(np.float64)

  def softmax(x):
    weights = np.exp(x - x.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)

  size = advantages.shape[1]
  weights = size * (softmax(advantages) - softmax(-advantages))
  return weights.astype(np.float32)


def process_advantages(
  advantages: np.ndarray, rewards: np.ndarray, finished: np.ndarray
) -> np.ndarray:
  """A + 1[A > 0] R, R what finishing a partial canvas earns over the group.

  R_i = mean over finishes of their rewards - mean of the group's rewards
  (SAPO, arXiv 2510.01544, as its reviews describe it).

  Args:
    advantages, rewards: f32 [b, G].
    finished: f32 [F, b, G], rewards of F completions of each partial canvas.
  """
  gain = finished.mean(0) - rewards.mean(1, keepdims=True)
  return (advantages + (advantages > 0) * gain).astype(np.float32)


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
class Sizes:
  """Means over the kept sequences of the whole batch, f32 [].

  Attributes:
    length: scored tokens.
    rows: rows that score a token, over all masks.
    canvases: canvases that score a token.
  """

  length: jax.Array
  rows: jax.Array
  canvases: jax.Array


@struct.dataclass
class Terms:
  """What an objective sees of N = B * G sequences, groups contiguous.

  Values are scores f32 [N, K], a mask each, nats per token; or, for objectives
  per token, log-probs of rows f32 [N, U, R].

  Attributes:
    policy, reference: values under both; zeros where no reference is used.
    advantage, target: f32 [N].
    length: f32 [N], scored tokens L_i.
    keep: f32 [N], 1 for sequences that count, 0 for dropped groups.
    old: values under the parameters that sampled; None: they are the policy's.
    lambda_: f32 [N], where lambda follows a target share; None: the settings'.
    count: f32 [N, K], scored tokens of each canvas.
    weight: f32 [N, U, C, R], weight of each row in its canvas's score (objectives
      per token): positive where the row scores a token of the canvas.
    sizes: means over the batch that sequences are divided by.
  """

  policy: jax.Array
  reference: jax.Array
  advantage: jax.Array
  target: jax.Array
  length: jax.Array
  keep: jax.Array
  old: jax.Array | None = None
  lambda_: jax.Array | None = None
  count: jax.Array | None = None
  weight: jax.Array | None = None
  sizes: Sizes | None = None


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
  """The objective and its options (allowed values in configs/base.py).

  Attributes:
    name: key of `OBJECTIVES`.
    lambda_: temperature of the KL-regularised problem, in `lambda_unit`.
    lambda_unit: "token" (meets d) or "sequence" (meets L d).
    lambda_share: share std(lambda d) / std(A) that lambda follows from step to
      step, from `lambda_` on; 0: it stays.
    solved_advantage: of completions of a group that are all right and equally
      rewarded; 0: as any other group of equal rewards.
    centring: set over which the mean relative score is taken out.
    subtract_reference: False drops the reference from the gap (ablation).
    gap_masks: "shared" uses all masks in gap and direction; "leave_one_out"
      computes the gap that multiplies a draw without that draw.
    clip: half-width of the ratio's trust region.
    kl_weight: weight of the pull to the reference (tracerl: the old policy).
    kl_reduction: of tracerl's pull within a step, "sum" or "mean".
    ratio_norm: gdpo's log-ratio per sequence ("none") or per token ("length").
    beta: vrpo's and trafl's inverse temperature.
    pairs: vrpo's pairs, "all" of unequal rewards or the "extremes".
    sft_weight: vrpo's weight of the winner's score.
    negative_score, bound_mix, bound_power: spg's score of completions with
      negative advantage, w of its mixture, exponent of the upper bound.
    finishes: sapo's completions of each partial canvas.
    group_size: completions a prompt, G.
    draw_size: canvases of one independent mask draw (from the estimator).
  """

  name: str = "rspo"
  lambda_: float = 0.01
  lambda_unit: str = "sequence"
  centring: str = "group"
  subtract_reference: bool = True
  gap_masks: str = "shared"
  lambda_share: float = 0.0
  solved_advantage: float = 0.0
  clip: float = 0.2
  kl_weight: float = 0.0
  kl_reduction: str = "mean"
  ratio_norm: str = "none"
  beta: float = 1.0
  pairs: str = "all"
  sft_weight: float = 0.0
  negative_score: str = "mix"
  bound_mix: float = 0.5
  bound_power: float = 1.5
  finishes: int = 1
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
    for key, allowed in CHOICES.items():
      if getattr(self, key) not in allowed:
        raise ValueError(
          f"objective.{key}={getattr(self, key)!r} must be one of {allowed}."
        )


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
  metrics = _gap_metrics(terms, relative, centred, in_unit, gap, settings)
  return loss, metrics


def _gap(terms, estimate, settings):
  """Stopped A - lambda * estimate, through the target where it exists."""
  target, advantage = terms.target, terms.advantage
  if estimate.ndim == 2:
    target, advantage = target[:, None], advantage[:, None]
  if terms.lambda_ is not None:
    lambda_ = terms.lambda_.reshape(-1, *(1,) * (estimate.ndim - 1))
    return jax.lax.stop_gradient(advantage - lambda_ * estimate)
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


def _gap_metrics(terms, relative, centred, in_unit, gap, settings):
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
  lambda_ = jnp.float32(settings.lambda_)
  if terms.lambda_ is not None:
    lambda_ = terms.lambda_.max()
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


LAMBDA_RATE = 0.1  # largest change of log lambda a step
LAMBDA_RANGE = 1e4  # and from its start, either way


def follow_share(lambda_: float, share: float, settings) -> float:
  """The next lambda: towards that whose share is `settings.lambda_share`.

  By at most a factor exp(0.1) a step: at the start d is 0 and no lambda has a
  share. Stays within a factor 1e4 of `settings.lambda_`.

  Args:
    lambda_: the present one.
    share: `gap/lambda_share` of the last step.
    settings: start and target share.
  """
  step = 1.0
  if share > 0:
    step = np.clip(np.log(settings.lambda_share / share), -1.0, 1.0)
  following = lambda_ * float(np.exp(LAMBDA_RATE * step))
  start = settings.lambda_
  return float(np.clip(following, start / LAMBDA_RANGE, start * LAMBDA_RANGE))


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
      (`process_advantages`).
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
  return group_advantages(rewards, normalize)


OBJECTIVES = {
  "rspo": Objective(rspo, _from_group, span="centring", off_policy=True),
  "rft": Objective(
    rft,
    lambda rewards, correct, norm: rewarded_advantages(correct),
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
    lambda rewards, correct, norm: softmax_advantages(rewards, norm),
    reference="never",
    off_policy=True,
  ),
  "espo": Objective(
    baselines.espo,
    lambda rewards, correct, norm: others_advantages(rewards, norm),
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
    lambda rewards, correct, norm: population_advantages(rewards),
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
