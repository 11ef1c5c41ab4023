"""What one step would write: a token and a confidence for every position.

Each `*_step` is (logits f32 [n, W, V], settings, ids, draws) -> (token i32
[n, W], confidence f32 [n, W]) of a window of W positions. The token is
argmax of logits + T g with standard Gumbel noise g: sampling at temperature T,
greedy at 0. Sources: LLaDA, arXiv 2502.09992, algorithms 4 and 5; Dream, arXiv
2508.15487.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# Streams of draws: tokens and positions never share bits.
TOKENS, POSITIONS = 0, 1


@dataclasses.dataclass(frozen=True)
class Ids:
  """Token ids of the checkpoint."""

  mask: int
  eos: int | None
  eot: int | None


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


@dataclasses.dataclass(frozen=True)
class Draws:
  """Draws of one step for a window of positions, made when asked for."""

  tokens: Callable  # (vocab) -> f32 [n, W, V], Gumbel noise
  positions: Callable  # () -> f32 [n, W], uniforms
  order: Callable  # () -> f32 [n, W], Gumbel noise


# --- Draws ------------------------------------------------------------------


def gumbel_draw(key, size):
  """Standard Gumbel noise f32 [size], finite.

  From 46 bits: the 23 of one uniform cannot tell apart what reaches the top of
  a large vocabulary, whose tail would be drawn too seldom (.022 for .03 at
  126,464 tokens).
  """
  return jax.random.gumbel(key, (size,), mode="high")


def drawn(draw, key, stream, step, rows, places, size):
  """f32 [n, W, size] of draw, each a function of (key, step, row, place).

  A key a position instead of one draw for the batch: a row's bits then depend
  neither on the rows beside it nor on the window they are drawn for.
  """
  key = jax.random.fold_in(jax.random.fold_in(key, stream), step)
  fold_all = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  by_row = fold_all(key, rows)
  by_place = jax.vmap(fold_all, in_axes=(0, None))(by_row, places)
  return jax.vmap(jax.vmap(lambda k: draw(k, size)))(by_place)


def draws_of(
  key, noise: Noise, rows, prompt_length: int, call, step, start, masked
) -> Draws:
  """The draws of one step for the window that starts at `start`.

  Args:
    key: PRNG key.
    noise: recorded uniforms, which take the place of draws.
    rows: i32 [n], numbers of the rows in the whole batch.
    prompt_length: P; draws are a function of the place in the completion.
    call, step: i32 [], indices of the forward, for noise and for draws.
    start: i32 [], position of the window in the canvas.
    masked: bool [n, W], positions of the window that may be filled.
  """
  window = masked.shape[1]
  places = start + jnp.arange(window) - prompt_length
  draw = functools.partial(drawn, key=key, step=step, rows=rows, places=places)

  def of_window(recorded):
    return jax.lax.dynamic_slice_in_dim(recorded[call], start, window, 1)

  def tokens(vocab):
    if noise.tokens is not None:
      return gumbel(of_window(noise.tokens))
    return draw(gumbel_draw, stream=TOKENS, size=vocab)

  def positions():
    if noise.positions is not None:
      return of_window(noise.positions)
    if noise.masked is not None:
      order = jnp.cumsum(masked.reshape(-1)) - 1
      return noise.masked[call][order].reshape(masked.shape)
    uniform = lambda key, size: jax.random.uniform(key, (size,))  # noqa: E731
    return draw(uniform, stream=POSITIONS, size=1)[:, :, 0]

  def order():
    if noise.positions is None and noise.masked is None:
      return draw(gumbel_draw, stream=POSITIONS, size=1)[:, :, 0]
    return gumbel(positions())

  return Draws(tokens, positions, order)


def gumbel(uniform: jax.Array) -> jax.Array:
  """Standard Gumbel noise -log(-log u), -4.5 or more, finite also at u = 0."""
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


def _without(logits, token):
  """Logits [..., V] with one token's, an id or [..., 1], at minus infinity."""
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  return jnp.where(ids == token, -jnp.inf, logits)


def _probability(logits, token):
  """softmax(logits) at token: f32 [n, W] of [n, W, V] and i32 [n, W]."""
  picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
  top = jnp.max(logits, axis=-1)
  total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
  return jnp.exp(picked - top) / total


def _choose(logits, temperature, settings, ids, draws):
  """Tokens i32 [n, W] at a temperature, the mask id only if allowed."""
  if settings.mask_policy == "forbid":
    logits = _without(logits, ids.mask)
  if temperature == 0:
    return _argmax(logits)
  return gumbel_argmax(logits, draws.tokens(logits.shape[-1]), temperature)


# --- LLaDA ------------------------------------------------------------------


def low_confidence(logits, token, draws):
  """Confidence of a proposal: its probability. f32 [n, W]."""
  del draws
  return _probability(logits, token)


def random_order(logits, token, draws):
  """Confidence that orders positions at random. f32 [n, W]."""
  del logits, token
  return draws.positions()


REMASKING = {"low_confidence": low_confidence, "random": random_order}


def llada_step(logits, settings, ids, draws):
  """Gumbel tokens; the confidence is without their noise."""
  if settings.logits_eos_inf:
    logits = _without(logits, ids.eos)
  token = _choose(logits, settings.temperature, settings, ids, draws)
  if settings.confidence_eos_eot_inf:
    if settings.temperature == 0:
      logits = _without(logits, ids.eos)
    logits = _without(logits, ids.eot)
  return token, REMASKING[settings.remasking](logits, token, draws)


# --- Dream ------------------------------------------------------------------


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


def _tempered(logits, settings, ids, draws):
  """Logits after temperature and filters, in Dream's order, and tokens."""
  temperature = settings.temperature
  if temperature > 0:
    logits, temperature = logits / temperature, 1.0
  logits = filter_logits(logits, settings.top_p, settings.top_k)
  return logits, _choose(logits, temperature, settings, ids, draws)


def drawn_order(confidence, settings, draws):
  """Confidence whose ranking draws from softmax(confidence / temperature).

  The largest of log-weights plus Gumbel noise are a draw without replacement.
  """
  if settings.order_temperature == 0:
    return confidence
  return confidence / settings.order_temperature + draws.order()


def maskgit_plus_step(logits, settings, ids, draws):
  """The confidence is the token's filtered probability."""
  logits, token = _tempered(logits, settings, ids, draws)
  return token, drawn_order(_probability(logits, token), settings, draws)


def topk_margin_step(logits, settings, ids, draws):
  """The confidence is the lead of the best token over the second."""
  logits, token = _tempered(logits, settings, ids, draws)
  first = _argmax(logits)
  second = _argmax(_without(logits, first[..., None]))
  margin = _probability(logits, first) - _probability(logits, second)
  return token, drawn_order(margin, settings, draws)


def entropy_step(logits, settings, ids, draws):
  """The confidence is the negative entropy of the position."""
  logits, token = _tempered(logits, settings, ids, draws)
  p = jax.nn.softmax(logits, axis=-1)
  negative_entropy = jnp.sum(p * jnp.log(p + 1e-10), axis=-1)
  return token, drawn_order(negative_entropy, settings, draws)


def origin_step(logits, settings, ids, draws):
  """The confidence is a coin, which `schedules.select_by_coin` compares."""
  _, token = _tempered(logits, settings, ids, draws)
  return token, draws.positions()
