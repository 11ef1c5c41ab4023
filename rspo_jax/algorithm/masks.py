"""Mask schemes: which positions of a completion are hidden, and what counts.

A scheme draws, for every sequence, U independent draws of C canvases (K = U C
forward passes) and a weight for each token that is read from them, such that
the mean over the K canvases of the weighted log-probs is the scheme's score,
in nats per token. What that score estimates is the scheme's own affair:

- uniform, stratified, complementary, fixed_count, coupled: without bias the
  count-uniform ELBO (likelihood.py);
- gauss, gauss_floor, simpson: the same integral by quadrature over the mask
  ratio, one random mask a node;
- mean_field: every completion token hidden at once, and some of the prompt;
- block_random: one random block in progress, as a sampler would meet it;
- trace: the very steps by which the sampler committed the completion.

Sources: rspo.md, "Mask schemes"; baselines.md names the papers of the others.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Sequences:
  """What a scheme may look at.

  Attributes:
    scored: bool [N, L], the completion positions that count.
    commit_step: i32 [N, L], the forward that committed a position, or None.
    prompt_length: P.
    block_length: positions of a block (block_random).
    prompt_mask: probability of hiding a token that a scheme leaves visible.
    shrink: sampling steps joined into one canvas (trace).
  """

  scored: jax.Array
  commit_step: jax.Array | None = None
  prompt_length: int = struct.field(pytree_node=False, default=0)
  block_length: int = struct.field(pytree_node=False, default=1)
  prompt_mask: float = struct.field(pytree_node=False, default=0.0)
  shrink: int = struct.field(pytree_node=False, default=1)


@dataclasses.dataclass(frozen=True)
class Estimator:
  """A mask scheme.

  Attributes:
    draw: (key, Sequences, draws U) -> corrupt bool [N, U, C, L or P + L],
      rows i32 [N, U, R], weight f32 [N, U, C, R].
    draw_size: canvases C of one draw; None: all K belong to one draw.
    joint: the U draws of a sequence depend on each other.
    elbo: each score is without bias the count-uniform ELBO.
    masks: the values of K that it is defined for; None: any multiple of C.
    needs_trace: reads `commit_step`.
    scores_rows: a draw's R rows are the L positions in order, one canvas.
  """

  draw: Callable
  draw_size: int | None
  joint: bool = False
  elbo: bool = True
  masks: tuple[int, ...] | None = None
  needs_trace: bool = False
  scores_rows: bool = True


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


def _single(corrupt, scored, prompt_length, scale=1.0):
  """Masks of one-canvas draws: every completion position has its row.

  The score is `scale` (broadcast to [N, U, 1]) times the mean over the mask.
  """
  n, draws, length = corrupt.shape
  count = jnp.maximum(corrupt.sum(-1, keepdims=True), 1)
  weight = jnp.where(corrupt & scored, scale / count, 0.0)
  rows = prompt_length + jnp.arange(length, dtype=jnp.int32)
  return (
    corrupt[:, :, None, :],
    jnp.broadcast_to(rows, (n, draws, length)),
    weight[:, :, None, :].astype(jnp.float32),
  )


def uniform(key, seqs, draws):
  """Independent masks: count uniform on 1..L, then a uniform subset.

  The law of "t ~ U(0, 1), hide each with probability t, redraw both when
  nothing is hidden", without the rejection loop. Unbiased.
  """
  scored, prompt_length = seqs.scored, seqs.prompt_length
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


def stratified(key, seqs, draws):
  """Counts 1 + floor(L (k + u) / K), one u a sequence. Unbiased.

  The K counts of a sequence spread over 1..L; subsets are independent.
  """
  scored, prompt_length = seqs.scored, seqs.prompt_length
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


def complementary(key, seqs, draws):
  """Pairs (M, complement of M): every token is scored exactly once a pair.

  With probability 1/L the pair is (everything, nothing), whose second canvas
  is idle and both of whose scores are the full mask's; otherwise |M| is
  uniform on 1..L-1. Unbiased; the budget of rows is L a pair.
  """
  scored, prompt_length = seqs.scored, seqs.prompt_length
  full_key, count_key, rank_key = jax.random.split(key, 3)
  n, length = scored.shape
  scored = scored[:, None]  # [N, 1, L]
  total = scored.sum(-1).astype(jnp.float32)  # [N, 1]
  full = jax.random.uniform(full_key, (n, draws)) * total < 1.0
  u = jax.random.uniform(count_key, (n, draws))
  count = _uniform_count(u, 1.0, jnp.maximum(total - 1.0, 1.0))
  ranks = _ranks(jax.random.uniform(rank_key, (n, draws, length)), scored)
  first = ((ranks < count[:, :, None]) | full[:, :, None]) & scored
  everything = jnp.where(scored, 1.0 / jnp.maximum(total, 1.0)[..., None], 0)
  corrupt, rows, weight = _pair(first, scored, prompt_length)
  whole = jnp.where(full[:, :, None], everything, 0.0)[:, :, None]
  weight = jnp.where(full[:, :, None, None], whole, weight)
  return corrupt, rows, weight


def _pair(first, scored, prompt_length, scale=1.0):
  """Masks of (first, its complement): each token read where it is hidden.

  Each score is `scale` times the mean over its own mask, 0 for an empty one.
  """
  second = ~first & scored
  weights = []
  for mask in (first, second):
    size = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    weights.append(jnp.where(mask, scale / size, 0.0))
  canvas = jnp.where(first | ~scored, 0, 1)
  length = first.shape[-1]
  span = prompt_length + length
  rows = canvas * span + prompt_length + jnp.arange(length)
  return (
    jnp.stack([first, second], axis=2),
    rows.astype(jnp.int32),
    jnp.stack(weights, axis=2).astype(jnp.float32),
  )


def coupled(key, seqs, draws):
  """ESPO's pairs: l uniform on 0..L, weights (L + 1) / l and (L + 1) / (L - l).

  Divided by L: the two scores are (L + 1) / L times the means over the mask
  and its complement, 0 for the empty one. Their mean has the expectation of
  the count-uniform ELBO; each alone has it only on average over l.
  """
  scored, prompt_length = seqs.scored, seqs.prompt_length
  count_key, rank_key = jax.random.split(key)
  n, length = scored.shape
  scored = scored[:, None]
  total = scored.sum(-1).astype(jnp.float32)
  u = jax.random.uniform(count_key, (n, draws))
  count = _uniform_count(u, 0.0, total)
  ranks = _ranks(jax.random.uniform(rank_key, (n, draws, length)), scored)
  first = (ranks < count[:, :, None]) & scored
  scale = (total + 1.0) / jnp.maximum(total, 1.0)
  return _pair(first, scored, prompt_length, scale[..., None])


def fixed_count(key, seqs, draws):
  """Antithetic counts (m, L + 1 - m), each uniform on 1..L. Unbiased.

  The two subsets are independent; the budget of rows is L + 1 a pair.
  """
  scored, prompt_length = seqs.scored, seqs.prompt_length
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


def _at_nodes(key, seqs, draws, nodes, weights, floor_weight):
  """One mask of max(1, floor(t n)) positions for each node t of a quadrature.

  With `floor_weight` a log-prob counts w / (t n), as published, which for
  short completions is far from the mean over the mask: .555 of it at n = 16
  and the first of three nodes. Else w / |M|.
  """
  scored = seqs.scored[:, None]
  n, _, length = scored.shape
  total = scored.sum(-1).astype(jnp.float32)  # [N, 1]
  t = jnp.asarray(nodes, jnp.float32)
  count = jnp.maximum(jnp.floor(t * total), 1.0)  # [N, U]
  ranks = _ranks(jax.random.uniform(key, (n, draws, length)), scored)
  corrupt = (ranks < count[:, :, None]) & scored
  scale = draws * jnp.asarray(weights, jnp.float32)
  if floor_weight:
    scale = scale * count / (t * jnp.maximum(total, 1.0))
  scale = jnp.broadcast_to(scale, (n, draws))[:, :, None]
  return _single(corrupt, scored, seqs.prompt_length, scale)


def gauss(key, seqs, draws, floor_weight=False):
  """K Gauss-Legendre nodes over the mask ratio, exact counts (GDPO).

  The count-uniform ELBO up to the error of the quadrature and of rounding
  counts; one node: everything at ratio 1/2.
  """
  nodes, weights = np.polynomial.legendre.leggauss(draws)
  return _at_nodes(key, seqs, draws, (nodes + 1) / 2, weights / 2, floor_weight)


def simpson(key, seqs, draws):
  """Nodes .1, .5, 1 with weights 1/6, 4/6, 1/6 (GDPO's other quadrature)."""
  nodes, weights = (0.1, 0.5, 1.0), (1 / 6, 4 / 6, 1 / 6)
  return _at_nodes(key, seqs, draws, nodes, weights, False)


def _some_visible(key, seqs, shape):
  """Coins for tokens that are otherwise visible: bool [*shape]."""
  return jax.random.bernoulli(key, seqs.prompt_mask, shape)


def mean_field(key, seqs, draws):
  """Every completion token hidden; prompt tokens at random (diffu-GRPO).

  The mean of log f(y_j | masked prompt) over tokens as if they were
  independent: no ELBO, and one forward pass whatever L is.
  """
  n, length = seqs.scored.shape
  corrupt = jnp.broadcast_to(seqs.scored[:, None], (n, draws, length))
  hidden, rows, weight = _single(
    corrupt, seqs.scored[:, None], seqs.prompt_length
  )
  prompt = _some_visible(key, seqs, (n, draws, 1, seqs.prompt_length))
  return jnp.concatenate([prompt, hidden], axis=-1), rows, weight


def block_random(key, seqs, draws):
  """A random block in progress: later blocks hidden, earlier ones seen (SPG).

  K distinct blocks, folded modulo the number that the completion fills; in the
  block m positions are hidden, m uniform on 1..its size; prompt and earlier
  blocks are hidden at random. All hidden completion tokens are scored, later
  blocks included, as the published program does.
  """
  block_key, count_key, rank_key, coin_key = jax.random.split(key, 4)
  scored, size = seqs.scored[:, None], seqs.block_length
  n, _, length = scored.shape
  blocks = -(-length // size)
  total = scored.sum(-1)  # [N, 1]
  order = jax.random.uniform(block_key, (n, blocks))
  order = jnp.argsort(order, axis=-1)[:, jnp.arange(draws) % blocks]  # [N, U]
  filled = jnp.maximum(-(-total // size), 1)
  start = (order % filled * size)[:, :, None]  # [N, U, 1]
  place = jnp.arange(length)
  inside = (place >= start) & (place < start + size) & scored
  width = inside.sum(-1).astype(jnp.float32)
  u = jax.random.uniform(count_key, (n, draws))
  count = _uniform_count(u, 1.0, jnp.maximum(width, 1.0))
  ranks = _ranks(jax.random.uniform(rank_key, (n, draws, length)), inside)
  coins = _some_visible(coin_key, seqs, (n, draws, seqs.prompt_length + length))
  before, coins = jnp.split(coins, [seqs.prompt_length], axis=-1)
  corrupt = (inside & (ranks < count[:, :, None])) | (place >= start + size)
  corrupt = (corrupt | (coins & (place < start))) & scored
  hidden, rows, weight = _single(corrupt, scored, seqs.prompt_length)
  return jnp.concatenate([before[:, :, None], hidden], -1), rows, weight


def trace(key, seqs, draws):
  """The sampler's own steps: every token where it was chosen (TraceRL).

  The distinct commit steps of a completion, `shrink` at a time, are its
  canvases: canvas v hides what was committed at v or later and scores what was
  committed at v. Deterministic; the mean over the K canvases is the mean over
  tokens of their log-probs along the trace.
  """
  del key
  scored, when = seqs.scored, seqs.commit_step
  counted = scored & (when >= 0)
  length = scored.shape[1]
  place = jnp.arange(length)
  both = counted[:, :, None] & counted[:, None, :]  # [N, i, j]
  same = both & (when[:, :, None] == when[:, None, :])
  repeats = (same & (place[:, None] < place)).any(1)  # j has an equal before
  first = counted & ~repeats
  earlier = both & (when[:, :, None] < when[:, None, :])
  rank = (earlier & first[:, :, None]).sum(1)  # distinct steps before j's
  canvas = jnp.minimum(rank // seqs.shrink, draws - 1)  # [N, L]
  index = jnp.arange(draws)[:, None]
  corrupt = counted[:, None] & (canvas[:, None] >= index)  # [N, K, L]
  own = counted[:, None] & (canvas[:, None] == index)
  total = jnp.maximum(counted.sum(-1), 1)
  weight = jnp.where(own, draws / total[:, None, None], 0.0)
  rows = canvas * (seqs.prompt_length + length) + seqs.prompt_length + place
  return (
    corrupt[:, None],
    rows[:, None].astype(jnp.int32),
    weight[:, None].astype(jnp.float32),
  )


ESTIMATORS = {
  "uniform": Estimator(uniform, 1),
  "stratified": Estimator(stratified, 1, joint=True),
  "complementary": Estimator(complementary, 2, scores_rows=False),
  "fixed_count": Estimator(fixed_count, 2, scores_rows=False),
  "coupled": Estimator(coupled, 2, elbo=False, scores_rows=False),
  "gauss": Estimator(gauss, 1, joint=True, elbo=False),
  "gauss_floor": Estimator(
    functools.partial(gauss, floor_weight=True), 1, joint=True, elbo=False
  ),
  "simpson": Estimator(simpson, 1, joint=True, elbo=False, masks=(3,)),
  "mean_field": Estimator(mean_field, 1, elbo=False),
  "block_random": Estimator(block_random, 1, joint=True, elbo=False),
  "trace": Estimator(
    trace,
    None,
    joint=True,
    elbo=False,
    needs_trace=True,
    scores_rows=False,
  ),
}
