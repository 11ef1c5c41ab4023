"""What each estimator makes of the relative score d, measured on a checkpoint.

    python -m rspo_jax.diagnose --config=configs/countdown.py --out=DIR

1. Policy and reference: the reference is the config's model, the policy comes
   from --policy=FOLDER, or from --steps updates of the config's own run.
2. The policy completes prompts; exact scores of both by enumerating all
   2^L - 1 masks where L <= 10, else by many complementary pairs.
3. Every scheme at the same number of forward passes, R times: bias, variance
   and mean squared error of d; correlation of the noise of policy and
   reference, which sharing masks cancels; MSE over uniform's, with a bootstrap
   interval over sequences.
4. Signal to noise of the gradient of the mean score over completions of
   positive and of negative advantage: |E g|^2 / tr Var(g) over mask draws.
5. The bfloat16 noise floor of d, beside the noise of the masks.

Writes diagnose.json, diagnose.png (with matplotlib, requirements-dev.txt) and
prints the table. Units: nats per token and their squares.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rspo_jax import (
  data,
  likelihood,
  main,
  objectives,
  rollout,
  run_config,
  sharding,
  train_step,
)
from rspo_jax import program as program_lib
from rspo_jax import settings as settings_lib
from rspo_jax.models import hf_weights, transformer

HELP = """usage: python -m rspo_jax.diagnose --config=FILE[:ARG,...] [options]

  --config.GROUP.KEY=VALUE  override of one key
  --out=DIR                 where diagnose.json and the plot go (diagnose/)
  --policy=FOLDER           policy in the Hugging Face layout (a run's model/);
                            without it the config is trained for --steps
  --steps=20                updates of that training
  --forwards=2,4            forward passes an estimate, one table each
  --schemes=a,b             those alone, beside uniform
  --sequences=64            completions
  --repeats=64              estimates of each

Gradients are measured for uniform, complementary and the config's scheme."""
NUMBERS = {"steps": 20, "sequences": 64, "repeats": 64}
ENUMERATED = 10  # longest completion whose masks are all gone through
LONG_PAIRS = 2048  # complementary pairs in place of enumeration
RESAMPLES = 2000
GRADIENT_DRAWS = 12


def parse(argv: list[str]):
  """(words for main.parse, options by name) of a command line.

  Raises:
    ValueError: names value and remedy.
  """
  options = {"out": "diagnose", "policy": "", "forwards": "2,4"} | NUMBERS
  options["schemes"] = ",".join(likelihood.ESTIMATORS)
  rest = [argv[0]]
  for word in argv[1:]:
    name, equals, value = word.lstrip("-").partition("=")
    if name not in options:
      rest.append(word)
      continue
    if not equals or not value:
      raise ValueError(f"--{name} needs a value; write --{name}=VALUE.")
    options[name] = value
  for name in NUMBERS:
    options[name] = _count(name, str(options[name]))
  options["schemes"] = ["uniform", *options["schemes"].split(",")]
  for name in options["schemes"]:
    if name not in likelihood.ESTIMATORS:
      raise ValueError(
        f"--schemes={name!r} is not known; choose from "
        f"{', '.join(likelihood.ESTIMATORS)}."
      )
  options["forwards"] = [
    _count("forwards", part) for part in options["forwards"].split(",")
  ]
  return rest, options


def _count(name: str, text: str) -> int:
  """A whole number from 1 on."""
  if not text.isdecimal() or int(text) < 1:
    raise ValueError(f"--{name}={text} must be a whole number from 1 on.")
  return int(text)


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
    self.reference = program.params
    self.config = program.model.config
    settings = program.settings
    examples = data.load_examples(program.task, "train", settings.data)
    group = settings.rollout.group_size
    examples = examples[: settings.rollout.prompts]
    tokens, mask = data.encode_prompts(
      examples,
      program.prompt,
      program.model.tokenizer.encode,
      settings.prompt_length,
      self.config.pad_id,
      settings.long_prompts,
    )[:2]
    key = train_step.stream_key(settings.run.seed, 0, train_step.ROLLOUT)
    placed = sharding.put_global(program.mesh, (tokens, mask))
    out = self.call(program.rollout_fn, policy, *placed, key)
    ended = np.asarray(out.completion_mask)
    texts = program.to_text(np.asarray(out.tokens)[:, -ended.shape[1] :], ended)
    judged = program.judge(examples, texts)
    advantage = objectives.group_advantages(judged.rewards.reshape(-1, group))
    batch = rollout.present(out, settings.likelihood.scope, with_trace=True)
    batch = batch.replace(advantage=jnp.asarray(advantage.reshape(-1)))
    self.batch = jax.tree.map(lambda x: x[:sequences], batch)

  def call(self, fn, *args):
    """Calls a function of the model under the run's mesh."""
    with self.program.mesh, nn.logical_axis_rules(sharding.RULES):
      return fn(*args)

  def scorer(self, settings, dtype: str | None = None):
    """Jitted (params, key) -> mean score f32 [n] of a scheme."""
    config = self.config
    if dtype is not None:
      config = dataclasses.replace(config, compute_dtype=dtype)
    logprob_fn = transformer.make_logprob_fn(config)
    batch, mask_id = self.batch, config.mask_id

    @jax.jit
    def score(params, key):
      masks = train_step.draw_masks(key, settings, batch)
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
    logprob_fn = transformer.make_logprob_fn(self.config)

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


def table(result: dict) -> str:
  """The rows as text."""
  head = (
    f"{'scheme':14}{'K':>3}{'bias':>10}{'sd':>9}{'rmse':>9}"
    f"{'MSE / uniform':>22}{'noise corr':>12}{'SNR A>0':>10}{'A<0':>8}"
  )
  lines = [head]
  for row in result["rows"]:
    span = (
      f"{row['mse_over_uniform']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    )
    snr = [
      row["snr"].get(key, float("nan")) for key in ("positive", "negative")
    ]
    lines.append(
      f"{row['scheme']:14}{row['forwards']:>3}{row['bias']:>10.4f}"
      f"{row['variance'] ** 0.5:>9.4f}{row['mse'] ** 0.5:>9.4f}{span:>22}"
      f"{row['noise_correlation']:>12.3f}{snr[0]:>10.3f}{snr[1]:>8.3f}"
    )
  lines.append(
    f"d without mask noise ({result['exact']}): standard deviation "
    f"{result['relative_std']:.4f} nats per token over {result['sequences']} "
    f"completions; bfloat16 adds {result['bf16_floor']:.5f}."
  )
  return "\n".join(lines)


def plot(result: dict, path: pathlib.Path) -> bool:
  """Root mean squared errors as bars; False where matplotlib is missing."""
  try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
  except ImportError:
    return False
  counts = sorted({row["forwards"] for row in result["rows"]})
  figure, axes = pyplot.subplots(
    1, len(counts), figsize=(5 * len(counts), 4), squeeze=False, sharey=True
  )
  for axis, count in zip(axes[0], counts, strict=True):
    rows = [row for row in result["rows"] if row["forwards"] == count]
    rows.sort(key=lambda row: row["mse"])
    names = [row["scheme"] for row in rows]
    axis.barh(names, [row["mse"] ** 0.5 for row in rows], color="#9db7d5")
    axis.barh(names, [abs(row["bias"]) for row in rows], color="#c25b4e")
    axis.axvline(result["bf16_floor"], color="black", linestyle=":")
    axis.set_title(f"{count} forward passes")
    axis.set_xlabel("error of d, nats per token")
    axis.invert_yaxis()
  axes[0][0].legend(["bfloat16 floor", "root mean square", "bias"])
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
  return True


def _trained(words: list[str], out: pathlib.Path, steps: int) -> pathlib.Path:
  """Folder of a policy after some updates of the config's own run."""
  folder = out / "run"
  status = main.main(
    [
      *words,
      f"--workdir={folder}",
      f"--config.run.steps={steps}",
      "--config.run.export=True",
      "--config.run.log=quiet",
      "--config.run.tensorboard=False",
      "--config.eval.prompts=64",
      "--config.eval.batch=64",
    ]
  )
  if status:
    raise ValueError(
      f"the policy's run in {folder} ended with status {status}; its message "
      "is above. Or give --policy=FOLDER."
    )
  return folder / "model"


def run(argv: list[str]) -> int:
  """Measures and writes; returns the exit status."""
  if not argv[1:] or "--help" in argv:
    print(HELP)
    return 0
  try:
    words, options = parse(argv)
    config = main.parse(words)[0]
    settings = settings_lib.build(config, jax.device_count())
    if settings.supervised:
      raise ValueError(
        "objective.name='sft' has no reference to be relative to; diagnose a "
        "config of reinforcement learning."
      )
    if config.lora.rank or config.lora.path:
      raise ValueError(
        f"lora.rank={config.lora.rank}, lora.path={config.lora.path!r}: whole "
        "models are diagnosed; use --config.lora.rank=0 --config.lora.path= "
        "and a run's merged model/ as --policy."
      )
    wanted = settings.rollout.prompts * settings.rollout.group_size
    if options["sequences"] > wanted:
      raise ValueError(
        f"--sequences={options['sequences']} is more than one rollout has; use "
        f"at most {wanted}, or raise rollout.prompts."
      )
    out = pathlib.Path(options["out"])
    run_config.check_links(out, f"--out={out}")
    out.mkdir(parents=True, exist_ok=True)
    folder = options["policy"] or _trained(words, out, options["steps"])
    program = program_lib.build(settings)
    policy = hf_weights.load_model(
      folder,
      settings.model["param_dtype"],
      functools.partial(program_lib._shardings, program.mesh),
    )
    bench = Bench(program, policy.params, options["sequences"])
    result = diagnose(
      bench, options["forwards"], options["repeats"], options["schemes"]
    )
  except (ValueError, OSError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  (out / "diagnose.json").write_text(json.dumps(result, indent=2) + "\n")
  print(table(result))
  if plot(result, out / "diagnose.png"):
    print(f"In {out}: diagnose.json, diagnose.png.")
  else:
    print(f"In {out}: diagnose.json (pip install matplotlib for the plot).")
  return 0


if __name__ == "__main__":
  # Under its own name, so that what it defines exists once.
  from rspo_jax import diagnose as module

  sys.exit(module.run(sys.argv))
