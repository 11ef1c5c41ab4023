"""LLaDA's and Fast-dLLM's decoding once more, in numpy and float64.

One row at a time, as the reference programs do, with an own forward pass:
caches hold keys before their rotation, a cached block overwrites its own part.
Written from the rules of ../shared/fixtures, not from `rspo_jax.sampling`.
"""

import functools

import numpy as np

VOCAB, MASK, EOS, EOT = 30, 29, 28, 27


@functools.cache
def tiny_model(family="llada", seed=3, kv_heads=2):
  """Config and parameters of the model that is decoded, both ways."""
  import jax

  from rspo_jax.models import families, transformer

  config = families.ModelConfig(
    family=family, vocab_size=VOCAB, width=16, layers=2, heads=4,
    kv_heads=kv_heads, mlp_width=24, rope_theta=1e4, norm_eps=1e-6,
    mask_id=MASK, eos_id=EOS, pad_id=EOS, max_length=64,
    qkv_bias=family == "dream", logit_shift=family == "dream",
  )  # fmt: skip
  params = transformer.init(config, jax.random.key(seed))
  # Logits of spread 1 or more: confidences far from ties.
  return config, jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, params)


class Naive:
  """A LLaDA forward pass over parameters of `transformer.init`."""

  def __init__(self, config, params):
    self.config = config
    self.params = _float64(params)

  def norm(self, x, scale):
    mean = (x * x).mean(-1, keepdims=True)
    return x / np.sqrt(mean + self.config.norm_eps) * scale["scale"]

  def rotate(self, x, places):
    """x [heads, S, dim] at absolute places [S]."""
    half = x.shape[-1] // 2
    rates = self.config.rope_theta ** (-np.arange(half) / half)
    angles = np.asarray(places)[:, None] * rates
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  def __call__(self, tokens, seen, first=0, cache=None):
    """Logits [len(tokens), V] of positions from `first` on, and the cache.

    Args:
      tokens: i32 [W], those of positions first .. first + W.
      seen: bool [S], keys that are no padding.
      first: place of the first token.
      cache: a list of (keys, values) [M, S or less, dim], or None.
    """
    config, layers = self.config, self.params["layers"]
    heads, kv_heads = config.heads, config.kv_heads
    dim, width = config.head_dim, len(tokens)
    x = self.params["embed"]["embedding"][tokens]
    kept = []
    for i in range(config.layers):
      layer = {
        name: {key: value[i] for key, value in module.items()}
        for name, module in layers.items()
      }

      def project(h, name, layer=layer):
        return h @ layer[name]["kernel"] + layer[name].get("bias", 0.0)

      h = self.norm(x, layer["attention_norm"])
      q = project(h, "query").reshape(width, heads, dim).swapaxes(0, 1)
      k, v = (
        project(h, n).reshape(width, kv_heads, dim).swapaxes(0, 1)
        for n in ("key", "value")
      )
      if cache is not None:
        old_k, old_v = cache[i]
        if old_k.shape[1] > first:  # all positions are cached: overwrite
          old_k[:, first : first + width], old_v[:, first : first + width] = (
            k,
            v,
          )
          k, v = old_k, old_v
        else:
          k = np.concatenate([old_k, k], 1)
          v = np.concatenate([old_v, v], 1)
      kept.append((k.copy(), v.copy()))
      q = self.rotate(q, first + np.arange(width))
      k = self.rotate(k, np.arange(k.shape[1]))
      out = []
      for head in range(heads):
        served = head // (heads // kv_heads)
        scores = q[head] @ k[served].T / np.sqrt(dim)
        scores = np.where(seen[: k.shape[1]], scores, -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out.append(weights @ v[served])
      x = x + project(np.concatenate(out, -1), "out")
      h = self.norm(x, layer["mlp_norm"])
      gate = project(h, "gate")
      x = x + project(gate / (1 + np.exp(-gate)) * project(h, "up"), "down")
    x = self.norm(x, self.params["final_norm"])
    return x @ self.params["head"]["kernel"], kept


def _float64(tree):
  if isinstance(tree, dict):
    return {key: _float64(value) for key, value in tree.items()}
  return np.asarray(tree, np.float64)


def softmax_at(logits, token):
  """Probability of one token of each row."""
  with np.errstate(invalid="ignore"):
    p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  return p[np.arange(len(token)), token]


def quotas(masks, steps):
  """Tokens of each step."""
  return [masks // steps + (i < masks % steps) for i in range(steps)]


def decode_row(
  model, row, seen, *, length, block, steps, mask, eos=None, eot=None,
  temperature=0.0, remasking="low_confidence", cfg_scale=0.0, cache="none",
  threshold=None, factor=None, logits_eos_inf=False,
  confidence_eos_eot_inf=False, noise=None, places=None, until_full=False,
  jitter=0.0, rng=None,
):  # fmt: skip
  """Fills one row; returns it and the forwards of each block.

  Args:
    noise: f [calls, S, V] uniforms of the tokens, or None.
    places: f [calls, S] uniforms of random remasking, or None.
    until_full: a block ends when it is full (Fast-dLLM), not with its steps.
    jitter: size of uniform noise on every logit, to find near-ties.
  """
  x = row.copy()
  start = len(x) - length
  given = x != mask
  block_steps = steps // (length // block)
  calls, per_block = 0, []

  def forward(tokens, first, kept):
    logits, kept = model(tokens, seen, first, kept)
    if cfg_scale:
      blank = np.where(given, mask, tokens)
      other, _ = model(blank, seen, first)
      logits = other + (cfg_scale + 1) * (logits - other)
    if jitter:
      logits = logits + rng.uniform(-jitter, jitter, logits.shape)
    return logits, kept

  def commit(logits, first, end, count, call):
    """Writes one step's tokens into x[first : first + len(logits)]."""
    window = slice(first, first + len(logits))
    masked = x[window] == mask
    masked[max(end - first, 0) :] = False
    if not masked.any():
      return
    if logits_eos_inf:
      logits[:, eos] = -np.inf
    noisy = logits
    if temperature:
      u = np.asarray(noise[call][window], np.float64)
      with np.errstate(divide="ignore"):
        noisy = logits - temperature * np.log(-np.log(u))
    token = noisy.argmax(-1)
    if confidence_eos_eot_inf:
      if not temperature:
        logits[:, eos] = -np.inf
      logits[:, eot] = -np.inf
    if remasking == "random":
      confidence = places[call][window].astype(np.float64)
    else:
      confidence = softmax_at(logits, token)
    order = np.flatnonzero(masked)
    order = order[np.argsort(-confidence[order], kind="stable")]
    if threshold is not None:
      take = [order[0], *(o for o in order[1:] if confidence[o] >= threshold)]
    elif factor is not None:
      bars = [1 - factor / (n + 1) for n in range(1, len(order) + 1)]
      bars[0] = -1
      for top in range(len(order)):
        if confidence[order[top]] < bars[top]:
          break
      if top in (0, len(order) - 1):
        top += 1
      take = order[:top]
    else:
      take = order[:count]
    x[window][take] = token[take]

  for b in range(length // block):
    first, end = start + b * block, start + (b + 1) * block
    counts = quotas(int((x[first:end] == mask).sum()), block_steps)
    begun = calls
    kept = None
    for step in range(10**6):
      adaptive = threshold is not None or factor is not None
      if not adaptive and step == block_steps:
        break
      full = not (x[first:end] == mask).any()
      if step and until_full and full and not (step == 1 and cache != "none"):
        break
      if step > len(x):
        break  # nothing but masks is predicted
      count = None if adaptive else counts[step]
      if cache == "none" or step == 0:
        logits, kept = forward(x, 0, None)
        commit(logits, 0, end, count, calls)
        if cache == "prefix":
          kept = [(k[:, :first], v[:, :first]) for k, v in kept]
      else:
        to = end if cache == "dual" else len(x)
        logits, after = forward(x[first:to], first, kept)
        kept = after if cache == "dual" else kept
        commit(logits, first, end, count, calls)
      calls += 1
    per_block.append(calls - begun)
  return x, per_block
