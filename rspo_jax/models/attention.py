"""Attention: which keys a query sees, and who computes it.

    out = softmax(q k^T / sqrt(Dh) + bias) v,   weights in float32

over all parts of the keys together, where the bias is 0 for a key that is seen
and the lowest float32 for one that is not (`Visibility`).

`model.attention=flash` never holds these scores; it is, by the devices:

- TPU: splash attention (Pallas), heads of a multiple of 128;
- NVIDIA GPU from compute capability 8 on, bfloat16, heads of a multiple of 8
  up to 128: cuDNN;
- everything else, and any model without a mesh: XLA's own form, which does
  hold them.

Kernels are opaque to the partitioner: each device runs its own over its
sequences ("data", "fsdp") and heads ("tensor").
"""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
from jax.sharding import Mesh

from rspo_jax.devices import sharding

LANES = 128  # of a TPU's vector registers: widths of heads and blocks
# Queries or keys of one tile: the scores that exist at a time are its square.
BLOCKS = (512, 384, 256, LANES)

LOWEST = float(jnp.finfo(jnp.float32).min)


# Whether a query of one block sees a key of another, by whose the key is: of the
# same text; of the clean text, seen by a noisy copy; of that copy itself.
HALVES = {"text": operator.ge, "clean": operator.gt, "noisy": operator.eq}


@struct.dataclass
class Visibility:
  """Which keys of a part the queries see.

  Attributes:
    keys: bool [n, Sk], False at padding; None: all are there.
    query_block, key_block: i32 [Sq] and [Sk], blocks of a block-causal model;
      None: both directions.
    half: key of `HALVES`.
  """

  keys: jax.Array | None = None
  query_block: jax.Array | None = None
  key_block: jax.Array | None = None
  half: str = struct.field(pytree_node=False, default="text")

  def mask(self) -> jax.Array | None:
    """bool [n or 1, Sq or 1, Sk], True where seen; None: everywhere."""
    seen = None if self.keys is None else self.keys[:, None, :]
    if self.query_block is None:
      return seen
    sees = HALVES[self.half]
    blocks = sees(self.query_block[:, None], self.key_block[None, :])[None]
    return blocks if seen is None else seen & blocks

  def bias(self) -> jax.Array | None:
    """The same as f32 to add to scores."""
    mask = self.mask()
    return None if mask is None else jnp.where(mask, 0.0, LOWEST)


def by_kv_head(x):
  """[n, S, M, Dh] -> [n * M, S, Dh], what the batched matmuls read."""
  n, length, heads, dim = x.shape
  return x.transpose(0, 2, 1, 3).reshape(n * heads, length, dim)


def attend(q, parts, kv_heads: int):
  """Attention with one softmax over several parts of the keys.

  Args:
    q: [n, Sq, H, Dh].
    parts: of (keys, values, visibility); keys and values [n * M, Sk, Dh]
      (`by_kv_head`) are read where they lie.
    kv_heads: M, each of which serves H / M query heads.

  Returns:
    [n, Sq, H, Dh] in q's dtype.
  """
  n, queries, heads, dim = q.shape
  repeat = heads // kv_heads
  # One batched 3-D matmul per kv head: XLA on the CPU is 3 times faster on it
  # than on the 4-D einsum, and the TPU compiler sees the same thing.
  q = q.reshape(n, queries, kv_heads, repeat, dim).transpose(0, 2, 3, 1, 4)
  q = q.reshape(n * kv_heads, repeat * queries, dim)

  def scores(keys, visibility):
    contract_last = (((2,), (2,)), ((0,), (0,)))
    found = jax.lax.dot_general(
      q, keys, contract_last, preferred_element_type=jnp.float32
    ) * (dim**-0.5)  # [n*M, repeat*Sq, Sk]
    bias = visibility.bias()
    if bias is None:
      return found
    if bias.shape[1] > 1:
      bias = jnp.tile(bias, (1, repeat, 1))
    if bias.shape[0] > 1:
      bias = jnp.repeat(bias, kv_heads, axis=0)
    return found + bias

  values = [part[1] for part in parts]
  joined = jnp.concatenate([scores(k, seen) for k, _, seen in parts], axis=-1)
  weights = jax.nn.softmax(joined, axis=-1).astype(values[0].dtype)
  ends = list(itertools.accumulate(v.shape[1] for v in values))[:-1]
  pairs = zip(jnp.split(weights, ends, axis=-1), values, strict=True)
  over_keys = (((2,), (1,)), ((0,), (0,)))
  out = functools.reduce(
    operator.add, (jax.lax.dot_general(*pair, over_keys) for pair in pairs)
  )
  out = out.reshape(n, kv_heads, repeat, queries, dim)
  return out.transpose(0, 3, 1, 2, 4).reshape(n, queries, heads, dim)


def check(head_dim: int, mesh: Mesh) -> None:
  """Refuses heads that the kernel of the mesh's devices cannot take.

  Raises:
    ValueError: on TPU, heads that are no multiple of 128.
  """
  if mesh.devices.flat[0].platform == "tpu" and head_dim % LANES:
    raise ValueError(
      f"model.attention=flash needs heads of a multiple of {LANES} on TPU, but "
      f"this model's are {head_dim} wide; use model.attention=einsum."
    )


def flash(q, k, v, visibility: Visibility, mesh: Mesh | None):
  """Attention by the kernel of the mesh's devices.

  Args:
    q: [n, Sq, H, Dh].
    k, v: [n, Sk, M, Dh]; each of the M kv heads serves H / M query heads.
    visibility: of the keys; one with blocks has XLA's form only.
    mesh: of the parameters; None: XLA's form.

  Returns:
    [n, Sq, H, Dh] in q's dtype.
  """
  kernel = None
  if mesh is not None and visibility.query_block is None:
    kernel = _kernel(q, mesh.devices.flat[0])
  if kernel is None:
    bias = visibility.bias()
    bias = None if bias is None else bias[:, None]
    return jax.nn.dot_product_attention(q, k, v, bias=bias)
  read = visibility.keys
  if read is None:
    read = jnp.ones(k.shape[:2], bool)
  return on_mesh(kernel, mesh, q, k, v, read)


def _kernel(q, device):
  """The function of q, k, v, read for a device, or None: it has none."""
  if device.platform == "tpu":
    return splash
  # "8.0" on NVIDIA's, "gfx90a" on AMD's.
  major = str(getattr(device, "compute_capability", "")).partition(".")[0]
  dim = q.shape[-1]
  narrow = dim % 8 == 0 and dim <= 128 and q.dtype == jnp.bfloat16
  return cudnn if narrow and major.isdecimal() and int(major) >= 8 else None


def on_mesh(kernel, mesh: Mesh, q, k, v, read):
  """A kernel over each device's own sequences and heads.

  Args:
    kernel: function of q, k, v, read.
    mesh: over which they are split.
    q, k, v: as `flash` has them.
    read: bool [n, Sk].
  """
  if mesh.size == 1:
    return kernel(q, k, v, read)
  heads, kv_heads = q.shape[2], k.shape[2]
  ways = mesh.shape["tensor"]
  if heads % ways == 0 and kv_heads % ways:
    # Split, query heads would meet another device's kv heads.
    k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
  axes = ("batch", None, "heads", None)
  specs = tuple(sharding.spec(mesh, x.shape, axes) for x in (q, k, v))
  rows = sharding.spec(mesh, read.shape, ("batch", None))
  return jax.shard_map(
    kernel,
    mesh=mesh,
    in_specs=(*specs, rows),
    out_specs=specs[0],
    check_vma=False,
  )(q, k, v, read)


def splash(q, k, v, read, interpret: bool = False):
  """Splash attention on one TPU; arguments as `on_mesh` has them.

  Every query lies in segment 1, unread keys in segment 0: padded queries read
  what the others read, as with a bias. Of a sequence without any key to read
  neither output nor gradient means anything. Queries are scaled in their own
  dtype, because the kernel scales nothing.

  Args:
    interpret: run the kernel's operations one by one, on any device.
  """
  queries, heads, dim = q.shape[1:]
  q = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
  q, k, v = (_by_lanes(x).transpose(0, 2, 1, 3) for x in (q, k, v))
  keys = _by_lanes(read).astype(jnp.int32)
  rows, columns = (
    next(b for b in BLOCKS if x.shape[2] % b == 0) for x in (q, k)
  )
  mask = splash_attention_mask.FullMask((q.shape[2], k.shape[2]))
  kernel = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([mask] * heads),
    # Gradients of q in a pass of their own: the fused one holds a copy of
    # them for each block of keys.
    block_sizes=splash_attention_kernel.BlockSizes(
      block_q=rows,
      block_kv=columns,
      block_q_dkv=rows,
      block_kv_dkv=columns,
      block_q_dq=rows,
      block_kv_dq=columns,
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  segments = splash_attention_kernel.SegmentIds(
    jnp.ones((q.shape[0], q.shape[2]), jnp.int32), keys
  )
  out = jax.vmap(kernel)(q, k, v, segments)
  return out.transpose(0, 2, 1, 3)[:, :queries]


def _by_lanes(x):
  """[n, S, ...] with zeros behind, S a multiple of 128."""
  behind = -x.shape[1] % LANES
  return jnp.pad(x, ((0, 0), (0, behind)) + ((0, 0),) * (x.ndim - 2))


def cudnn(q, k, v, read, implementation: str = "cudnn"):
  """cuDNN's attention on one GPU; arguments as `on_mesh` has them.

  Args:
    implementation: of `jax.nn.dot_product_attention`.
  """
  # Keys have no order once they are rotated: with the read ones in front they
  # are a length, which the kernel knows, and no bias, of which it would return
  # a gradient.
  order = jnp.argsort(~read, axis=1, stable=True)
  take = functools.partial(jnp.take_along_axis, axis=1)
  k, v = (take(x, order[:, :, None, None]) for x in (k, v))
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    key_value_seq_lengths=jnp.maximum(read.sum(1, dtype=jnp.int32), 1),
    implementation=implementation,
  )
