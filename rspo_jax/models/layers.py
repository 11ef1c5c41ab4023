"""Parts of a layer: norm, rotation, products with weights, embedding.

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
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from rspo_jax.devices import sharding
from rspo_jax.models.families import ModelConfig

# Streams by the prefix of their adapters' leaves (models/lora.py).
POLICY, REFERENCE = "lora", "reference"


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
