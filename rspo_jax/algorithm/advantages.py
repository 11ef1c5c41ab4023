"""Advantages, targets and lambda, on the host, in numpy, from rewards."""

import numpy as np


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
