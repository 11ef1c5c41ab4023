"""Fills the masked positions of a canvas, block by block, through a denoiser.

A canvas is [prompt, completion]; masked positions hold the mask id. Blocks of
the completion are filled from left to right. A step inside a block:

1. Forward: logits of the current block, given the whole canvas. With guidance
   w also for a canvas without its prompt: un + (w + 1) (cond - un).
2. Propose a token a position, argmax of logits + T g in float32 with standard
   Gumbel noise g (sampling at temperature T; T = 0 is greedy), and a
   confidence, here the probability of that token without noise.
3. Select positions, the most confident first (ties: the lowest index). LLaDA
   spreads a block's masks evenly over its steps, the first ones taking the
   remainder; a threshold takes all that are confident enough and always the
   best one; a factor f takes rank r while confidence >= 1 - f / (r + 2).
4. Commit: write the selected tokens; they are final.

Dream's algorithms differ in 2 (filters, margin or entropy as confidence) and
in 3 (the share 1 - s/t of the masks still there, or a coin a position).

With a cache, the first forward of a block covers the whole canvas and fills
it; later ones of the block recompute the block only (dual) or everything from
the block's start (prefix). Rows do not look at each other: a row that is done
waits for the rest of the batch.

Sources: LLaDA, arXiv 2502.09992, algorithms 4 and 5; Dream, arXiv 2508.15487;
Fast-dLLM, arXiv 2505.22618 (dual cache, threshold, factor). Where we differ:
draws are a function of (key, row, step, position in the completion), so that
neither slicing, sharding nor padding a batch changes a sample; Dream's share
is of each row's masks, not of the batch's mean; a predicted mask token is
never placed unless `mask_policy="compete"`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rspo_jax.sampler_settings import SamplerSettings, check_call, validate

# More steps than an adaptive block can take.
MAX_STEPS = 2**16

# Streams of draws: tokens and positions never share bits.
TOKENS, POSITIONS = 0, 1


@struct.dataclass
class Denoised:
  """What `denoise` returns.

  Attributes:
    tokens: i32 [n, S], the filled canvas.
    commit_step: i32 [n, L], index of the forward that committed a position;
      -1 where the canvas was given, stayed masked, or lies after the EOS of a
      row that ended.
    denoiser_calls: i32 [], forwards of the model; a guided pair counts once.
    forwards: f32 [], the same in forwards of a whole canvas: a cached call
      counts its share of the positions, a guided one twice.
  """

  tokens: jax.Array
  commit_step: jax.Array
  denoiser_calls: jax.Array
  forwards: jax.Array | float = 0.0


@struct.dataclass
class Noise:
  """Recorded uniforms in place of draws; T is the number of forwards.

  Attributes:
    tokens: f32 [T, n, S, V], for the Gumbel form, or None.
    positions: f32 [T, n, S], for random remasking, or None.
    masked: f32 [T, m], for the positions still masked in row-major order
      (Dream's "origin"), or None.
  """

  tokens: Any = None
  positions: Any = None
  masked: Any = None


@struct.dataclass
class _State:
  """The carry of the loops."""

  tokens: jax.Array  # i32 [n, S]
  commit_step: jax.Array  # i32 [n, S]
  remaining: jax.Array  # i32 [n], quota that the block has not spent
  calls: jax.Array  # i32 []
  forwards: jax.Array  # f32 []


@dataclasses.dataclass(frozen=True)
class _Ids:
  """Token ids of the checkpoint."""

  mask: int
  eos: int | None
  eot: int | None


@dataclasses.dataclass(frozen=True)
class _Draws:
  """Draws of one step for a window of positions, made when asked for."""

  tokens: Callable  # (vocab) -> f32 [n, W, V], Gumbel noise
  positions: Callable  # () -> f32 [n, W], uniforms
  order: Callable  # () -> f32 [n, W], Gumbel noise


# --- Proposing tokens -------------------------------------------------------


def completion_mask(completion: jax.Array, eos_id: int) -> jax.Array:
  """Marks the scored part of a completion: all through the first EOS.

  Args:
    completion: i32 [n, L].
    eos_id: id of the end-of-sequence token.

  Returns:
    bool [n, L], all True in a row without EOS.
  """
  ends = (completion == eos_id).astype(jnp.int32)
  return jnp.cumsum(ends, axis=-1) - ends == 0


def gumbel(uniform: jax.Array) -> jax.Array:
  """Standard Gumbel noise -log(-log u), finite also where u is 0.

  Args:
    uniform: f32, in [0, 1).

  Returns:
    f32 of the same shape, -4.5 or more.
  """
  lowest = jnp.finfo(jnp.float32).tiny
  return -jnp.log(-jnp.log(jnp.maximum(uniform, lowest)))


def gumbel_argmax(
  logits: jax.Array, noise: jax.Array, temperature: float
) -> jax.Array:
  """Draws from softmax(logits / temperature), in the log domain.

  Args:
    logits: f32 [..., V].
    noise: f32 [..., V], standard Gumbel.
    temperature: > 0.

  Returns:
    i32 [...], argmax of logits + temperature * noise.
  """
  return _argmax(logits + temperature * noise)


def _argmax(x):
  """First index of the largest of the last axis, i32.

  A maximum and a comparison: XLA on the CPU fuses what makes x into argmax's
  own reduction and then computes its logarithms one by one, 6 times slower.
  """
  ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  last = x.shape[-1] - 1  # where a NaN leaves no entry equal to the maximum
  largest = jnp.max(x, axis=-1, keepdims=True)
  return jnp.min(jnp.where(x == largest, ids, last), axis=-1)


def _without(logits, token_id):
  """Logits [..., V] with one token's at minus infinity."""
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  return jnp.where(ids == token_id, -jnp.inf, logits)


def _probability(logits, token):
  """softmax(logits) at token: f32 [n, W] of [n, W, V] and i32 [n, W]."""
  picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
  top = jnp.max(logits, axis=-1)
  total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
  return jnp.exp(picked - top) / total


def low_confidence(logits, token, draws):
  """Confidence of a proposal: its probability. f32 [n, W]."""
  del draws
  return _probability(logits, token)


def random_order(logits, token, draws):
  """Confidence that orders positions at random. f32 [n, W]."""
  del logits, token
  return draws.positions()


REMASKING = {"low_confidence": low_confidence, "random": random_order}


def _choose(logits, settings, ids, draws):
  """Tokens i32 [n, W] at the temperature, the mask id only if allowed."""
  if settings.mask_policy == "forbid":
    logits = _without(logits, ids.mask)
  if settings.temperature == 0:
    return _argmax(logits)
  noise = draws.tokens(logits.shape[-1])
  return gumbel_argmax(logits, noise, settings.temperature)


def llada_step(logits, settings, ids, draws):
  """Proposes as LLaDA does: Gumbel tokens, confidence without the noise.

  Args:
    logits: f32 [n, W, V].
    settings: `SamplerSettings`.
    ids: token ids.
    draws: `_Draws` of this step.

  Returns:
    (token i32 [n, W], confidence f32 [n, W]).
  """
  if settings.logits_eos_inf:
    logits = _without(logits, ids.eos)
  token = _choose(logits, settings, ids, draws)
  if settings.confidence_eos_eot_inf:
    if settings.temperature == 0:
      logits = _without(logits, ids.eos)
    logits = _without(logits, ids.eot)
  return token, REMASKING[settings.remasking](logits, token, draws)


def filter_logits(logits, top_p=None, top_k=None):
  """Removes tokens outside the nucleus, then outside the k best.

  Args:
    logits: f32 [..., V].
    top_p: the best tokens are kept until their probability exceeds this, the
      token that crosses it included; None or >= 1 keeps all.
    top_k: number of tokens kept, or None.

  Returns:
    f32 [..., V], removed ones at the lowest float32.
  """
  lowest = jnp.finfo(logits.dtype).min
  if top_p is not None and top_p < 1:
    ranked = -jnp.sort(-logits, axis=-1)
    total = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    before = jnp.pad(total[..., :-1], [(0, 0)] * (total.ndim - 1) + [(1, 0)])
    kept = (before <= top_p) | (jnp.arange(total.shape[-1]) == 0)
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, lowest, logits)
  if top_k is not None:
    best, _ = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
    logits = jnp.where(logits < best[..., -1:], lowest, logits)
  return logits


def _dream_logits(logits, settings):
  """Temperature, then filters, in Dream's order."""
  if settings.temperature > 0:
    logits = logits / settings.temperature
  return filter_logits(logits, settings.top_p, settings.top_k)


def _dream_tokens(logits, settings, ids, draws):
  """Tokens i32 [n, W] of filtered, already tempered logits."""
  unit = dataclasses.replace(
    settings, temperature=1.0 if settings.temperature > 0 else 0.0
  )
  return _choose(logits, unit, ids, draws)


def _drawn_order(confidence, settings, draws):
  """Confidence whose ranking draws from softmax(confidence / temperature).

  The largest of log-weights plus Gumbel noise are a draw without replacement.
  """
  if settings.order_temperature == 0:
    return confidence
  return confidence / settings.order_temperature + draws.order()


def maskgit_plus_step(logits, settings, ids, draws):
  """Proposes with the token's filtered probability as confidence."""
  logits = _dream_logits(logits, settings)
  token = _dream_tokens(logits, settings, ids, draws)
  confidence = _probability(logits, token)
  return token, _drawn_order(confidence, settings, draws)


def topk_margin_step(logits, settings, ids, draws):
  """Proposes with the lead of the best token over the second."""
  logits = _dream_logits(logits, settings)
  token = _dream_tokens(logits, settings, ids, draws)
  first = _argmax(logits)
  places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  rest = jnp.where(places == first[..., None], -jnp.inf, logits)
  margin = _probability(logits, first) - _probability(logits, _argmax(rest))
  return token, _drawn_order(margin, settings, draws)


def entropy_step(logits, settings, ids, draws):
  """Proposes with the negative entropy of the position."""
  logits = _dream_logits(logits, settings)
  token = _dream_tokens(logits, settings, ids, draws)
  p = jax.nn.softmax(logits, axis=-1)
  negative_entropy = jnp.sum(p * jnp.log(p + 1e-10), axis=-1)
  return token, _drawn_order(negative_entropy, settings, draws)


def origin_step(logits, settings, ids, draws):
  """Proposes with a coin, the uniform that `select_by_coin` compares."""
  logits = _dream_logits(logits, settings)
  token = _dream_tokens(logits, settings, ids, draws)
  return token, draws.positions()


# --- Selecting positions ----------------------------------------------------


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


# --- How many positions a step commits --------------------------------------


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


def _share(step, settings):
  """This step's share, f32 []."""
  shares = dream_shares(settings.block_steps, settings.time_epsilon)
  return jnp.asarray(shares)[step]


def floor_quota(remaining, step, eligible, settings):
  """Dream: floor of the row's mask count times the step's share.

  The reference takes the batch's mean count, which is the same for rows alike;
  of unlike ones (ended, partly given) it would leave the fuller ones masked.
  """
  del remaining
  masks = jnp.sum(eligible, axis=1, dtype=jnp.int32).astype(jnp.float32)
  return jnp.floor(masks * _share(step, settings)).astype(jnp.int32)


def share_quota(remaining, step, eligible, settings):
  """The step's share itself, for coins: f32 [n]."""
  del remaining
  return jnp.full(eligible.shape[:1], _share(step, settings))


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
  "llada": Algorithm(llada_step, even_quota, select_by_quota),
  "maskgit_plus": Algorithm(maskgit_plus_step, floor_quota, select_by_quota),
  "topk_margin": Algorithm(topk_margin_step, floor_quota, select_by_quota),
  "entropy": Algorithm(entropy_step, floor_quota, select_by_quota),
  "origin": Algorithm(origin_step, share_quota, select_by_coin),
}


# --- The driver -------------------------------------------------------------


def _uniform_draw(key, size):
  """Uniforms f32 [size] in [0, 1)."""
  return jax.random.uniform(key, (size,))


def _gumbel_draw(key, size):
  """Standard Gumbel noise f32 [size], finite.

  From 46 bits: the 23 of one uniform cannot tell apart what reaches the top of
  a large vocabulary, whose tail would be drawn too seldom (.022 for .03 at
  126,464 tokens).
  """
  return jax.random.gumbel(key, (size,), mode="high")


def _drawn(draw, key, stream, step, rows, places, size):
  """f32 [n, W, size] of draw, each a function of (key, step, row, place).

  A key a position instead of one draw for the batch: a row's bits then depend
  neither on the rows beside it nor on the window they are drawn for.
  """
  key = jax.random.fold_in(jax.random.fold_in(key, stream), step)
  fold_all = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  by_row = fold_all(key, rows)
  by_place = jax.vmap(fold_all, in_axes=(0, None))(by_row, places)
  return jax.vmap(jax.vmap(lambda k: draw(k, size)))(by_place)


class _Denoiser:
  """One call of `denoise`: what its loops close over."""

  def __init__(
    self,
    denoise_fn,
    params,
    canvas,
    token_mask,
    key,
    settings,
    ids,
    noise,
    rows,
  ):
    self.settings = settings
    self.algorithm = ALGORITHMS[settings.algorithm]
    if settings.threshold is not None:
      self.select = select_by_threshold
    elif settings.factor is not None:
      self.select = select_by_factor
    else:
      self.select = self.algorithm.select
    self.ids, self.key, self.noise = ids, key, noise
    self.rows, self.length = canvas.shape
    self.row_ids = jnp.arange(self.rows) if rows is None else rows
    self.prompt_length = self.length - settings.completion_length
    self.params, self.token_mask = params, token_mask
    self.given = canvas != ids.mask
    self.denoise_fn = denoise_fn
    self.competes = settings.mask_policy == "compete"
    # LLaDA's fixed schedule runs all its steps; the others stop when full.
    self.until_full = (
      settings.cache != "none" or settings.adaptive or settings.stop_at_eos
    )
    # A forward that fills nothing but masks would repeat itself for ever:
    # each round of an adaptive block fills a position, so this many suffice.
    most = self.length if self.competes else settings.block_length
    self.limit = most + 1 if settings.adaptive else settings.block_steps

  def logits(self, tokens, cache, start, length):
    """Guided logits f32 [n, length, V] and the cache."""
    scale = self.settings.cfg_scale
    if not scale:
      return self.denoise_fn(
        self.params, tokens, self.token_mask, cache, start, length
      )
    blank = jnp.where(self.given, self.ids.mask, tokens)
    both, cache = self.denoise_fn(
      self.params,
      jnp.concatenate([tokens, blank]),
      jnp.concatenate([self.token_mask, self.token_mask]),
      cache,
      start,
      length,
    )
    conditional, unconditional = jnp.split(both, 2)
    guided = unconditional + (scale + 1) * (conditional - unconditional)
    return guided, cache

  def draws(self, call, step, start, masked):
    """The draws of one step for the window that starts at `start`."""
    noise, window = self.noise, masked.shape[1]
    places = start + jnp.arange(window) - self.prompt_length

    def drawn(draw, stream, size):
      return _drawn(draw, self.key, stream, step, self.row_ids, places, size)

    def tokens(vocab):
      if noise.tokens is None:
        return drawn(_gumbel_draw, TOKENS, vocab)
      return gumbel(
        jax.lax.dynamic_slice_in_dim(noise.tokens[call], start, window, 1)
      )

    def positions():
      if noise.positions is not None:
        return jax.lax.dynamic_slice_in_dim(
          noise.positions[call], start, window, 1
        )
      if noise.masked is not None:
        order = jnp.cumsum(masked.reshape(-1)) - 1
        return noise.masked[call][order].reshape(masked.shape)
      return drawn(_uniform_draw, POSITIONS, 1)[:, :, 0]

    def order():
      if noise.positions is None and noise.masked is None:
        return drawn(_gumbel_draw, POSITIONS, 1)[:, :, 0]
      return gumbel(positions())

    return _Draws(tokens, positions, order)

  def commit(self, state, logits, start, end, step, draw_step):
    """One step: proposes, selects and writes inside the logits' window."""
    settings = self.settings
    window = logits.shape[1]
    now = jax.lax.dynamic_slice_in_dim(state.tokens, start, window, 1)
    places = start + jnp.arange(window)
    eligible = (now == self.ids.mask) & (places < end)  # [n, W]
    if self.until_full:
      # A row waits for the others as it would have stopped alone: masks of
      # its prompt must not profit from their steps.
      going = self.going(state.tokens, end - settings.block_length)
      eligible = eligible & going[:, None]
    draws = self.draws(state.calls, draw_step, start, eligible)
    token, confidence = self.algorithm.propose(
      logits, settings, self.ids, draws
    )
    remaining, quota = state.remaining, None
    if not settings.adaptive:
      quota = self.algorithm.quota(remaining, step, eligible, settings)
      if self.algorithm.quota is even_quota:
        remaining = remaining - quota
    chosen = self.select(confidence, eligible, quota, settings)
    placed = chosen & (token != self.ids.mask)
    when = jax.lax.dynamic_slice_in_dim(state.commit_step, start, window, 1)
    when = jnp.where(placed, state.calls, when)
    update = jax.lax.dynamic_update_slice_in_dim
    return _State(
      tokens=update(state.tokens, jnp.where(chosen, token, now), start, 1),
      commit_step=update(state.commit_step, when, start, 1),
      remaining=remaining,
      calls=state.calls + 1,
      forwards=state.forwards,
    )

  def share(self, cache, start):
    """Share of a whole canvas's forward that one step computes."""
    guided = 2.0 if self.settings.cfg_scale else 1.0
    if cache is None or isinstance(cache, str):
      return guided
    if self.settings.cache == "prefix":
      return guided * (self.length - start) / self.length
    return guided * self.settings.block_length / self.length

  def step(self, state, block, step, cache):
    """One forward and its commit; returns the state and the cache."""
    settings = self.settings
    start = self.prompt_length + block * settings.block_length
    end = start + settings.block_length
    done = state.forwards + self.share(cache, start)
    state = state.replace(forwards=done)
    # `limit` of an adaptive block grows with the padding, a draw must not.
    stride = MAX_STEPS if settings.adaptive else settings.block_steps
    draw_step = block * stride + step

    def over(state, first, length):
      logits, filled = self.logits(state.tokens, cache, first, length)
      return self.commit(state, logits, first, end, step, draw_step), filled

    # Inside a cached block only the block's rows exist.
    whole = self.competes and (cache is None or isinstance(cache, str))
    if not whole:
      return over(state, start, settings.block_length)
    places = jnp.arange(self.length)
    before = jnp.any((state.tokens == self.ids.mask) & (places < start))
    return jax.lax.cond(
      before,
      lambda state: over(state, 0, self.length),
      lambda state: over(state, start, settings.block_length),
      state,
    )

  def ended(self, tokens):
    """Rows whose first EOS has nothing masked before it: bool [n]."""
    if not self.settings.stop_at_eos:
      return jnp.zeros(self.rows, bool)
    completion = tokens[:, self.prompt_length :]
    masks = jnp.cumsum(completion == self.ids.mask, axis=1)
    return jnp.any((completion == self.ids.eos) & (masks == 0), axis=1)

  def going(self, tokens, start):
    """Rows with masks in the block at `start` that have not ended: bool [n]."""
    length = self.settings.block_length
    now = jax.lax.dynamic_slice_in_dim(tokens, start, length, 1)
    return jnp.any(now == self.ids.mask, axis=1) & ~self.ended(tokens)

  def unfilled(self, state, block):
    """Whether any row goes on in the block: bool []."""
    start = self.prompt_length + block * self.settings.block_length
    return jnp.any(self.going(state.tokens, start))

  def run_block(self, state, block, step):
    """All steps of one block from `step` on."""
    settings = self.settings
    length = settings.block_length
    start = self.prompt_length + block * length
    now = jax.lax.dynamic_slice_in_dim(state.tokens, start, length, 1)
    masks = jnp.sum(now == self.ids.mask, axis=1, dtype=jnp.int32)
    state = state.replace(remaining=masks)
    cached = settings.cache != "none"
    if cached:
      state, cache = self.step(state, block, step, settings.cache)
      first, step = step + 1, step + 1
    else:
      cache = None

    def goes_on(carry):
      step, state = carry
      more = step < self.limit
      if not self.until_full:
        return more
      unfilled = self.unfilled(state, block)
      if cached:
        # As the reference counts: the second forward is never skipped.
        unfilled = unfilled | (step == first)
      return more & unfilled

    def advance(carry):
      step, state = carry
      state, _ = self.step(state, block, step, cache)
      return step + 1, state

    return jax.lax.while_loop(
      goes_on, advance, (jnp.asarray(step, jnp.int32), state)
    )[1]

  def run(self, canvas, first_block, first_step):
    """All blocks from (first_block, first_step) on."""
    settings = self.settings
    state = _State(
      tokens=canvas,
      commit_step=jnp.full(canvas.shape, -1, jnp.int32),
      remaining=jnp.zeros(self.rows, jnp.int32),
      calls=jnp.zeros((), jnp.int32),
      forwards=jnp.zeros(()),
    )

    def block_body(block, state):
      step = jnp.where(block == first_block, first_step, 0)
      if settings.cache == "none":
        return self.run_block(state, block, step)
      return jax.lax.cond(
        self.unfilled(state, block),
        lambda state: self.run_block(state, block, step),
        lambda state: state,
        state,
      )

    if settings.cache == "prefix":
      # What is recomputed shrinks from block to block: one program each.
      for block in range(first_block, settings.blocks):
        state = block_body(block, state)
    else:
      state = jax.lax.fori_loop(first_block, settings.blocks, block_body, state)
    return self.finish(state)

  def finish(self, state):
    """Fills ended rows after their EOS and cuts the completion's steps."""
    tokens, steps = state.tokens, state.commit_step[:, self.prompt_length :]
    if self.settings.stop_at_eos:
      completion = tokens[:, self.prompt_length :]
      after = ~completion_mask(completion, self.ids.eos)
      after = after & self.ended(tokens)[:, None]
      steps = jnp.where(after, -1, steps)
      completion = jnp.where(after, self.ids.eos, completion)
      tokens = tokens.at[:, self.prompt_length :].set(completion)
    return Denoised(tokens, steps, state.calls, state.forwards)


def denoise(
  denoise_fn: Callable,
  params,
  canvas: jax.Array,
  token_mask: jax.Array,
  key: jax.Array,
  settings: SamplerSettings,
  *,
  mask_id: int,
  eos_id: int | None = None,
  eot_id: int | None = None,
  noise: Noise | None = None,
  rows: jax.Array | None = None,
  first_block: int = 0,
  first_step: int = 0,
) -> Denoised:
  """Fills the masked positions of the completions; traceable, not jitted.

  Args:
    denoise_fn: (params, tokens i32 [n, S], token_mask bool [n, S], cache,
      start, length) -> (logits f32 [n, length, V], cache), the logits that
      predict the tokens at positions start .. start + length. cache None is a
      plain forward; "prefix" or "dual" a full one that also returns a cache;
      a cache recomputes what its kind says and must not depend on tokens
      elsewhere.
    params: whatever denoise_fn takes.
    canvas: i32 [n, S], prompts and completions; only masked positions are
      filled.
    token_mask: bool [n, S], False at padding.
    key: PRNG key; unused bits cost nothing at temperature 0.
    settings: how to sample; static.
    mask_id, eos_id, eot_id: ids of the checkpoint; EOS and EoT only where the
      settings name them.
    noise: recorded uniforms instead of draws.
    rows: i32 [n], numbers of these rows in the whole batch, by default
      0 .. n - 1. A slice of a batch, given its rows' numbers, draws the same.
    first_block, first_step: where the schedule starts, for a canvas that is
      already filled up to there; may be traced (but with a prefix cache).

  Returns:
    `Denoised`.

  Raises:
    ValueError: settings that do not fit together or the canvas.
  """
  validate(settings)
  check_call(settings, canvas.shape, eos_id, eot_id, first_block, first_step)
  ids = _Ids(mask_id, eos_id, eot_id)
  denoiser = _Denoiser(
    denoise_fn,
    params,
    canvas,
    token_mask,
    key,
    settings,
    ids,
    noise or Noise(),
    rows,
  )
  return denoiser.run(canvas.astype(jnp.int32), first_block, first_step)
