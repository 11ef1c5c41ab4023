"""Fills the masked positions of a canvas, block by block, through a denoiser.

A canvas is [prompt, completion]; masked positions hold the mask id. Blocks of
the completion are filled from left to right. A step inside a block:

1. Forward: logits of the current block, given the whole canvas. With guidance
   w also for a canvas without its prompt: un + (w + 1) (cond - un).
2. Propose a token and a confidence a position (`proposals`).
3. Select positions, the most confident first (`schedules`).
4. Commit: write the selected tokens; they are final.

With a cache (`models.cache`) the first forward of a block is of the whole canvas
and fills it, later ones compute the rest. Rows do not look at each other: a row
that is done waits for the rest of the batch.

Sources: LLaDA, arXiv 2502.09992; Dream, arXiv 2508.15487; Fast-dLLM, arXiv
2505.22618. Where we differ: draws are a function of (key, row, step, position in
the completion), so that neither slicing, sharding nor padding a batch changes a
sample; Dream's share is of each row's masks, not of the batch's mean; a
predicted mask token is never placed unless `mask_policy="compete"`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from rspo_jax.models.cache import CACHES
from rspo_jax.sampling import proposals, schedules
from rspo_jax.sampling.settings import SamplerSettings, check_call, validate

# More steps than an adaptive block can take.
MAX_STEPS = 2**16


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
class _State:
  """The carry of the loops."""

  tokens: jax.Array  # i32 [n, S]
  commit_step: jax.Array  # i32 [n, S]
  remaining: jax.Array  # i32 [n], quota that the block has not spent
  calls: jax.Array  # i32 []
  forwards: jax.Array  # f32 []


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


class _Denoiser:
  """One call of `denoise`: what its loops close over."""

  def __init__(
    self, denoise_fn, params, canvas, token_mask, settings, ids, draws_of
  ):
    self.settings, self.ids, self.draws_of = settings, ids, draws_of
    self.algorithm = schedules.algorithm_of(settings)
    self.cache = CACHES[settings.cache]()
    self.denoise_fn, self.params = denoise_fn, params
    self.token_mask, self.given = token_mask, canvas != ids.mask
    self.rows, self.length = canvas.shape
    self.prompt_length = self.length - settings.completion_length
    self.competes = settings.mask_policy == "compete"
    # LLaDA's fixed schedule runs all its steps; the others stop when full.
    self.until_full = (
      self.cache.reuses or settings.adaptive or settings.stop_at_eos
    )
    # A forward that fills nothing but masks would repeat itself for ever:
    # each round of an adaptive block fills a position, so this many suffice.
    most = self.length if self.competes else settings.block_length
    self.limit = most + 1 if settings.adaptive else settings.block_steps

  def logits(self, tokens, cache, start, length):
    """Guided logits f32 [n, length, V] and the cache."""
    scale, mask = self.settings.cfg_scale, self.token_mask
    if not scale:
      return self.denoise_fn(self.params, tokens, mask, cache, start, length)
    blank = jnp.where(self.given, self.ids.mask, tokens)
    both, cache = self.denoise_fn(
      self.params,
      jnp.concatenate([tokens, blank]),
      jnp.concatenate([mask, mask]),
      cache,
      start,
      length,
    )
    conditional, unconditional = jnp.split(both, 2)
    guided = unconditional + (scale + 1) * (conditional - unconditional)
    return guided, cache

  def commit(self, state, logits, start, end, step, draw_step):
    """One step: proposes, selects and writes inside the logits' window."""
    settings, algorithm = self.settings, self.algorithm
    window = logits.shape[1]
    now = jax.lax.dynamic_slice_in_dim(state.tokens, start, window, 1)
    places = start + jnp.arange(window)
    eligible = (now == self.ids.mask) & (places < end)  # [n, W]
    if self.until_full:
      # A row waits for the others as it would have stopped alone: masks of
      # its prompt must not profit from their steps.
      going = self.going(state.tokens, end - settings.block_length)
      eligible = eligible & going[:, None]
    draws = self.draws_of(state.calls, draw_step, start, eligible)
    token, confidence = algorithm.propose(logits, settings, self.ids, draws)
    remaining, quota = state.remaining, None
    if not settings.adaptive:
      quota = algorithm.quota(remaining, step, eligible, settings)
      if algorithm.quota is schedules.even_quota:
        remaining = remaining - quota
    chosen = algorithm.select(confidence, eligible, quota, settings)
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

  def step(self, state, block, step, cache):
    """One forward and its commit; returns the state and the cache."""
    settings = self.settings
    start = self.prompt_length + block * settings.block_length
    end = start + settings.block_length
    guided = 2.0 if settings.cfg_scale else 1.0
    width = cache.width(start, settings.block_length, self.length)
    done = state.forwards + guided * width / self.length
    state = state.replace(forwards=done)
    # `limit` of an adaptive block grows with the padding, a draw must not.
    stride = MAX_STEPS if settings.adaptive else settings.block_steps
    draw_step = block * stride + step

    def over(state, first, length):
      logits, filled = self.logits(state.tokens, cache, first, length)
      return self.commit(state, logits, first, end, step, draw_step), filled

    # Of a window only the block's rows exist.
    if not (self.competes and cache.whole):
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
    length = self.settings.block_length
    start = self.prompt_length + block * length
    now = jax.lax.dynamic_slice_in_dim(state.tokens, start, length, 1)
    masks = jnp.sum(now == self.ids.mask, axis=1, dtype=jnp.int32)
    state = state.replace(remaining=masks)
    cache = self.cache.begin()
    if cache.reuses:
      state, cache = self.step(state, block, step, cache)
      first, step = step + 1, step + 1

    def goes_on(carry):
      step, state = carry
      more = step < self.limit
      if not self.until_full:
        return more
      unfilled = self.unfilled(state, block)
      if cache.reuses:
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
    state = _State(
      tokens=canvas,
      commit_step=jnp.full(canvas.shape, -1, jnp.int32),
      remaining=jnp.zeros(self.rows, jnp.int32),
      calls=jnp.zeros((), jnp.int32),
      forwards=jnp.zeros(()),
    )

    def block_body(block, state):
      step = jnp.where(block == first_block, first_step, 0)
      run = functools.partial(self.run_block, block=block, step=step)
      if not self.cache.reuses:
        return run(state)
      return jax.lax.cond(
        self.unfilled(state, block), run, lambda state: state, state
      )

    if self.cache.static_start:
      for block in range(first_block, self.settings.blocks):
        state = block_body(block, state)
    else:
      state = jax.lax.fori_loop(
        first_block, self.settings.blocks, block_body, state
      )
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
  noise: proposals.Noise | None = None,
  rows: jax.Array | None = None,
  first_block: int = 0,
  first_step: int = 0,
) -> Denoised:
  """Fills the masked positions of the completions; traceable, not jitted.

  Args:
    denoise_fn: (params, tokens i32 [n, S], token_mask bool [n, S], cache,
      start, length) -> (logits f32 [n, length, V], cache), the logits that
      predict the tokens at positions start .. start + length. What it computes
      and what it reads is the cache's to say (`models.cache`); what is read
      must not depend on tokens elsewhere.
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
  ids = proposals.Ids(mask_id, eos_id, eot_id)
  draws_of = functools.partial(
    proposals.draws_of,
    key,
    noise or proposals.Noise(),
    jnp.arange(len(canvas)) if rows is None else rows,
    canvas.shape[1] - settings.completion_length,
  )
  denoiser = _Denoiser(
    denoise_fn, params, canvas, token_mask, settings, ids, draws_of
  )
  return denoiser.run(canvas.astype(jnp.int32), first_block, first_step)
