"""The one transformer, as pure functions of its parameters.

    x = E[tokens]
    each layer:  x += O(attend(q, k, v of norm(x)));  x += MLP(norm(x))
                 rotary positions on q and k
    logits = H(norm(x))

Attention sees both directions; positions count from 0 including pads (rotary
angles are relative, so left padding changes nothing else). Source: LLaDA, arXiv
2502.09992; Dream, arXiv 2508.15487 (biased q/k/v, grouped kv heads, logits
shifted by one). Its parts are in `layers`, `attention` and `mlp`; sampler and
likelihood see it through `functions`.
"""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rspo_jax.devices import sharding
from rspo_jax.models import attention
from rspo_jax.models.attention import Visibility
from rspo_jax.models.families import ModelConfig
from rspo_jax.models.layers import (
  POLICY,
  Dense,
  Embed,
  RMSNorm,
  apply_rope,
  rope_tables,
)
from rspo_jax.models.mlp import MLPS

# The head: inputs in the compute dtype, logits never rounded to it.
_float32_out = functools.partial(
  jax.lax.dot_general, preferred_element_type=jnp.float32
)


class Block(nn.Module):
  """One layer; the carry of the scan over layers is {stream: x [n, S, D]}.

  Attributes:
    config: the model.
    mlp: key of `MLPS`.
    keep: return keys and values too, as a cache commits them.
    mesh: of the parameters.
  """

  config: ModelConfig
  mlp: str = "dense"
  keep: bool = False
  mesh: Mesh | None = None

  def setup(self):
    config = self.config
    dense = functools.partial(Dense, config, mesh=self.mesh)
    into_heads = ("embed", "heads")
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
    self.after = MLPS[self.mlp](config, self.mesh)
    nn.share_scope(self, self.after)

  def __call__(self, streams, rope, visibility, stored=None, offered=None):
    """The layer on every stream.

    Args:
      streams: {stream: x [n, S, D]}.
      rope: cosines and sines of the positions.
      visibility: of the streams' own keys.
      stored: (keys, values) of this layer that are read beside them, or None.
      offered: their visibility.
    """
    out = {
      stream: self._one(stream, x, rope, visibility, stored, offered)
      for stream, x in streams.items()
    }
    kept = out[POLICY][1] if self.keep else None
    return {stream: x for stream, (x, _) in out.items()}, kept

  def _one(self, stream, x, rope, visibility, stored, offered):
    """The layer on one stream: (x, (keys, values))."""
    config = self.config
    n, length, width = x.shape
    dim, kv_heads = config.head_dim, config.kv_heads
    # One axis of rows: the backward pass of XLA's matmuls on the CPU is a
    # tenth slower with two.
    x = x.reshape(n * length, width)
    h = self.attention_norm(x)
    q, k = self.query(h, stream), self.key(h, stream)
    v = self.value(h, stream)
    if config.qk_norm:
      q, k = self.query_norm(q), self.key_norm(k)
    q = apply_rope(q.reshape(n, length, config.heads, dim), *rope)
    k = apply_rope(k.reshape(n, length, kv_heads, dim), *rope)
    v = v.reshape(n, length, kv_heads, dim)
    kept = attention.by_kv_head(k), attention.by_kv_head(v)
    if stored is None and config.attention == "flash":
      attended = attention.flash(q, k, v, visibility, self.mesh)
    else:
      parts = [] if stored is None else [(*stored, offered)]
      parts.append((*kept, visibility))
      attended = attention.attend(q, parts, kv_heads)
    x = x + self.out(attended.reshape(n * length, width), stream)

    x = x + self.after(self.mlp_norm(x), stream)
    x = x.reshape(n, length, width)
    return sharding.constrain(self.mesh, x, ("batch", None, None)), kept


def segments(config: ModelConfig) -> tuple[tuple[str, int, str], ...]:
  """Runs of equal layers: (name in the parameter tree, count, key of `MLPS`).

  Each is one scan over parameters that are stacked on a leading axis.
  """
  return (("layers", config.layers, "dense"),)


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
    for name, count, mlp in segments(config):
      scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
        length=count,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      setattr(self, name, scanned(config, mlp, self.keep, self.mesh))
    self.final_norm = RMSNorm(config)
    if not config.tie_embeddings:
      self.head = Dense(
        config,
        config.vocab_size,
        (None, "head_vocab"),
        config.linear_bias,
        _float32_out,
      )

  def _through(self, tokens, first, streams, visibility, stored, offered):
    """Hidden rows of tokens at positions from first on, keys and values."""
    config = self.config
    x = self.embed(tokens)
    if config.scale_embedding:
      x = x * jnp.asarray(config.width**0.5, x.dtype)
    positions = first + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    rope = rope_tables(positions, config.head_dim, config.rope_theta)
    out, kept, done = {stream: x for stream in streams}, [], 0
    for name, count, _ in segments(config):
      own = jax.tree.map(operator.itemgetter(slice(done, done + count)), stored)
      out, kv = getattr(self, name)(out, rope, visibility, own, offered)
      kept.append(kv)
      done += count
    kv = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)
    return {stream: self.final_norm(x) for stream, x in out.items()}, kv

  def hidden_and_kv(self, tokens, token_mask, streams=(POLICY,)):
    """Hidden rows {stream: [n, S, D]} and, with `keep`, all keys and values."""
    seen = Visibility(token_mask)
    return self._through(tokens, 0, streams, seen, None, None)

  def window(self, tokens, token_mask, cache, first):
    """Hidden rows [n, W, D] of a window that starts at position first.

    Args:
      tokens: i32 [n, W], those of the window.
      token_mask: bool [n, S], of the whole canvas.
      cache: what it reads beside itself (`models.cache`).
      first: i32 [], may be traced.
    """
    width = tokens.shape[1]
    own = jax.lax.dynamic_slice_in_dim(token_mask, first, width, 1)
    stored, offered = cache.read(first, width)
    offered = Visibility(token_mask[:, : offered.shape[0]] & offered)
    return self._through(
      tokens, first, (POLICY,), Visibility(own), stored, offered
    )[0][POLICY]

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
    return self.project(self.hidden_and_kv(tokens, None)[0][POLICY])


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
    {"params": params}, tokens, token_mask, method="hidden_and_kv"
  )[0][POLICY]


def project(config: ModelConfig, params, h, mesh=None, stream=POLICY):
  """Logits f32 [..., V] of hidden rows [..., D]."""
  return Transformer(config, mesh=mesh).apply(
    {"params": params}, h, stream, method="project"
  )
