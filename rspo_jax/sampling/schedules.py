"""How many positions a step commits, and which.

LLaDA spreads a block's masks evenly over its steps; a threshold takes all that
are confident enough, a factor f rank r while confidence >= 1 - f / (r + 2), both
always the best one (Fast-dLLM, arXiv 2505.22618). Dream takes the share 1 - s/t
of the masks still there, or tosses a coin a position.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.sampling import proposals

# --- Which ------------------------------------------------------------------


def ranks(confidence: jax.Array, eligible: jax.Array) -> jax.Array:
  """Rank of each entry among the eligible of its row, ties by lowest index.

  Args:
    confidence: f32 [n, W].
    eligible: bool [n, W]; only these count, whatever the others' confidence.

  Returns:
    i32 [n, W], 0 for the largest. Counted by comparing all pairs: W is a
    block, and a sort on the CPU costs more than W squared fused comparisons.
  """
  mine, other = confidence[:, :, None], confidence[:, None, :]
  index = jnp.arange(confidence.shape[1])
  earlier = index[None, :] < index[:, None]  # [W, W]
  beats = (other > mine) | ((other == mine) & earlier)
  return jnp.sum(beats & eligible[:, None, :], axis=-1, dtype=jnp.int32)


def select_by_quota(confidence, eligible, quota, settings):
  """The quota [n] most confident positions of each row: bool [n, W]."""
  del settings
  return eligible & (ranks(confidence, eligible) < quota[:, None])


def select_by_threshold(confidence, eligible, quota, settings):
  """The best position and all at least as confident as the threshold."""
  del quota
  best = ranks(confidence, eligible) == 0
  return eligible & (best | (confidence >= settings.threshold))


def select_by_factor(confidence, eligible, quota, settings):
  """Ranks r while confidence >= 1 - factor / (r + 2), and always the best.

  The last masked position is taken with the one before it, as in the
  reference program, whose scan does not tell passing from failing there.
  """
  del quota
  rank = ranks(confidence, eligible)
  masks = jnp.sum(eligible, axis=1, dtype=jnp.int32)[:, None]  # [n, 1]
  fails = (rank > 0) & (confidence < 1 - settings.factor / (rank + 2))
  stop = jnp.where(eligible & fails, rank, masks)
  stop = jnp.min(stop, axis=1, keepdims=True)
  count = jnp.where(stop >= masks - 1, masks, stop)
  return eligible & (rank < count)


def select_by_coin(confidence, eligible, share, settings):
  """Each position on its own with probability share."""
  del settings
  return eligible & (confidence < share[:, None])


# --- How many ---------------------------------------------------------------


def even_quota(remaining, step, eligible, settings):
  """LLaDA: what the block has left, spread evenly over its steps.

  Args:
    remaining: i32 [n], unspent quota: the block's masks when it started.
    step: i32 [], index of the step in the block.
    eligible: bool [n, W].
    settings: `SamplerSettings`.

  Returns:
    i32 [n]: ceil(remaining / steps left), which gives base + 1 to the first
    (masks mod steps) steps and base to the others.
  """
  del eligible
  left = settings.block_steps - step
  return (remaining + left - 1) // left


def dream_shares(steps: int, epsilon: float) -> np.ndarray:
  """Share 1 - s/t of the masks to commit at each step, f32 [steps].

  Times fall evenly from 1 to epsilon. Rounded in float32 from both ends, as
  the reference does: the floor of masks * share hangs on the last bit.
  """
  width = np.float32((np.float32(epsilon) - np.float32(1)) / np.float32(steps))
  index = np.arange(steps + 1, dtype=np.float32)
  low = np.float32(1) + width * index
  high = np.float32(epsilon) - width * (np.float32(steps) - index)
  times = np.where(np.arange(steps + 1) < (steps + 1) // 2, low, high)
  times = times.astype(np.float32)
  shares = (np.float32(1) - times[1:] / times[:-1]).astype(np.float32)
  shares[-1] = 1  # the last step takes what is left
  return shares


def share_quota(remaining, step, eligible, settings):
  """The step's share itself, for coins: f32 [n]."""
  del remaining
  shares = dream_shares(settings.block_steps, settings.time_epsilon)
  return jnp.full(eligible.shape[:1], jnp.asarray(shares)[step])


def floor_quota(remaining, step, eligible, settings):
  """Dream: floor of the row's mask count times the step's share, i32 [n].

  The reference takes the batch's mean count, which is the same for rows alike;
  of unlike ones (ended, partly given) it would leave the fuller ones masked.
  """
  masks = jnp.sum(eligible, axis=1, dtype=jnp.int32).astype(jnp.float32)
  share = share_quota(remaining, step, eligible, settings)
  return jnp.floor(masks * share).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """One way to take a step.

  Attributes:
    propose: (logits, settings, ids, draws) -> (token, confidence).
    quota: (remaining, step, eligible, settings) -> [n].
    select: (confidence, eligible, quota, settings) -> bool [n, W].
  """

  propose: Callable
  quota: Callable
  select: Callable


ALGORITHMS = {
  "llada": Algorithm(proposals.llada_step, even_quota, select_by_quota),
  "maskgit_plus": Algorithm(
    proposals.maskgit_plus_step, floor_quota, select_by_quota
  ),
  "topk_margin": Algorithm(
    proposals.topk_margin_step, floor_quota, select_by_quota
  ),
  "entropy": Algorithm(proposals.entropy_step, floor_quota, select_by_quota),
  "origin": Algorithm(proposals.origin_step, share_quota, select_by_coin),
}


def algorithm_of(settings) -> Algorithm:
  """The algorithm of the settings, whose confidence may decide how many."""
  algorithm = ALGORITHMS[settings.algorithm]
  if settings.threshold is not None:
    return dataclasses.replace(algorithm, select=select_by_threshold)
  if settings.factor is not None:
    return dataclasses.replace(algorithm, select=select_by_factor)
  return algorithm
