"""The transformer: an independent forward in float64, and what it is free of."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.models import cache, functions, transformer
from rspo_jax.models.families import ModelConfig

# Every width is another number, so that no swapped axis goes unnoticed.
PLAIN = ModelConfig(
  family="llada",
  vocab_size=21,
  width=24,
  layers=2,
  heads=6,
  kv_heads=3,
  mlp_width=20,
  rope_theta=100.0,
  norm_eps=1e-3,
  mask_id=20,
  eos_id=19,
  pad_id=18,
  max_length=32,
)
EVERYTHING = dataclasses.replace(
  PLAIN,
  kv_heads=2,
  qkv_bias=True,
  linear_bias=True,
  norm_bias=True,
  qk_norm=True,
  scale_logits=True,
  scale_embedding=True,
  tie_embeddings=True,
)
DREAM = dataclasses.replace(
  PLAIN, family="dream", qkv_bias=True, logit_shift=True, norm_eps=1e-6
)
CONFIGS = {"plain": PLAIN, "everything": EVERYTHING, "dream": DREAM}


@functools.cache
def params_of(config):
  """Random parameters of order one everywhere, biases and norms included."""
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  rng = np.random.default_rng(3)

  def one(path, leaf):
    values = rng.standard_normal(leaf.shape) * 0.4
    if path[-1].key == "scale":
      values += 1
    return jnp.asarray(values, jnp.float32)

  return jax.tree_util.tree_map_with_path(one, shapes)


@functools.cache
def jitted(name, config, *static):
  """A jitted function of this module, compiled once for all tests."""
  if name == "logits":
    return jax.jit(
      lambda params, tokens, mask: transformer.project(
        config, params, transformer.hidden(config, params, tokens, mask)
      )
    )
  if name == "logprob":
    return jax.jit(functions.make_logprob_fn(config))
  if name == "denoise":
    denoise_fn = functions.make_denoise_fn(config)
    return jax.jit(
      lambda params, tokens, mask, start: denoise_fn(
        params, tokens, mask, cache.Uncached(), start, *static
      )[0]
    )
  return jax.jit(
    jax.value_and_grad(
      lambda params, *arguments: functions.make_logprob_fn(config)(
        params, *arguments
      ).sum()
    )
  )


def naive_logits(config, params, tokens, mask):
  """Logits f64 [S, V] of one sequence: loops over layers, heads, rows."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  length = len(tokens)
  dim = config.width // config.heads

  def norm(x, tree, layer=None):
    out = np.empty_like(x)
    for i, row in enumerate(x):
      out[i] = row / np.sqrt(np.mean(row * row) + config.norm_eps)
    pick = lambda leaf: leaf if layer is None else leaf[layer]  # noqa: E731
    out = out * pick(tree["scale"])
    return out + pick(tree["bias"]) if config.norm_bias else out

  def linear(x, tree, layer):
    out = x @ tree["kernel"][layer]
    return out + tree["bias"][layer] if "bias" in tree else out

  def rotate(row, position):
    out = np.empty_like(row)
    half = dim // 2
    for j in range(half):
      angle = position * config.rope_theta ** (-2 * j / dim)
      a, b = row[j], row[j + half]
      out[j] = a * np.cos(angle) - b * np.sin(angle)
      out[j + half] = b * np.cos(angle) + a * np.sin(angle)
    return out

  x = params["embed"]["embedding"][tokens]
  if config.scale_embedding:
    x = x * np.sqrt(config.width)
  layers = params["layers"]
  for i in range(config.layers):
    h = norm(x, layers["attention_norm"], i)
    q, k, v = (linear(h, layers[n], i) for n in ("query", "key", "value"))
    if config.qk_norm:
      q = norm(q, layers["query_norm"], i)
      k = norm(k, layers["key_norm"], i)
    attended = np.zeros((length, config.width))
    for head in range(config.heads):
      own = slice(head * dim, (head + 1) * dim)
      group = head // (config.heads // config.kv_heads)
      shared = slice(group * dim, (group + 1) * dim)
      for row in range(length):
        query = rotate(q[row, own], row)
        scores = np.array(
          [query @ rotate(k[j, shared], j) for j in range(length)]
        ) / np.sqrt(dim)
        scores[~np.asarray(mask)] = -np.inf
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        attended[row, own] = weights @ v[:, shared]
    x = x + linear(attended, layers["out"], i)
    h = norm(x, layers["mlp_norm"], i)
    gate, up = linear(h, layers["gate"], i), linear(h, layers["up"], i)
    x = x + linear(gate / (1 + np.exp(-gate)) * up, layers["down"], i)
  x = norm(x, params["final_norm"])
  if config.tie_embeddings:
    logits = x @ params["embed"]["embedding"].T
  else:
    logits = x @ params["head"]["kernel"]
    logits = logits + params["head"].get("bias", 0.0)
  return logits / np.sqrt(config.width) if config.scale_logits else logits


TOKENS = np.array([[5, 1, 20, 7, 20, 11, 2], [18, 18, 9, 20, 3, 20, 20]])
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0]], bool)


@functools.cache
def oracle(name):
  """f64 [2, S, V], of TOKENS under MASK."""
  config = CONFIGS[name]
  return np.stack(
    [
      naive_logits(config, params_of(config), tokens, mask)
      for tokens, mask in zip(TOKENS, MASK, strict=True)
    ]
  )


def log_softmax(logits):
  """Log-probabilities f64 along the last axis."""
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_are_those_of_the_naive_forward(name):
  config = CONFIGS[name]
  logits = jitted("logits", config)(params_of(config), TOKENS, MASK)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, oracle(name), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_log_probs_are_read_where_tokens_are_predicted(name):
  # Two canvases a sequence: the second is the first of the other sequence.
  config = CONFIGS[name]
  canvases = np.stack([TOKENS, TOKENS[::-1]], axis=1)  # [2, C, S]
  mask = np.ones_like(MASK)
  rows = np.array([[0, 3, 6, 7, 10], [13, 1, 7, 8, 2]])
  target = np.array([[4, 0, 20, 13, 5], [1, 2, 3, 4, 5]])
  logprob = jitted("logprob", config)(
    params_of(config), canvases, mask, target, rows
  )
  plain = np.stack(
    [naive_logits(config, params_of(config), row, mask[0]) for row in TOKENS]
  )
  for i in range(2):
    for r, (row, token) in enumerate(zip(rows[i], target[i], strict=True)):
      canvas, position = divmod(row, 7)
      if config.logit_shift:  # row j predicts j + 1; position 0 itself
        position = max(position - 1, 0)
      sequence = i if canvas == 0 else 1 - i
      wanted = log_softmax(plain[sequence, position])[token]
      np.testing.assert_allclose(logprob[i, r], wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_denoising_logits_predict_the_tokens_at_their_positions(name):
  config = CONFIGS[name]
  denoise = jitted("denoise", config, 3)
  aligned = oracle(name)
  if config.logit_shift:
    aligned = np.concatenate([aligned[:, :1], aligned[:, :-1]], axis=1)
  for start in (0, 2, 4):
    logits = denoise(params_of(config), TOKENS, MASK, jnp.int32(start))
    np.testing.assert_allclose(
      logits, aligned[:, start : start + 3], rtol=1e-4, atol=2e-4
    )


def test_layers_in_two_segments_are_the_layers_in_one(monkeypatch):
  # Of every canvas, and of a window that reads their keys and values.
  config, params = EVERYTHING, dict(params_of(EVERYTHING))

  def run(params):
    denoise_fn = functions.make_denoise_fn(config)
    call = (TOKENS, MASK)
    logits, kept = denoise_fn(params, *call, cache.Dual(), 2, 3)
    return logits, denoise_fn(params, *call, kept, 2, 3)[0]

  wanted = jax.jit(run)(params)
  for name, i in (("first", slice(0, 1)), ("rest", slice(1, 2))):
    params[name] = jax.tree.map(lambda x, i=i: x[i], params["layers"])
  del params["layers"]
  two = (("first", 1, "dense"), ("rest", 1, "dense"))
  monkeypatch.setattr(transformer, "segments", lambda config: two)
  for a, b in zip(jax.jit(lambda p: run(p))(params), wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ("everything", "dream"))
def test_left_padding_changes_no_logit(name):
  config = CONFIGS[name]
  inner = TOKENS[:1]
  padded = np.full((3, 7 + 4), config.pad_id)
  mask = np.zeros(padded.shape, bool)
  for i, pads in enumerate((0, 1, 4)):
    padded[i, pads : pads + 7] = inner
    mask[i, pads : pads + 7] = True
  logits = jitted("logits", config)(params_of(config), padded, mask)
  for i, pads in enumerate((0, 1, 4)):
    np.testing.assert_allclose(
      logits[i, pads : pads + 7], oracle(name)[0], rtol=1e-4, atol=2e-4
    )


def test_tokens_outside_the_mask_influence_nothing():
  config = EVERYTHING
  run = jitted("logits", config)
  other = np.where(MASK, TOKENS, 7)
  assert (other != TOKENS).any()
  a = run(params_of(config), TOKENS, MASK)
  b = run(params_of(config), other, MASK)
  np.testing.assert_array_equal(a[MASK], b[MASK])
  # Nothing to see at all: still numbers.
  nothing = run(params_of(config), TOKENS, np.zeros_like(MASK))
  assert np.isfinite(nothing).all()


def test_attention_looks_both_ways():
  config = PLAIN
  run = jitted("logits", config)
  changed = TOKENS.copy()
  changed[0, 6] = 3
  seen = np.ones_like(MASK)
  a = run(params_of(config), TOKENS, seen)
  b = run(params_of(config), changed, seen)
  assert (abs(np.asarray(a - b))[0, 0] > 1e-4).any()
  np.testing.assert_array_equal(a[1], b[1])


CANVASES = np.stack([TOKENS, TOKENS[::-1]], axis=1)
ROWS = np.array([[0, 3, 6, 7, 10], [13, 1, 7, 8, 2]])
TARGET = np.array([[4, 0, 20, 13, 5], [1, 2, 3, 4, 5]])
CALL = (CANVASES, MASK, TARGET, ROWS)


def assert_same_gradients(config, other, tolerance):
  params = params_of(config)
  value, gradient = jitted("gradient", config)(params, *CALL)
  value2, gradient2 = jitted("gradient", other)(params, *CALL)
  np.testing.assert_allclose(value, value2, rtol=tolerance)
  norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient)))
  for a, b in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(gradient2), strict=True
  ):
    assert np.linalg.norm(a - b) <= tolerance * norm


@pytest.mark.parametrize(
  "change",
  ({"remat": True}, {"head_chunks": 4}, {"attention": "flash"}),
  ids=("remat", "head_chunks", "flash"),
)
def test_what_saves_memory_changes_neither_log_probs_nor_gradients(change):
  # Ten rows in four chunks: the last one is padded.
  other = dataclasses.replace(EVERYTHING, **change)
  assert_same_gradients(EVERYTHING, other, 3e-6)


def test_the_gradient_is_the_slope_of_the_naive_forward():
  # Along one random direction, by central differences in float64.
  config = EVERYTHING
  params = params_of(config)
  rng = np.random.default_rng(5)
  direction = jax.tree.map(lambda x: rng.standard_normal(x.shape) / 50, params)
  tokens, mask = TOKENS[0], MASK[0]

  def value(step):
    moved = jax.tree.map(
      lambda x, d: np.asarray(x, np.float64) + step * d, params, direction
    )
    logits = naive_logits(config, moved, tokens, mask)
    return log_softmax(logits)[np.arange(5), TARGET[0]].sum()

  slope = (value(1e-5) - value(-1e-5)) / 2e-5
  call = (
    np.stack([tokens, tokens])[None].repeat(2, 0),
    np.stack([mask, mask]),
    TARGET[:1].repeat(2, 0),
    np.tile(np.arange(5), (2, 1)),
  )
  _, gradient = jitted("gradient", config)(params, *call)
  ours = sum(
    float((np.asarray(g, np.float64) * d).sum())
    for g, d in zip(
      jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True
    )
  )
  np.testing.assert_allclose(ours / 2, slope, rtol=1e-4)


@pytest.mark.parametrize("name", ("plain", "everything"))
def test_bfloat16_is_for_matmuls_and_logits_are_not_rounded_to_it(name):
  config = dataclasses.replace(CONFIGS[name], compute_dtype="bfloat16")
  logits = jitted("logits", config)(params_of(config), TOKENS, MASK)
  assert logits.dtype == jnp.float32
  rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
  assert (logits != rounded).mean() > 0.9
  spread = oracle(name)[MASK].std()
  error = np.asarray(logits)[MASK] - oracle(name)[MASK]
  assert np.sqrt(np.mean(error**2)) < 0.05 * spread


def test_parameters_start_small_and_named_for_the_mesh():
  boxed = jax.eval_shape(
    lambda key: transformer.init(EVERYTHING, key, boxed=True),
    jax.random.key(0),
  )
  axes = jax.tree.map(
    lambda box: box.names, boxed, is_leaf=lambda x: hasattr(x, "names")
  )
  assert axes["embed"]["embedding"] == ("vocab", "embed")
  layers = axes["layers"]
  for name in ("query", "key", "value"):
    assert layers[name]["kernel"] == ("layers", "embed", "heads")
    assert layers[name]["bias"] == ("layers", "heads")
  assert layers["out"]["kernel"] == ("layers", "heads", "embed")
  assert layers["gate"]["kernel"] == ("layers", "embed", "mlp")
  assert layers["down"]["kernel"] == ("layers", "mlp", "embed")
  assert layers["query_norm"]["scale"] == ("layers", "norm")
  assert axes["final_norm"]["scale"] == ("norm",)
  params = transformer.init(PLAIN, jax.random.key(0))
  assert params["head"]["kernel"].shape == (24, 21)
  kernel = params["layers"]["gate"]["kernel"]
  assert kernel.shape == (2, 24, 20)
  assert abs(float(kernel.std()) - 0.02) < 0.002
  assert (np.asarray(kernel[0]) != np.asarray(kernel[1])).any()
  assert (params["layers"]["mlp_norm"]["scale"] == 1).all()
