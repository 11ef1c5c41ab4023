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
id. Schemes are entries of `ESTIMATORS` (masks.py); those that are no ELBO say
what they are.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from rspo_jax.algorithm.masks import ESTIMATORS, Sequences
from rspo_jax.algorithm.types import RolloutBatch
from rspo_jax.config import keys, schema

SCOPES = ("completion", "canvas", "masked_tail")


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
class LikelihoodSettings(schema.Likelihood):
  """How scores are estimated: the keys, with masks and block_length resolved.

  Scope "completion" scores positions through the first EOS and hides later
  ones from attention; "canvas" scores all L positions as ordinary tokens;
  "masked_tail" scores through the first EOS and shows later positions as masks
  on every canvas (diffu-GRPO, wd1, SPG).
  """

  block_length: int = keys.key(1, "resolved: 0 is no length", at_least=1)

  def __post_init__(self):
    keys.check(self, "likelihood.")
    estimator = ESTIMATORS[self.scheme]
    size = estimator.draw_size or 1
    if estimator.masks is not None and self.masks not in estimator.masks:
      raise ValueError(
        f"likelihood.masks={self.masks} is not defined for likelihood.scheme="
        f"{self.scheme!r}; use {' or '.join(map(str, estimator.masks))}."
      )
    if self.masks < 1 or self.masks % size:
      raise ValueError(
        f"likelihood.masks={self.masks} must be a positive multiple of {size} "
        f"with likelihood.scheme={self.scheme!r}; use "
        f"{max(size, self.masks // size * size)}."
      )
    if not 0 <= self.prompt_mask < 1:
      raise ValueError(
        f"likelihood.prompt_mask={self.prompt_mask} must lie in [0, 1)."
      )

  @property
  def draw_size(self) -> int:
    """Canvases of one independent draw: 2 for pairs, K for joint draws."""
    estimator = ESTIMATORS[self.scheme]
    return self.masks if estimator.joint else estimator.draw_size

  @property
  def needs_trace(self) -> bool:
    """Whether masks follow the steps of the sampler."""
    return ESTIMATORS[self.scheme].needs_trace


def draw_masks(
  key: jax.Array,
  settings: LikelihoodSettings,
  scored: jax.Array,
  prompt_length: int,
  commit_step: jax.Array | None = None,
) -> Masks:
  """Draws the K masks of every sequence of a batch.

  Args:
    key: PRNG key, a function of (run seed, step).
    settings: scheme and K.
    scored: bool [N, L], the completion positions that count.
    prompt_length: P, positions before the completion; most schemes leave them
      visible.
    commit_step: i32 [N, L], for schemes that follow the sampler.

  Returns:
    `Masks` with U = K / C draws. A sequence without any scored position gets
    weights 0.

  Raises:
    ValueError: the scheme needs `commit_step`.
  """
  estimator = ESTIMATORS[settings.scheme]
  if estimator.needs_trace and commit_step is None:
    raise ValueError(
      f"likelihood.scheme={settings.scheme!r} follows the sampler's steps, and "
      "these completions come without (demonstrations have none); use another "
      "scheme."
    )
  sequences = Sequences(
    scored=scored,
    commit_step=commit_step,
    prompt_length=prompt_length,
    block_length=settings.block_length,
    prompt_mask=settings.prompt_mask,
    shrink=settings.shrink,
  )
  draws = settings.masks // (estimator.draw_size or 1)
  corrupt, rows, weight = estimator.draw(key, sequences, draws)
  span = prompt_length + scored.shape[1]
  before = span - corrupt.shape[-1]
  corrupt = jnp.pad(corrupt, ((0, 0), (0, 0), (0, 0), (before, 0)))
  if settings.scope == "masked_tail":
    tail = jnp.pad(~scored, ((0, 0), (prompt_length, 0)))
    corrupt = corrupt | tail[:, None, None]
  return Masks(corrupt=corrupt, rows=rows, weight=weight)


def batch_masks(
  key: jax.Array, settings: LikelihoodSettings, batch: RolloutBatch
) -> Masks:
  """The masks of a batch: drawn in the rollout's order, put in the batch's."""
  ordered = lambda x: jnp.zeros_like(x).at[batch.row].set(x)  # noqa: E731
  scored, when = jax.tree.map(
    ordered, (batch.completion_mask, batch.commit_step)
  )
  masks = draw_masks(
    key, settings, scored, batch.tokens.shape[1] - scored.shape[1], when
  )
  return jax.tree.map(lambda x: x[batch.row], masks)


def scope_masks(completion_mask, token_mask, scope: str):
  """Which completion tokens are scored, and which of the canvas are seen.

  Args:
    completion_mask: bool [n, L], True through the first EOS.
    token_mask: bool [n, S], False on left padding.
    scope: key of SCOPES.

  Returns:
    (scored [n, L], seen [n, S]).
  """
  length = completion_mask.shape[1]
  if scope == "canvas":
    return jnp.ones_like(completion_mask), token_mask
  if scope == "completion":
    before, after = token_mask[:, :-length], token_mask[:, -length:]
    token_mask = jnp.concatenate([before, after & completion_mask], axis=1)
  return completion_mask, token_mask


def logprobs(
  logprob_fn: Callable,
  params,
  tokens: jax.Array,
  token_mask: jax.Array,
  masks: Masks,
  mask_id: int,
) -> jax.Array:
  """Log-probability of every row that the masks ask for, f32 [n, U, R].

  Args:
    logprob_fn: (params, tokens [n, C, S], token_mask [n, S], target [n, R],
      rows [n, R]) -> f32 [n, R], or a tree of such arrays (of several
      parameters that are scored in one pass), which is then returned.
    params: the model's parameters.
    tokens: i32 [n, S], prompt and completion, uncorrupted.
    token_mask: bool [n, S], what attention may see.
    masks: the masks of these n sequences.
    mask_id: the id that hides a token.
  """
  n, draws, canvases, span = masks.corrupt.shape
  canvas = jnp.where(masks.corrupt, mask_id, tokens[:, None, None, :])
  rows = masks.rows  # [n, U, R]
  flat = (rows % span).reshape(n, -1)
  target = jnp.take_along_axis(tokens, flat, axis=1).reshape(rows.shape)
  found = logprob_fn(
    params,
    canvas.reshape(n * draws, canvases, span),
    jnp.repeat(token_mask, draws, axis=0),
    target.reshape(n * draws, -1),
    rows.reshape(n * draws, -1),
  )
  return jax.tree.map(lambda logprob: logprob.reshape(rows.shape), found)


def score(
  logprob_fn: Callable,
  params,
  tokens: jax.Array,
  token_mask: jax.Array,
  masks: Masks,
  mask_id: int,
) -> jax.Array:
  """Score of every mask: nats per token, f32 [n, K]; args as of `logprobs`.

  Its mean over K estimates the score of the sequence.
  """

  def weighed(logprob):
    scores = (masks.weight * logprob[:, :, None]).sum(-1)  # [n, U, C]
    return scores.reshape(len(tokens), -1)

  return jax.tree.map(
    weighed,
    logprobs(logprob_fn, params, tokens, token_mask, masks, mask_id),
  )
