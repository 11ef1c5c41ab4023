"""The one bidirectional transformer, as pure functions of its parameters.

    x = E[tokens]
    each layer:  x += O(attend(q, k, v of norm(x)));  x += D(silu(G h) * U h)
                 with h = norm(x); rotary positions on q and k
    logits = H(norm(x))

Attention sees both directions; padded keys get the lowest float32 as additive
bias, positions count from 0 including pads (rotary angles are relative, so
left padding changes nothing else). Source: LLaDA, arXiv 2502.09992; Dream,
arXiv 2508.15487 (biased q/k/v, grouped kv heads, logits shifted by one).

Two functions cross the boundary to sampler and likelihood, both aligned to
*targets*: `make_logprob_fn` and `make_denoise_fn`. The vocabulary-sized head
is evaluated only at the rows that the caller asks for.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from rspo_jax.models.families import ModelConfig

LOWEST = float(jnp.finfo(jnp.float32).min)

# The head: inputs in the compute dtype, logits never rounded to it.
_float32_out = functools.partial(
  jax.lax.dot_general, preferred_element_type=jnp.float32
)


def rope_tables(positions: jax.Array, head_dim: int, theta: float):
  """Cosines and sines of the rotary angles, float32.

  Args:
    positions: i32 [S], absolute positions.
    head_dim: width of one head; its first half rotates against its second.
    theta: base of the geometric frequencies.

  Returns:
    (cos, sin), each f32 [S, head_dim / 2].
  """
  half = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  angles = positions.astype(jnp.float32)[:, None] / theta**half  # [S, Dh/2]
  return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates [..., S, heads, head_dim] by tables [S, head_dim / 2]."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, None, :], sin[:, None, :]  # [S, 1, Dh/2]
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def attend(q, k, v, key_bias, kind: str = "einsum"):
  """Bidirectional attention, weights in float32.

  Args:
    q: [n, Sq, H, Dh].
    k, v: [n, Sk, M, Dh]; each of the M kv heads serves H / M queries heads.
    key_bias: f32 [n, Sk] added to the scores of every query, or None.
    kind: "einsum", or "flash" (`jax.nn.dot_product_attention`).

  Returns:
    [n, Sq, H, Dh] in q's dtype.
  """
  n, queries, heads, dim = q.shape
  keys, kv_heads = k.shape[1], k.shape[2]
  if kind == "flash":
    bias = None if key_bias is None else key_bias[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, bias=bias)
  repeat = heads // kv_heads
  # One batched 3-D matmul per kv head: XLA on the CPU is 3 times faster on it
  # than on the 4-D einsum, and the TPU compiler sees the same thing.
  q = q.reshape(n, queries, kv_heads, repeat, dim).transpose(0, 2, 3, 1, 4)
  q = q.reshape(n * kv_heads, repeat * queries, dim)
  k = k.transpose(0, 2, 1, 3).reshape(n * kv_heads, keys, dim)
  v = v.transpose(0, 2, 1, 3).reshape(n * kv_heads, keys, dim)
  scores = jax.lax.dot_general(
    q,
    k,
    (((2,), (2,)), ((0,), (0,))),
    preferred_element_type=jnp.float32,
  ) * (dim**-0.5)  # [n*M, repeat*Sq, Sk]
  if key_bias is not None:
    bias = jnp.repeat(key_bias, kv_heads, axis=0)  # [n*M, Sk]
    scores = scores + bias[:, None, :]
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jax.lax.dot_general(weights, v, (((2,), (1,)), ((0,), (0,))))
  out = out.reshape(n, kv_heads, repeat, queries, dim)
  return out.transpose(0, 3, 1, 2, 4).reshape(n, queries, heads, dim)


@struct.dataclass
class Cache:
  """Keys and values of one full forward, frozen while a block is filled.

  Keys are stored after the rotation: it depends on the position alone, and
  positions do not move, so rotating before or after storing is the same.

  Attributes:
    key, value: [N, n * M, Sc, Dh], stacked over layers; the layout that the
      batched matmuls read, so that a step copies nothing.
    kind: "prefix" (only positions before the block are read) or "dual" (all
      but the block's).
  """

  key: jax.Array
  value: jax.Array
  kind: str = struct.field(pytree_node=False)


def _by_kv_head(x):
  """[n, S, M, Dh] -> [n * M, S, Dh]."""
  n, length, heads, dim = x.shape
  return x.transpose(0, 2, 1, 3).reshape(n * heads, length, dim)


def attend_cached(q, k, v, key_bias, cached, cached_bias):
  """Attention of a window over cached positions and over itself.

  Args:
    q: [n, W, H, Dh].
    k, v: [n, W, M, Dh] of the window.
    key_bias: f32 [n, W].
    cached: (keys, values), each [n * M, Sc, Dh].
    cached_bias: f32 [n, Sc], lowest where a position is not to be read.

  Returns:
    [n, W, H, Dh] in q's dtype. The cache is read where it lies: only the
    scores of the two parts are concatenated.
  """
  n, window, heads, dim = q.shape
  kv_heads = k.shape[2]
  repeat = heads // kv_heads
  q = q.reshape(n, window, kv_heads, repeat, dim).transpose(0, 2, 3, 1, 4)
  q = q.reshape(n * kv_heads, repeat * window, dim)
  values = (cached[1], _by_kv_head(v))
  contract_last = (((2,), (2,)), ((0,), (0,)))
  scores = [
    jax.lax.dot_general(
      q, keys, contract_last, preferred_element_type=jnp.float32
    )
    for keys in (cached[0], _by_kv_head(k))
  ]
  bias = jnp.concatenate([cached_bias, key_bias], axis=1)
  bias = jnp.repeat(bias, kv_heads, axis=0)[:, None, :]
  scores = jnp.concatenate(scores, axis=-1) * (dim**-0.5) + bias
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  split = cached[0].shape[1]
  out = sum(
    jax.lax.dot_general(part, value, (((2,), (1,)), ((0,), (0,))))
    for part, value in zip(
      (weights[..., :split], weights[..., split:]), values, strict=True
    )
  )
  out = out.reshape(n, kv_heads, repeat, window, dim)
  return out.transpose(0, 3, 1, 2, 4).reshape(n, window, heads, dim)


class RMSNorm(nn.Module):
  """x / rms(x) in float32, cast back, then times the learned scale."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    scale = self.param(
      "scale",
      nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
      (x.shape[-1],),
    )
    wide = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(variance + self.config.norm_eps)).astype(
      x.dtype
    )
    out = normed * scale.astype(x.dtype)
    if self.config.norm_bias:
      bias = self.param(
        "bias",
        nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        (x.shape[-1],),
      )
      out = out + bias.astype(x.dtype)
    return out


def _dense(
  config: ModelConfig, name: str, features: int, axes, bias: bool, dot=None
):
  """A linear map with named logical axes (input, output)."""
  return nn.Dense(
    features,
    use_bias=bias,
    dtype=config.compute_dtype,
    name=name,
    dot_general=dot,
    kernel_init=nn.with_logical_partitioning(
      nn.initializers.normal(0.02), axes
    ),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axes[1],)),
  )


class Block(nn.Module):
  """One layer; the carry of the scan over layers is x [n, S, D].

  With `keep` the layer also returns its keys and values as `Cache` has them;
  with `cached` x is a window that attends to the cache as well.
  """

  config: ModelConfig
  keep: bool = False

  @nn.compact
  def __call__(self, x, rope, key_bias, cached=None, cached_bias=None):
    config = self.config
    n, length, width = x.shape
    dim = config.head_dim
    # One axis of rows: the backward pass of XLA's matmuls on the CPU is a
    # tenth slower with two.
    x = x.reshape(n * length, width)
    h = RMSNorm(config, name="attention_norm")(x)
    into_heads = ("embed", "heads")
    q = _dense(
      config, "query", config.heads * dim, into_heads, config.qkv_bias
    )(h)
    kv_width = config.kv_heads * dim
    k = _dense(config, "key", kv_width, into_heads, config.qkv_bias)(h)
    v = _dense(config, "value", kv_width, into_heads, config.qkv_bias)(h)
    if config.qk_norm:
      q = RMSNorm(config, name="query_norm")(q)
      k = RMSNorm(config, name="key_norm")(k)
    q = apply_rope(q.reshape(n, length, config.heads, dim), *rope)
    k = apply_rope(k.reshape(n, length, config.kv_heads, dim), *rope)
    v = v.reshape(n, length, config.kv_heads, dim)
    if cached is None:
      attended = attend(q, k, v, key_bias, config.attention)
    else:
      attended = attend_cached(q, k, v, key_bias, cached, cached_bias)
    attended = attended.reshape(n * length, width)
    x = x + _dense(
      config, "out", config.width, ("heads", "embed"), config.linear_bias
    )(attended)

    h = RMSNorm(config, name="mlp_norm")(x)
    into_mlp = ("embed", "mlp")
    gate = _dense(
      config, "gate", config.mlp_width, into_mlp, config.linear_bias
    )(h)
    up = _dense(config, "up", config.mlp_width, into_mlp, config.linear_bias)(h)
    x = x + _dense(
      config, "down", config.width, ("mlp", "embed"), config.linear_bias
    )(nn.silu(gate) * up)
    x = x.reshape(n, length, width)
    x = nn.with_logical_constraint(x, ("batch", None, None))
    return x, (_by_kv_head(k), _by_kv_head(v)) if self.keep else None


class Transformer(nn.Module):
  """Embedding, the scanned layers, the final norm; the head is separate."""

  config: ModelConfig
  keep: bool = False

  def setup(self):
    config = self.config
    self.embed = nn.Embed(
      config.vocab_size,
      config.width,
      dtype=config.compute_dtype,
      embedding_init=nn.with_logical_partitioning(
        nn.initializers.normal(0.02), ("vocab", "embed")
      ),
    )
    # The backward pass keeps the outputs of the weights' matmuls and computes
    # the rest again (norms, rotations, attention weights, gates): half the
    # memory, and on the CPU less time than reading it back. `remat` keeps
    # nothing but the inputs of each layer.
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    block = nn.remat(
      Block, prevent_cse=False, policy=None if config.remat else saved
    )
    self.layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
      length=config.layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, self.keep)
    self.final_norm = RMSNorm(config)
    if not config.tie_embeddings:
      self.head = _dense(
        config,
        "head",
        config.vocab_size,
        ("embed", "vocab"),
        config.linear_bias,
        _float32_out,
      )

  def _embedded(self, tokens):
    """Embeddings [n, S, D] of tokens i32 [n, S]."""
    config = self.config
    x = self.embed(tokens)
    if config.scale_embedding:
      x = x * jnp.asarray(config.width**0.5, x.dtype)
    return nn.with_logical_constraint(x, ("batch", None, None))

  def hidden_and_kv(self, tokens, token_mask):
    """Hidden rows [n, S, D] and, with `keep`, all keys and values."""
    config = self.config
    x = self._embedded(tokens)
    key_bias = None
    if token_mask is not None:
      key_bias = jnp.where(token_mask, 0.0, LOWEST)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    rope = rope_tables(positions, config.head_dim, config.rope_theta)
    x, kv = self.layers(x, rope, key_bias, None, None)
    return self.final_norm(x), kv

  def hidden(self, tokens, token_mask):
    """Final hidden rows [n, S, D] of tokens i32 [n, S]."""
    return self.hidden_and_kv(tokens, token_mask)[0]

  def window(self, tokens, token_mask, cache, first):
    """Hidden rows [n, W, D] of a window that starts at position first.

    Args:
      tokens: i32 [n, W], those of the window.
      token_mask: bool [n, S], of the whole canvas.
      cache: `Cache`.
      first: i32 [], may be traced.
    """
    config = self.config
    width, depth = tokens.shape[1], cache.key.shape[2]
    x = self._embedded(tokens)
    positions = first + jnp.arange(width, dtype=jnp.int32)
    rope = rope_tables(positions, config.head_dim, config.rope_theta)
    own = jax.lax.dynamic_slice_in_dim(token_mask, first, width, 1)
    stored = jnp.arange(depth)
    outside = (stored < first) | (stored >= first + width)
    cached_bias = jnp.where(token_mask[:, :depth] & outside, 0.0, LOWEST)
    key_bias = jnp.where(own, 0.0, LOWEST)
    kv = (cache.key, cache.value)
    x, _ = self.layers(x, rope, key_bias, kv, cached_bias)
    return self.final_norm(x)

  def project(self, h):
    """Logits f32 [..., V] of hidden rows [..., D]."""
    config = self.config
    if config.tie_embeddings:
      table = self.embed.embedding.astype(config.compute_dtype)  # [V, D]
      last = h.ndim - 1
      logits = _float32_out(h, table, (((last,), (1,)), ((), ())))
    else:
      logits = self.head(h)
    return logits * config.width**-0.5 if config.scale_logits else logits

  def __call__(self, tokens):
    return self.project(self.hidden(tokens, None))


def init(config: ModelConfig, key: jax.Array, boxed: bool = False):
  """Random parameters, float32.

  Args:
    config: the model.
    key: PRNG key.
    boxed: keep Linen's boxes with the logical axis names (for shardings).

  Returns:
    The parameter tree; layers are stacked on a leading axis.
  """
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = Transformer(config).init(key, tokens)["params"]
  return params if boxed else nn.meta.unbox(params)


def hidden(config: ModelConfig, params, tokens, token_mask=None):
  """Hidden rows after the final norm, [n, S, D] of tokens i32 [n, S]."""
  return Transformer(config).apply(
    {"params": params}, tokens, token_mask, method="hidden"
  )


def project(config: ModelConfig, params, h):
  """Logits f32 [..., V] of hidden rows [..., D]."""
  return Transformer(config).apply({"params": params}, h, method="project")


def _target_logprob(config: ModelConfig, params, h, target):
  """log p(target) f32 [m] of hidden rows [m, D] and targets i32 [m]."""
  logits = project(config, params, h)
  # A comparison instead of a gather: it stays local on a sharded vocabulary.
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  picked = jnp.where(ids == target[:, None], logits, 0.0).sum(-1)
  return picked - jax.nn.logsumexp(logits, axis=-1)


def make_logprob_fn(config: ModelConfig) -> Callable:
  """The function through which likelihoods see the model.

  Returns:
    logprob_fn(params, tokens i32 [n, C, S], token_mask bool [n, S],
    target i32 [n, R], rows i32 [n, R]) -> f32 [n, R], the log-probability of
    target r of a sequence, read from one of its C corrupted canvases: rows
    are flat indices canvas * S + position, where position is that of the
    predicted token.
  """

  def logprob_fn(params, tokens, token_mask, target, rows):
    n, canvases, length = tokens.shape
    mask = jnp.repeat(token_mask, canvases, axis=0)
    h = hidden(config, params, tokens.reshape(n * canvases, length), mask)
    h = h.reshape(n, canvases * length, config.width)
    if config.logit_shift:
      rows = jnp.where(rows % length == 0, rows, rows - 1)
    h = jnp.take_along_axis(h, rows[:, :, None], axis=1)  # [n, R, D]
    h = h.reshape(-1, config.width)
    flat = target.reshape(-1)
    chunks = config.head_chunks
    if chunks == 1:
      return _target_logprob(config, params, h, flat).reshape(target.shape)
    padding = -len(flat) % chunks
    h = jnp.pad(h, ((0, padding), (0, 0))).reshape(chunks, -1, config.width)
    flat = jnp.pad(flat, (0, padding)).reshape(chunks, -1)
    # Recomputed in the backward pass: logits of one chunk at a time exist.
    chunk_fn = jax.checkpoint(
      lambda inputs: _target_logprob(config, params, *inputs)
    )
    out = jax.lax.map(chunk_fn, (h, flat)).reshape(-1)
    return out[: out.shape[0] - padding].reshape(target.shape)

  return logprob_fn


def make_denoise_fn(config: ModelConfig) -> Callable:
  """The function through which the sampler sees the model.

  Returns:
    denoise_fn(params, tokens i32 [n, S], token_mask bool [n, S], cache,
    start, length) -> (logits f32 [n, length, V], cache): the logits that
    predict the tokens at positions start .. start + length. length is static,
    start may be traced unless the cache is a prefix. cache is

    - None: a plain full forward;
    - "prefix" or "dual": a full forward that returns a `Cache` of that kind;
    - a `Cache`: only positions start .. start + length (dual) or start .. S
      (prefix) are recomputed, the others are read as they were stored.

  With shifted logits the row before start predicts the first token, so that a
  cached window begins there.
  """

  def first_row(start):
    if not config.logit_shift:
      return start
    larger = max if isinstance(start, int) else jnp.maximum
    return larger(start - 1, 0)

  def full(params, tokens, token_mask, kind, start, length):
    h, kv = Transformer(config, kind is not None).apply(
      {"params": params}, tokens, token_mask, method="hidden_and_kv"
    )
    rows = start + jnp.arange(length)
    if config.logit_shift:
      rows = jnp.maximum(rows - 1, 0)
    logits = project(config, params, jnp.take(h, rows, axis=1))
    if kind is None:
      return logits, None
    return logits, Cache(*kv, kind=kind)

  def window(params, tokens, token_mask, cache, start, length):
    first = first_row(start)
    stored = cache
    if cache.kind == "prefix":
      first = int(first)
      width = tokens.shape[1] - first
      stored = jax.tree.map(lambda x: x[:, :, :first], cache)
    else:
      width = length + config.logit_shift
    inputs = jax.lax.dynamic_slice_in_dim(tokens, first, width, 1)
    h = Transformer(config).apply(
      {"params": params}, inputs, token_mask, stored, first, method="window"
    )
    rows = start - first + jnp.arange(length) - config.logit_shift
    h = jnp.take(h, jnp.maximum(rows, 0), axis=1)
    return project(config, params, h), cache

  def denoise_fn(params, tokens, token_mask, cache, start, length):
    forward = full if cache is None or isinstance(cache, str) else window
    return forward(params, tokens, token_mask, cache, start, length)

  return denoise_fn
