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

On a mesh (`sharding.RULES`) a layer gathers each of its weights once, in the
compute dtype, and its gradient leaves the layer as shards; the head's
vocabulary stays where it lies, and the hidden rows are gathered instead.

A forward pass carries one stream of activations or two. The second, "reference",
goes through the same layers without the adapter (or with the initial one): both
read a weight that was gathered once, and no gradient is taken through it.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from rspo_jax.devices import sharding
from rspo_jax.models import attention
from rspo_jax.models.families import ModelConfig

# Streams by the prefix of their adapters' leaves (models/lora.py).
POLICY, REFERENCE = "lora", "reference"

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


def attend(q, k, v, key_bias, kind: str = "einsum", mesh: Mesh | None = None):
  """Bidirectional attention, weights in float32.

  Args:
    q: [n, Sq, H, Dh].
    k, v: [n, Sk, M, Dh]; each of the M kv heads serves H / M queries heads.
    key_bias: f32 [n, Sk] added to the scores of every query, or None.
    kind: "einsum", or "flash" (`attention.flash`).
    mesh: whose devices compute; only "flash" asks.

  Returns:
    [n, Sq, H, Dh] in q's dtype.
  """
  n, queries, heads, dim = q.shape
  keys, kv_heads = k.shape[1], k.shape[2]
  if kind == "flash":
    return attention.flash(q, k, v, key_bias, mesh)
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


def _contract(x, matrix, axis_x: int, axis_matrix: int):
  """The plain product over one axis of each of two matrices."""
  return jax.lax.dot_general(x, matrix, (((axis_x,), (axis_matrix,)), ((), ())))


def _whole(matrix, axes, mesh):
  """A matrix as its layer multiplies by it: whole along "embed" and "rank".

  Left to itself the partitioner splits the contraction instead, and every
  product of activations becomes an all-reduce.
  """
  whole = tuple(None if axis in ("embed", "rank") else axis for axis in axes)
  matrix = sharding.constrain(mesh, matrix, whole)
  adapter = None in axes or "rank" in axes
  if adapter or mesh.devices.flat[0].platform != "tpu":
    return matrix
  # Otherwise the compiler keeps transposed copies of all layers' query, key
  # and value kernels for as long as the step lasts. An adapter's A lies with
  # the rank outside, and would be copied, and padded, the other way around.
  return with_layout_constraint(matrix, Layout(tuple(range(matrix.ndim))))


def _laid_out(mesh) -> bool:
  """Whether kernels are gathered, or their layout is pinned (one TPU)."""
  if mesh is None:
    return False
  return mesh.size > 1 or mesh.devices.flat[0].platform == "tpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sharded_product(x, matrix, axes, mesh):
  """x [rows, in] times a sharded matrix [in, out], which is gathered."""
  return _contract(x, _whole(matrix, axes, mesh), 1, 0)


def _product_forward(x, matrix, axes, mesh):
  return _sharded_product(x, matrix, axes, mesh), (x, matrix)


def _product_backward(axes, mesh, kept, cotangent):
  x, matrix = kept
  into_x = _contract(cotangent, _whole(matrix, axes, mesh), 1, 1)
  into_matrix = _sharded_gradient(x, cotangent, matrix.shape, axes, mesh)
  return into_x, into_matrix.astype(matrix.dtype)


_sharded_product.defvjp(_product_forward, _product_backward)


def _sharded_gradient(x, cotangent, shape, axes, mesh):
  """x^T cotangent [in, out], as the shards of a matrix with these axes.

  Each device multiplies its own rows, and the sum over devices leaves each
  with its shard: a reduce-scatter. The partitioner would all-reduce the whole
  gradient inside the scan over layers and then drop most of it.
  """
  own = sharding.spec(mesh, shape, axes)
  split = [i for i, entry in enumerate(own) if entry == "fsdp"]
  rows = sharding.spec(mesh, x.shape, ("batch", None))[0]
  if mesh.size == 1 or not split or rows is None:
    return sharding.constrain(mesh, _contract(x, cotangent, 0, 0), axes)
  inputs, outputs = (None if entry == "fsdp" else entry for entry in own)

  def local(x, cotangent):
    partial = _contract(x, cotangent, 0, 0)
    shard = sharding.sum_scatter(partial, "fsdp", split[0])
    return jax.lax.psum(shard, "data")

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(PartitionSpec(rows, inputs), PartitionSpec(rows, outputs)),
    out_specs=own,
    check_vma=False,
  )(x, cotangent)


class Dense(nn.Module):
  """y = x W + bias, plus (x A) B where an adapter hangs beside the kernel.

  Attributes:
    features: width of y.
    axes: logical axes (input, output) of the kernel.
    use_bias: whether there is a bias.
    dot: replaces `jax.lax.dot_general`.
    mesh: where the kernel is gathered before use; None: the caller has laid
      it out.
  """

  config: ModelConfig
  features: int
  axes: tuple[str | None, str]
  use_bias: bool = False
  dot: Callable | None = None
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x, stream: str = POLICY):
    dtype = self.config.compute_dtype
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes),
      (x.shape[-1], self.features),
    )
    x = x.astype(dtype)
    product = self._product(x, kernel, self.axes)
    if self.has_variable("params", f"{stream}_a"):
      a = self.get_variable("params", f"{stream}_a")
      b = self.get_variable("params", f"{stream}_b")
      # One layer's at a time: scaled beforehand, all layers' would be copied.
      b = b * self.get_variable("params", f"{stream}_scale")
      inner = self._product(x, a, adapter_axes(self.axes)[0])
      product = product + self._product(
        inner.astype(dtype), b, adapter_axes(self.axes)[1]
      )
    if self.use_bias:
      bias = self.param(
        "bias",
        nn.with_logical_partitioning(nn.initializers.zeros, (self.axes[1],)),
        (self.features,),
      )
      product = product + bias.astype(dtype)
    return product

  def _product(self, x, matrix, axes):
    """x [..., in] times a matrix [in, out], both in the compute dtype."""
    matrix = matrix.astype(self.config.compute_dtype)
    if _laid_out(self.mesh):
      return _sharded_product(x, matrix, axes, self.mesh)
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return (self.dot or jax.lax.dot_general)(x, matrix, contract)


def adapter_axes(axes):
  """Logical axes of A [in, r] and B [r, out] beside a kernel's (in, out).

  The rank is split where the other axis is not, so that an adapter's moments
  are spread over the devices like the weights.
  """
  inputs, outputs = axes
  return (
    (inputs, None if inputs == "embed" else "rank"),
    (None if outputs in ("embed", "head_vocab") else "rank", outputs),
  )


class Block(nn.Module):
  """One layer; the carry of the scan over layers is {stream: x [n, S, D]}.

  With `keep` the layer also returns its keys and values as `Cache` has them;
  with `cached` x is a window that attends to the cache as well.
  """

  config: ModelConfig
  keep: bool = False
  mesh: Mesh | None = None

  def setup(self):
    config = self.config
    dense = functools.partial(Dense, config, mesh=self.mesh)
    into_heads, into_mlp = ("embed", "heads"), ("embed", "mlp")
    queries = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    self.attention_norm = RMSNorm(config)
    self.query = dense(queries, into_heads, config.qkv_bias)
    self.key = dense(keys, into_heads, config.qkv_bias)
    self.value = dense(keys, into_heads, config.qkv_bias)
    if config.qk_norm:
      self.query_norm = RMSNorm(config)
      self.key_norm = RMSNorm(config)
    self.out = dense(config.width, ("heads", "embed"), config.linear_bias)
    self.mlp_norm = RMSNorm(config)
    self.gate = dense(config.mlp_width, into_mlp, config.linear_bias)
    self.up = dense(config.mlp_width, into_mlp, config.linear_bias)
    self.down = dense(config.width, ("mlp", "embed"), config.linear_bias)

  def __call__(self, streams, rope, key_bias, cached=None, cached_bias=None):
    out = {
      stream: self._one(stream, x, rope, key_bias, cached, cached_bias)
      for stream, x in streams.items()
    }
    kept = out[POLICY][1] if self.keep else None
    return {stream: x for stream, (x, _) in out.items()}, kept

  def _one(self, stream, x, rope, key_bias, cached, cached_bias):
    """The layer on one stream: (x, (keys, values))."""
    config = self.config
    n, length, width = x.shape
    dim = config.head_dim
    # One axis of rows: the backward pass of XLA's matmuls on the CPU is a
    # tenth slower with two.
    x = x.reshape(n * length, width)
    h = self.attention_norm(x)
    q, k = self.query(h, stream), self.key(h, stream)
    v = self.value(h, stream)
    if config.qk_norm:
      q, k = self.query_norm(q), self.key_norm(k)
    q = apply_rope(q.reshape(n, length, config.heads, dim), *rope)
    k = apply_rope(k.reshape(n, length, config.kv_heads, dim), *rope)
    v = v.reshape(n, length, config.kv_heads, dim)
    if cached is None:
      attended = attend(q, k, v, key_bias, config.attention, self.mesh)
    else:
      attended = attend_cached(q, k, v, key_bias, cached, cached_bias)
    x = x + self.out(attended.reshape(n * length, width), stream)

    h = self.mlp_norm(x)
    gate, up = self.gate(h, stream), self.up(h, stream)
    x = x + self.down(nn.silu(gate) * up, stream)
    x = x.reshape(n, length, width)
    x = sharding.constrain(self.mesh, x, ("batch", None, None))
    return x, (_by_kv_head(k), _by_kv_head(v))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed(table, tokens, dtype, mesh):
  """Rows [n, S, D] of a table [V, D]; each device looks its columns up."""
  tokens = sharding.constrain(mesh, tokens, ("replica", None))
  x = jnp.take(table, tokens, axis=0).astype(dtype)
  return sharding.constrain(mesh, x, ("replica", None, "embed"))


def _embed_forward(table, tokens, dtype, mesh):
  # Of the table only shape and dtype are needed again.
  like = jnp.zeros((table.shape[0], 0), table.dtype)
  return _embed(table, tokens, dtype, mesh), (tokens, like)


def _embed_backward(dtype, mesh, kept, cotangent):
  # Thousands of rows meet in that of the mask id: they are summed in float32.
  tokens, like = kept
  tokens = sharding.constrain(mesh, tokens, ("replica", None))
  cotangent = sharding.constrain(mesh, cotangent, ("replica", None, "embed"))
  total = jnp.zeros((like.shape[0], cotangent.shape[-1]), jnp.float32)
  total = total.at[tokens].add(cotangent.astype(jnp.float32))
  total = sharding.constrain(mesh, total, ("vocab", "embed"))
  return total.astype(like.dtype), None


_embed.defvjp(_embed_forward, _embed_backward)


class Embed(nn.Module):
  """Rows of the embedding, and the table for a tied head."""

  config: ModelConfig
  mesh: Mesh | None = None

  def setup(self):
    self.embedding = self.param(
      "embedding",
      nn.with_logical_partitioning(
        nn.initializers.normal(0.02), ("vocab", "embed")
      ),
      (self.config.vocab_size, self.config.width),
    )

  def __call__(self, tokens):
    x = _embed(self.embedding, tokens, self.config.compute_dtype, self.mesh)
    return sharding.constrain(self.mesh, x, ("batch", None, None))


class Transformer(nn.Module):
  """Embedding, the scanned layers, the final norm; the head is separate."""

  config: ModelConfig
  keep: bool = False
  mesh: Mesh | None = None

  def setup(self):
    config = self.config
    self.embed = Embed(config, self.mesh)
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
    )(config, self.keep, self.mesh)
    self.final_norm = RMSNorm(config)
    if not config.tie_embeddings:
      self.head = Dense(
        config,
        config.vocab_size,
        (None, "head_vocab"),
        config.linear_bias,
        _float32_out,
      )

  def _embedded(self, tokens):
    """Embeddings [n, S, D] of tokens i32 [n, S]."""
    config = self.config
    x = self.embed(tokens)
    if config.scale_embedding:
      x = x * jnp.asarray(config.width**0.5, x.dtype)
    return x

  def hidden_and_kv(self, tokens, token_mask, streams=(POLICY,)):
    """Hidden rows {stream: [n, S, D]} and, with `keep`, all keys and values."""
    config = self.config
    x = self._embedded(tokens)
    key_bias = None
    if token_mask is not None:
      key_bias = jnp.where(token_mask, 0.0, LOWEST)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    rope = rope_tables(positions, config.head_dim, config.rope_theta)
    start = {stream: x for stream in streams}
    out, kv = self.layers(start, rope, key_bias, None, None)
    return {stream: self.final_norm(x) for stream, x in out.items()}, kv

  def hidden(self, tokens, token_mask):
    """Final hidden rows [n, S, D] of tokens i32 [n, S]."""
    return self.hidden_and_kv(tokens, token_mask)[0][POLICY]

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
    out, _ = self.layers({POLICY: x}, rope, key_bias, kv, cached_bias)
    return self.final_norm(out[POLICY])

  def project(self, h, stream=POLICY):
    """Logits f32 [..., V] of hidden rows [..., D]; split over vocabulary."""
    config = self.config
    between = (None,) * (h.ndim - 2)
    h = sharding.constrain(self.mesh, h, ("replica", *between, None))
    if config.tie_embeddings:
      table = self.embed.embedding.astype(config.compute_dtype)  # [V, D]
      table = sharding.constrain(self.mesh, table, ("head_vocab", None))
      last = h.ndim - 1
      logits = _float32_out(h, table, (((last,), (1,)), ((), ())))
    else:
      logits = self.head(h, stream)
    logits = sharding.constrain(
      self.mesh, logits, ("replica", *between, "head_vocab")
    )
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


def project(config: ModelConfig, params, h, mesh=None, stream=POLICY):
  """Logits f32 [..., V] of hidden rows [..., D]."""
  return Transformer(config, mesh=mesh).apply(
    {"params": params}, h, stream, method="project"
  )


def _target_logprob(config: ModelConfig, params, h, target, mesh, stream):
  """log p(target) f32 [m] of hidden rows [m, D] and targets i32 [m]."""
  logits = project(config, params, h, mesh, stream)
  # A comparison instead of a gather: it stays local on a sharded vocabulary.
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  picked = jnp.where(ids == target[:, None], logits, 0.0).sum(-1)
  return picked - jax.nn.logsumexp(logits, axis=-1)


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
    flat = _target_logprob(
      config,
      params,
      h.reshape(-1, config.width),
      target.reshape(-1),
      mesh,
      stream,
    )
    return flat.reshape(target.shape)

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
    out, kv = Transformer(config, kind is not None, mesh).apply(
      {"params": params}, tokens, token_mask, method="hidden_and_kv"
    )
    h = out[POLICY]
    rows = start + jnp.arange(length)
    if config.logit_shift:
      rows = jnp.maximum(rows - 1, 0)
    logits = project(config, params, jnp.take(h, rows, axis=1), mesh)
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
    h = Transformer(config, mesh=mesh).apply(
      {"params": params}, inputs, token_mask, stored, first, method="window"
    )
    rows = start - first + jnp.arange(length) - config.logit_shift
    h = jnp.take(h, jnp.maximum(rows, 0), axis=1)
    return project(config, params, h, mesh), cache

  def denoise_fn(params, tokens, token_mask, cache, start, length):
    forward = full if cache is None or isinstance(cache, str) else window
    return forward(params, tokens, token_mask, cache, start, length)

  return denoise_fn
