"""The two functions that cross the boundary to sampler and likelihood.

Both are aligned to *targets*, whatever row of the logits predicts them, and
evaluate the vocabulary-sized head only at the rows that the caller asks for.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rspo_jax.models.families import ModelConfig
from rspo_jax.models.layers import POLICY, REFERENCE
from rspo_jax.models.transformer import Transformer, project


def make_logprob_fn(
  config: ModelConfig, mesh: Mesh | None = None, dual: bool = False
) -> Callable:
  """The function through which likelihoods see the model.

  Args:
    config: the model.
    mesh: of the parameters; None: no layout is asked for.
    dual: score the reference in the same pass, a second stream.

  Returns:
    logprob_fn(params, tokens i32 [n, C, S], token_mask bool [n, S],
    target i32 [n, R], rows i32 [n, R]) -> f32 [n, R], the log-probability of
    target r of a sequence, read from one of its C corrupted canvases: rows
    are flat indices canvas * S + position, where position is that of the
    predicted token. With `dual` a pair of them: policy, reference.
  """
  streams = (POLICY, REFERENCE) if dual else (POLICY,)

  def logprob_fn(params, tokens, token_mask, target, rows):
    n, canvases, length = tokens.shape
    out, _ = Transformer(config, mesh=mesh).apply(
      {"params": params},
      tokens.reshape(n * canvases, length),
      jnp.repeat(token_mask, canvases, axis=0),
      streams,
      method="hidden_and_kv",
    )
    if config.logit_shift:
      rows = jnp.where(rows % length == 0, rows, rows - 1)

    def of(stream):
      h = out[stream].reshape(n, canvases * length, config.width)
      h = jnp.take_along_axis(h, rows[:, :, None], axis=1)  # [n, R, D]
      return target_logprobs(config, params, h, target, mesh, stream)

    logprobs = tuple(of(stream) for stream in streams)
    return logprobs if dual else logprobs[0]

  return logprob_fn


def target_logprobs(config, params, h, target, mesh=None, stream=POLICY):
  """Log-probabilities of tokens, with the logits of a piece of R at a time.

  Args:
    config: the model; `head_chunks` is the number of pieces.
    params: its parameters.
    h: final hidden rows [n, R, D].
    target: i32 [n, R], the tokens.
    mesh: of the parameters; None: no layout is asked for.
    stream: whose adapter the head has.

  Returns:
    f32 [n, R].
  """

  def logprob(inputs):
    h, target = inputs
    h = h.reshape(-1, config.width)  # [m, D]
    logits = project(config, params, h, mesh, stream)
    # A comparison instead of a gather: it stays local on a sharded vocabulary.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    flat = target.reshape(-1)
    picked = jnp.where(ids == flat[:, None], logits, 0.0).sum(-1)
    chosen = picked - jax.nn.logsumexp(logits, axis=-1)
    return chosen.reshape(target.shape)

  chunks, budget = config.head_chunks, target.shape[1]
  if chunks == 1:
    return logprob((h, target))

  def pieces(x):
    # Of each sequence's rows, so that every device has a part in every piece.
    x = jnp.pad(x, ((0, 0), (0, -budget % chunks)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(x.shape[0], chunks, -1, *x.shape[2:])
    return jnp.swapaxes(x, 0, 1)

  # Recomputed in the backward pass: logits of one piece at a time exist.
  out = jax.lax.map(jax.checkpoint(logprob), (pieces(h), pieces(target)))
  return jnp.swapaxes(out, 0, 1).reshape(target.shape[0], -1)[:, :budget]


def make_denoise_fn(config: ModelConfig, mesh: Mesh | None = None) -> Callable:
  """The function through which the sampler sees the model.

  Args:
    config: the model.
    mesh: of the parameters; None: no layout is asked for.

  Returns:
    denoise_fn(params, tokens i32 [n, S], token_mask bool [n, S], cache,
    start, length) -> (logits f32 [n, length, V], cache): the logits that
    predict the tokens at positions start .. start + length. length is static,
    start may be traced unless the cache wants it static. What is computed and
    what is read instead is up to the cache (`models.cache`).

  With shifted logits the row before start predicts the first token, so that a
  cached window begins there.
  """
  shift = int(config.logit_shift)

  def full(params, tokens, token_mask, cache, start, length):
    out, kv = Transformer(config, cache.reuses, mesh).apply(
      {"params": params}, tokens, token_mask, method="hidden_and_kv"
    )
    rows = start + jnp.arange(length)
    if shift:
      rows = jnp.maximum(rows - 1, 0)
    logits = project(config, params, jnp.take(out[POLICY], rows, axis=1), mesh)
    return logits, cache.commit(*kv) if cache.reuses else cache

  def window(params, tokens, token_mask, cache, start, length):
    first = start
    if shift:
      larger = max if isinstance(start, int) else jnp.maximum
      first = larger(start - 1, 0)
    width = cache.width(first, length + shift, tokens.shape[1])
    inputs = jax.lax.dynamic_slice_in_dim(tokens, first, width, 1)
    h = Transformer(config, mesh=mesh).apply(
      {"params": params}, inputs, token_mask, cache, first, method="window"
    )
    rows = start - first + jnp.arange(length) - shift
    h = jnp.take(h, jnp.maximum(rows, 0), axis=1)
    return project(config, params, h, mesh), cache

  def denoise_fn(params, tokens, token_mask, cache, start, length):
    forward = full if cache.whole else window
    return forward(params, tokens, token_mask, cache, start, length)

  return denoise_fn
