"""Bias, variance and noise of the estimators of d, on a policy's completions.

The exact scores come from all 2^L - 1 masks where L <= 10, else from many
complementary pairs. Units: nats per token and their squares.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.algorithm import advantages, likelihood, streams
from rspo_jax.devices import sharding
from rspo_jax.models import functions
from rspo_jax.run import data, rollout
from rspo_jax.run import settings as settings_lib

ENUMERATED = 10  # longest completion whose masks are all gone through
LONG_PAIRS = 2048  # complementary pairs in place of enumeration
RESAMPLES = 2000
GRADIENT_DRAWS = 12


def schemes_at(
  forwards: int, settings: settings_lib.Settings, names
) -> dict[str, likelihood.LikelihoodSettings]:
  """The run's likelihood settings with each scheme that has an estimate.

  What the number of forwards decides is set: masks, and the steps that share a
  canvas.
  """
  sampler = settings.sampler
  found = {}
  for name in dict.fromkeys(names):
    entry = likelihood.ESTIMATORS[name]
    if forwards % (entry.draw_size or 1) or (
      entry.masks is not None and forwards not in entry.masks
    ):
      continue
    # A threshold may commit one position a step, whatever the steps are.
    steps = sampler.completion_length
    if not sampler.adaptive:
      steps = min(steps, sampler.steps)
    found[name] = dataclasses.replace(
      settings.likelihood,
      scheme=name,
      masks=forwards,
      shrink=-(-steps // forwards),
    )
  return found


def all_masks(
  scored: np.ndarray, prompt_length: int, scope: str
) -> likelihood.Masks:
  """Every non-empty mask of each completion, as one draw a mask.

  Weights are (2^L - 1) / (L C(L, |M|) |M|), so that the mean over masks is the
  count-uniform ELBO per token. All completions must fit: masks that hide an
  unscored position weigh 0.

  Args:
    scored: bool [n, L].
    prompt_length: P.
    scope: as in likelihood.LikelihoodSettings.
  """
  n, length = scored.shape
  codes = np.arange(1, 2**length)
  subset = (codes[:, None] >> np.arange(length)) & 1 > 0  # [M, L]
  inside = ~(subset[None] & ~scored[:, None]).any(-1)  # [n, M]
  size = subset.sum(-1)  # [M]
  total = scored.sum(-1)[:, None]  # [n, 1]
  choices = np.array(
    [[math.comb(int(t), int(s)) for s in size] for t in total[:, 0]], float
  )
  each = np.where(inside, len(codes) / (total * np.maximum(choices, 1)), 0)
  each = each / size
  weight = each[:, :, None] * subset[None]
  rows = prompt_length + np.arange(length)
  corrupt = np.broadcast_to(subset, (n, *subset.shape))
  if scope == "masked_tail":
    corrupt = corrupt | ~scored[:, None]
  corrupt = np.pad(corrupt, ((0, 0), (0, 0), (prompt_length, 0)))
  return likelihood.Masks(
    corrupt=corrupt[:, :, None],
    rows=np.broadcast_to(rows, (n, len(codes), length)).astype(np.int32),
    weight=weight[:, :, None].astype(np.float32),
  )


class Bench:
  """Completions of the policy, and both models' scores of them."""

  def __init__(self, program, policy, sequences: int):
    self.program, self.policy = program, policy
    self.reference = program.reference
    self.config = program.model.config
    settings = program.settings
    examples = data.load_examples(program.task, "train", settings.data)
    group = settings.rollout.group_size
    examples = examples[: settings.rollout.prompts]
    prompts = program.prompts(examples).batch(np.arange(len(examples)))
    key = streams.stream_key(settings.run.seed, 0, streams.ROLLOUT)
    placed = sharding.put_global(program.mesh, (prompts.tokens, prompts.mask))
    out = program.rollout_fn(policy, *placed, key)
    ended = np.asarray(out.completion_mask)
    texts = program.to_text(np.asarray(out.tokens)[:, -ended.shape[1] :], ended)
    judged = program.judge(examples, texts)
    advantage = advantages.group_advantages(judged.rewards.reshape(-1, group))
    found = rollout.before_rewards(len(advantage), group)
    batch = rollout.make_batch(
      out,
      found.replace(advantage=jnp.asarray(advantage)),
      settings.likelihood.scope,
      with_trace=True,
    )
    self.batch = jax.tree.map(lambda x: x[:sequences], batch)

  def call(self, fn, *args):
    """Calls a function of the model under the run's mesh."""
    with sharding.active(self.program.mesh):
      return fn(*args)

  def scorer(self, settings, dtype: str | None = None):
    """Jitted (params, key) -> mean score f32 [n] of a scheme."""
    config = self.config
    if dtype is not None:
      config = dataclasses.replace(config, compute_dtype=dtype)
    logprob_fn = functions.make_logprob_fn(config)
    batch, mask_id = self.batch, config.mask_id

    @jax.jit
    def score(params, key):
      masks = likelihood.batch_masks(key, settings, batch)
      return likelihood.score(
        logprob_fn, params, batch.tokens, batch.token_mask, masks, mask_id
      ).mean(-1)

    return score

  def exact(self, seed: int = 7) -> tuple[np.ndarray, str]:
    """(d f64 [n] without mask noise, or nearly; how it was made)."""
    scored = np.asarray(self.batch.completion_mask)
    if scored.shape[1] <= ENUMERATED:
      return self._enumerated(scored), "all masks"
    settings = dataclasses.replace(
      self.program.settings.likelihood, scheme="complementary", masks=32
    )
    score = self.scorer(settings)
    total = np.zeros(len(scored))
    rounds = LONG_PAIRS // 16
    for i in range(rounds):
      key = jax.random.fold_in(jax.random.key(seed), i)
      total += self.relative(score, key)
    return total / rounds, f"{LONG_PAIRS} complementary pairs"

  def _enumerated(self, scored) -> np.ndarray:
    """d f64 [n] by all masks, a sequence at a time."""
    length = scored.shape[1]
    scope = self.program.settings.likelihood.scope
    masks = all_masks(scored, self.batch.tokens.shape[1] - length, scope)
    logprob_fn = functions.make_logprob_fn(self.config)

    @jax.jit
    def score(params, tokens, token_mask, masks):
      return likelihood.score(
        logprob_fn, params, tokens, token_mask, masks, self.config.mask_id
      )

    out = np.zeros((2, len(scored)))
    for i in range(len(scored)):
      own = jax.tree.map(lambda x, i=i: x[i : i + 1], masks)
      row = (self.batch.tokens[i : i + 1], self.batch.token_mask[i : i + 1])
      for side, params in enumerate((self.policy, self.reference)):
        values = self.call(score, params, *row, own)
        out[side, i] = np.asarray(values, np.float64).mean()
    return out[0] - out[1]

  def relative(self, score, key) -> np.ndarray:
    """d f64 [n] of one draw of masks."""
    one, other = (
      self.call(score, params, key) for params in (self.policy, self.reference)
    )
    return np.asarray(one, np.float64) - np.asarray(other, np.float64)

  def draws(self, settings, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of policy and reference over mask draws, f64 [R, n] each."""
    score = self.scorer(settings)
    sides = []
    for params in (self.policy, self.reference):
      keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(repeats)]
      rows = [np.asarray(self.call(score, params, key)) for key in keys]
      sides.append(np.asarray(rows, np.float64))
    return sides[0], sides[1]

  def gradient_snr(self, settings) -> dict[str, float]:
    """|E g|^2 / tr Var(g) of the mean score, by the sign of the advantage.

    E and Var over mask draws; |E g|^2 is corrected for the draws' own noise.
    """
    score = self.scorer(settings)
    gradient = jax.jit(
      jax.grad(lambda params, key, weight: (weight * score(params, key)).sum())
    )
    advantage = np.asarray(self.batch.advantage)
    out = {}
    for name, chosen in (
      ("positive", advantage > 0),
      ("negative", advantage < 0),
    ):
      if not chosen.any():
        continue
      weight = jnp.asarray(chosen / chosen.sum(), jnp.float32)
      rows = []
      for i in range(GRADIENT_DRAWS):
        key = jax.random.fold_in(jax.random.key(2), i)
        leaves = jax.tree.leaves(self.call(gradient, self.policy, key, weight))
        rows.append(np.concatenate([np.asarray(x).reshape(-1) for x in leaves]))
      rows = np.asarray(rows, np.float64)
      noise = rows.var(0, ddof=1).sum()
      signal = np.square(rows.mean(0)).sum() - noise / GRADIENT_DRAWS
      out[name] = float(max(signal, 0.0) / max(noise, 1e-30))
    return out

  def bf16_floor(self, settings) -> float:
    """Root mean square of what bfloat16 adds to d, same masks."""
    exact, rounded = self.scorer(settings), self.scorer(settings, "bfloat16")
    errors = []
    for i in range(8):
      key = jax.random.fold_in(jax.random.key(3), i)
      errors.append(self.relative(rounded, key) - self.relative(exact, key))
    return float(np.sqrt(np.square(errors).mean()))


def measure(policy, reference, exact) -> dict:
  """Bias, variance, MSE of d and correlation of the two sides' noise.

  Args:
    policy, reference: f64 [R, n], scores over R mask draws.
    exact: f64 [n], d without mask noise.

  Returns:
    Numbers, and `by_sequence`, the MSE of each sequence [n].
  """
  error = policy - reference - exact
  noise_p, noise_r = policy - policy.mean(0), reference - reference.mean(0)
  scale = np.sqrt(np.square(noise_p).sum() * np.square(noise_r).sum())
  bias = error.mean(0)
  return {
    "bias": float(bias.mean()),
    "bias_rms": float(np.sqrt(np.square(bias).mean())),
    "variance": float(error.var(0, ddof=1).mean()),
    "mse": float(np.square(error).mean()),
    "noise_correlation": float((noise_p * noise_r).sum() / max(scale, 1e-30)),
    "by_sequence": np.square(error).mean(0),
  }


def ratio_interval(one, other, seed: int = 0) -> tuple[float, float, float]:
  """(ratio of means, low, high): 95 % bootstrap over sequences, paired.

  Args:
    one, other: f64 [n], of the same sequences.
  """
  rng = np.random.default_rng(seed)
  picks = rng.integers(0, len(one), (RESAMPLES, len(one)))
  ratios = one[picks].mean(1) / np.maximum(other[picks].mean(1), 1e-300)
  low, high = np.quantile(ratios, (0.025, 0.975))
  return float(one.mean() / max(other.mean(), 1e-300)), float(low), float(high)


def diagnose(
  bench: Bench, forwards: list[int], repeats: int, schemes=likelihood.ESTIMATORS
) -> dict:
  """Everything the page of numbers needs, ready for JSON."""
  exact, how = bench.exact()
  settings = bench.program.settings
  result = {
    "exact": how,
    "sequences": len(exact),
    "repeats": repeats,
    "relative_std": float(exact.std()),
    "rows": [],
  }
  for count in forwards:
    found = schemes_at(count, settings, schemes)
    measured = {
      name: measure(*bench.draws(one, repeats), exact)
      for name, one in found.items()
    }
    errors = {n: values.pop("by_sequence") for n, values in measured.items()}
    for name, values in measured.items():
      ratio = ratio_interval(errors[name], errors["uniform"])
      row = {"scheme": name, "forwards": count} | values
      row["mse_over_uniform"], row["low"], row["high"] = ratio
      row["snr"] = {}
      if name in ("uniform", "complementary", settings.likelihood.scheme):
        row["snr"] = bench.gradient_snr(found[name])
      result["rows"].append(row)
  result["bf16_floor"] = bench.bf16_floor(
    dataclasses.replace(
      settings.likelihood, scheme="uniform", masks=forwards[0]
    )
  )
  return result
