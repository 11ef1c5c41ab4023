"""Scores of completions: ELBO estimates over K random masks, vectorised.

For a completion y of L scored tokens, a mask M is a set of positions whose
tokens are hidden. The score, in nats per token, is

    s = E_M [ (1/|M|) sum over j in M of log f(y_j | x, y with M hidden) ]

with |M| uniform on 1..L and M uniform given its size: the count-uniform ELBO
divided by L (rspo.md; Ou et al., arXiv 2406.03736, equation 13; Nie et al.,
arXiv 2502.09992, equation 6). A scheme draws K masks a sequence and weights
such that the mean over the K masks of the weighted log-probs estimates s.

1. `draw_masks` draws all masks of a batch at once, from one key: slicing the
   batch into micro-batches or over devices cannot change them, and policy and
   reference share them.
2. `score` corrupts the canvases, asks `logprob_fn` for the needed rows only,
   and returns one number a mask.

A mask is carried, never derived from tokens: a true token may equal the mask
id. Schemes are entries of `ESTIMATORS`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

SCOPES = ("completion", "canvas")


@struct.dataclass
class Masks:
  """Masks of a batch, in U independent draws of C canvases; K = U * C.

  Attributes:
    corrupt: bool [N, U, C, S], the hidden positions of each canvas.
    rows: i32 [N, U, R], flat indices canvas * S + position of the tokens to
      be scored; R is the static budget of a draw.
    weight: f32 [N, U, C, R], weight of each scored token in its mask's score.
  """

  corrupt: jax.Array
  rows: jax.Array
  weight: jax.Array


@dataclasses.dataclass(frozen=True)
class LikelihoodSettings:
  """How scores are estimated.

  Attributes:
    scheme: key of `ESTIMATORS`.
    masks: K, forward passes a sequence.
    scope: "completion" scores positions through the first EOS and hides later
      ones from attention; "canvas" scores all L positions as ordinary tokens.
  """

  scheme: str = "complementary"
  masks: int = 2
  scope: str = "completion"

  def __post_init__(self):
    if self.scheme not in ESTIMATORS:
      raise ValueError(
        f"likelihood.scheme={self.scheme!r} is unknown; choose one of "
        f"{', '.join(sorted(ESTIMATORS))}."
      )
    if self.scope not in SCOPES:
      raise ValueError(
        f"likelihood.scope={self.scope!r} must be one of {SCOPES}."
      )
    size = ESTIMATORS[self.scheme].draw_size
    if self.masks < 1 or self.masks % size:
      raise ValueError(
        f"likelihood.masks={self.masks} must be a positive multiple of {size} "
        f"with likelihood.scheme={self.scheme!r}; use "
        f"{max(size, self.masks // size * size)}."
      )

  @property
  def draw_size(self) -> int:
    """Canvases of one independent draw: 2 for pairs, K for joint draws."""
    estimator = ESTIMATORS[self.scheme]
    return self.masks if estimator.joint else estimator.draw_size


@dataclasses.dataclass(frozen=True)
class Estimator:
  """A mask scheme.

  Attributes:
    draw: (key, scored bool [N, L], draws U, prompt_length) -> corrupt
      bool [N, U, C, L], rows i32 [N, U, R], weight f32 [N, U, C, R].
    draw_size: canvases C of one draw.
    joint: the U draws of a sequence depend on each other.
  """

  draw: Callable
  draw_size: int
  joint: bool = False


def _ranks(noise, scored):
  """Rank of each scored position by its noise; others come last.

  noise f32 [N, U, L], scored bool [N, 1, L] -> i32 [N, U, L].
  """
  noise = jnp.where(scored, noise, jnp.inf)
  return jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)


def _uniform_count(u, low, high):
  """Integer uniform on low..high from u in [0, 1); f32 in, i32 out."""
  span = jnp.floor(u * (high - low + 1.0))
  return jnp.minimum(low + span, high).astype(jnp.int32)


def _single(corrupt, scored, prompt_length):
  """Masks of one-canvas draws: every completion position has its row."""
  n, draws, length = corrupt.shape
  count = jnp.maximum(corrupt.sum(-1, keepdims=True), 1)
  weight = jnp.where(corrupt & scored, 1.0 / count, 0.0)
  rows = prompt_length + jnp.arange(length, dtype=jnp.int32)
  return (
    corrupt[:, :, None, :],
    jnp.broadcast_to(rows, (n, draws, length)),
    weight[:, :, None, :].astype(jnp.float32),
  )


def uniform(key, scored, draws, prompt_length):
  """Independent masks: count uniform on 1..L, then a uniform subset.

  The law of "t ~ U(0, 1), hide each with probability t, redraw both when
  nothing is hidden", without the rejection loop. Unbiased.
  """
  count_key, rank_key = jax.random.split(key)
  n, length = scored.shape
  total = scored.sum(-1, keepdims=True).astype(jnp.float32)  # [N, 1]
  u = jax.random.uniform(count_key, (n, draws))
  count = _uniform_count(u, 1.0, total)
  ranks = _ranks(
    jax.random.uniform(rank_key, (n, draws, length)), scored[:, None]
  )
  corrupt = (ranks < count[:, :, None]) & scored[:, None]
  return _single(corrupt, scored[:, None], prompt_length)


def stratified(key, scored, draws, prompt_length):
  """Counts 1 + floor(L (k + u) / K), one u a sequence. Unbiased.

  The K counts of a sequence spread over 1..L; subsets are independent.
  """
  count_key, rank_key = jax.random.split(key)
  n, length = scored.shape
  total = scored.sum(-1, keepdims=True).astype(jnp.float32)
  u = jax.random.uniform(count_key, (n, 1))
  u = (jnp.arange(draws, dtype=jnp.float32) + u) / draws  # [N, U]
  count = _uniform_count(u, 1.0, total)
  ranks = _ranks(
    jax.random.uniform(rank_key, (n, draws, length)), scored[:, None]
  )
  corrupt = (ranks < count[:, :, None]) & scored[:, None]
  return _single(corrupt, scored[:, None], prompt_length)


def complementary(key, scored, draws, prompt_length):
  """Pairs (M, complement of M): every token is scored exactly once a pair.

  With probability 1/L the pair is (everything, nothing), whose second canvas
  is idle and both of whose scores are the full mask's; otherwise |M| is
  uniform on 1..L-1. Unbiased; the budget of rows is L a pair.
  """
  full_key, count_key, rank_key = jax.random.split(key, 3)
  n, length = scored.shape
  scored = scored[:, None]  # [N, 1, L]
  total = scored.sum(-1).astype(jnp.float32)  # [N, 1]
  full = jax.random.uniform(full_key, (n, draws)) * total < 1.0
  u = jax.random.uniform(count_key, (n, draws))
  count = _uniform_count(u, 1.0, jnp.maximum(total - 1.0, 1.0))
  ranks = _ranks(jax.random.uniform(rank_key, (n, draws, length)), scored)
  first = ((ranks < count[:, :, None]) | full[:, :, None]) & scored
  second = ~first & scored
  weights = []
  for mask in (first, second):
    size = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    alone = jnp.where(mask, 1.0 / size, 0.0)
    everything = jnp.where(scored, 1.0 / jnp.maximum(total, 1.0)[..., None], 0)
    weights.append(jnp.where(full[:, :, None], everything, alone))
  canvas = jnp.where(first | ~scored, 0, 1)
  span = prompt_length + length
  rows = canvas * span + prompt_length + jnp.arange(length)
  return (
    jnp.stack([first, second], axis=2),
    rows.astype(jnp.int32),
    jnp.stack(weights, axis=2).astype(jnp.float32),
  )


def fixed_count(key, scored, draws, prompt_length):
  """Antithetic counts (m, L + 1 - m), each uniform on 1..L. Unbiased.

  The two subsets are independent; the budget of rows is L + 1 a pair.
  """
  count_key, first_key, second_key = jax.random.split(key, 3)
  n, length = scored.shape
  scored = scored[:, None]
  total = scored.sum(-1).astype(jnp.float32)
  u = jax.random.uniform(count_key, (n, draws))
  first_count = _uniform_count(u, 1.0, total)
  second_count = total.astype(jnp.int32) + 1 - first_count
  slots = jnp.arange(length + 1)
  corrupt, order = [], []
  for mask_key in (first_key, second_key):
    noise = jax.random.uniform(mask_key, (n, draws, length))
    noise = jnp.where(scored, noise, jnp.inf)
    order.append(jnp.argsort(noise, axis=-1))
  for positions, count in zip(order, (first_count, second_count), strict=True):
    ranks = jnp.argsort(positions, axis=-1)
    corrupt.append((ranks < count[..., None]) & scored)
  in_first = slots < first_count[..., None]  # [N, U, L + 1]
  in_second = ~in_first & (slots <= total.astype(jnp.int32)[..., None])
  pick = lambda positions, index: jnp.take_along_axis(  # noqa: E731
    positions, jnp.clip(index, 0, length - 1), axis=-1
  )
  first_position = pick(order[0], jnp.broadcast_to(slots, in_first.shape))
  second_position = pick(order[1], slots - first_count[..., None])
  span = prompt_length + length
  rows = jnp.where(in_first, first_position, span + second_position)
  weight = jnp.stack(
    [
      jnp.where(in_first, 1.0 / jnp.maximum(first_count, 1)[..., None], 0.0),
      jnp.where(in_second, 1.0 / jnp.maximum(second_count, 1)[..., None], 0.0),
    ],
    axis=2,
  )
  nonempty = (total > 0)[:, :, None, None]
  return (
    jnp.stack(corrupt, axis=2),
    (rows + prompt_length).astype(jnp.int32),
    jnp.where(nonempty, weight, 0.0).astype(jnp.float32),
  )


ESTIMATORS = {
  "uniform": Estimator(uniform, 1),
  "stratified": Estimator(stratified, 1, joint=True),
  "complementary": Estimator(complementary, 2),
  "fixed_count": Estimator(fixed_count, 2),
}


def draw_masks(
  key: jax.Array,
  settings: LikelihoodSettings,
  scored: jax.Array,
  prompt_length: int,
) -> Masks:
  """Draws the K masks of every sequence of a batch.

  Args:
    key: PRNG key, a function of (run seed, step).
    settings: scheme and K.
    scored: bool [N, L], the completion positions that count.
    prompt_length: P, positions before the completion; they stay visible.

  Returns:
    `Masks` with U = K / C draws. A sequence without any scored position gets
    weights 0.
  """
  estimator = ESTIMATORS[settings.scheme]
  draws = settings.masks // estimator.draw_size
  corrupt, rows, weight = estimator.draw(key, scored, draws, prompt_length)
  corrupt = jnp.pad(corrupt, ((0, 0), (0, 0), (0, 0), (prompt_length, 0)))
  return Masks(corrupt=corrupt, rows=rows, weight=weight)


def score(
  logprob_fn: Callable,
  params,
  tokens: jax.Array,
  token_mask: jax.Array,
  masks: Masks,
  mask_id: int,
) -> jax.Array:
  """Score of every mask: nats per token, f32 [n, K].

  Args:
    logprob_fn: (params, tokens [n, C, S], token_mask [n, S], target [n, R],
      rows [n, R]) -> f32 [n, R].
    params: the model's parameters.
    tokens: i32 [n, S], prompt and completion, uncorrupted.
    token_mask: bool [n, S], what attention may see.
    masks: the masks of these n sequences.
    mask_id: the id that hides a token.

  Returns:
    f32 [n, K]; its mean over K estimates the score of the sequence.
  """
  n, draws, canvases, span = masks.corrupt.shape
  canvas = jnp.where(masks.corrupt, mask_id, tokens[:, None, None, :])
  rows = masks.rows  # [n, U, R]
  flat = (rows % span).reshape(n, -1)
  target = jnp.take_along_axis(tokens, flat, axis=1).reshape(rows.shape)
  logprob = logprob_fn(
    params,
    canvas.reshape(n * draws, canvases, span),
    jnp.repeat(token_mask, draws, axis=0),
    target.reshape(n * draws, -1),
    rows.reshape(n * draws, -1),
  ).reshape(n, draws, 1, -1)
  return (masks.weight * logprob).sum(-1).reshape(n, draws * canvases)
