"""What can be checked of a config without JAX, in a moment.

Every refusal is a ValueError that names the key, its value and a remedy.
`rspo_jax.settings` checks what needs the tables of the program.
"""

import difflib
import math
import os
import pathlib

from rspo_jax import mirror, run_config, sampler_settings

EMBEDDED = "embedded:"
# Whole numbers from 1 on.
_POSITIVE = (
  "rollout.prompts",
  "rollout.group_size",
  "data.prompt_length",
  "sampler.completion_length",
  "sampler.block_length",
  "model.head_chunks",
  "reward.workers",
  "reward.memory_mb",
  "likelihood.shrink",
  "objective.finishes",
  "train.micro_batch",
  "train.updates_per_rollout",
  "eval.batch",
  "eval.samples",
  "run.steps",
  "run.checkpoint_every",
  "run.keep_checkpoints",
)
_NOT_NEGATIVE = (
  "lora.rank",
  "lora.alpha",
  "rollout.temperature",
  "objective.lambda_",
  "objective.lambda_share",
  "objective.solved_advantage",
  "objective.clip",
  "objective.kl_weight",
  "objective.sft_weight",
  "objective.reference_every",
  "likelihood.block_length",
  "rollout.keep_groups",
  "likelihood.masks",
  "train.micro_masks",
  "sampler.steps",
  "optimizer.learning_rate",
  "optimizer.warmup_steps",
  "optimizer.weight_decay",
  "eval.temperature",
  "eval.prompts",
  "eval.every",
  "eval.completion_length",
  "eval.block_length",
  "eval.steps",
  "sampler.threshold",
  "sampler.factor",
  "sampler.cfg_scale",
  "sampler.top_k",
  "sampler.order_temperature",
  "mesh.rollout_tensor",
  "run.seed",
  "run.samples_every",
  "run.profile",
  "run.keep_best",
  "run.keep_every",
  "run.non_finite_limit",
  "run.collapse_window",
  "run.grace_s",
  "data.seed",
)
# (low, high, whether high is allowed).
_RANGES = {
  "data.corrupt_share": (0.0, 1.0, True),
  "rollout.stale_steps": (0, 1, True),
  "objective.bound_mix": (0.0, 1.0, True),
  "likelihood.prompt_mask": (0.0, 1.0, False),
  "sampler.top_p": (0.0, 1.0, True),
  "optimizer.final_share": (0.0, 1.0, True),
  "optimizer.b1": (0.0, 1.0, False),
  "optimizer.b2": (0.0, 1.0, False),
}
_DTYPES = ("float32", "bfloat16")
_CHOICES = {
  "data.size": ("small", "large"),
  "data.long_prompts": ("refuse", "keep_tail"),
  "run.log": ("quiet", "normal", "debug"),
  "model.compute_dtype": ("auto", *_DTYPES),
  "model.param_dtype": _DTYPES,
  "model.attention": ("einsum", "flash"),
  "lora.merge_dtype": ("stored", "float32"),
  "optimizer.moment_dtype": _DTYPES,
}
_SEEDS = ("run.seed", "data.seed")


def check_values(config) -> None:
  """Checks what can be checked without JAX, in a moment.

  Args:
    config: a ConfigDict with exactly the keys of configs/base.py.

  Raises:
    ValueError: names key, value and remedy.
  """
  from rspo_jax import trackers

  values = run_config.flat(config.to_dict())
  for key, value in values.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f"{key}={value} must be a finite number.")
    bound = 2**32 if key in _SEEDS else 2**31
    if type(value) is int and not -bound < value < bound:
      raise ValueError(f"{key}={value} is too large; use at most {bound - 1}.")
  for key in _POSITIVE:
    if values[key] < 1:
      raise ValueError(f"{key}={values[key]} must be at least 1.")
  for key in _NOT_NEGATIVE:
    if values[key] < 0:
      raise ValueError(f"{key}={values[key]} must not be negative.")
  for key, (low, high, closed) in _RANGES.items():
    if not (low <= values[key] < high or (closed and values[key] == high)):
      raise ValueError(
        f"{key}={values[key]} must lie in [{low:g}, {high:g}"
        f"{']' if closed else ')'}."
      )
  for key in (
    "objective.beta",
    "objective.bound_power",
    "optimizer.eps",
    "optimizer.clip_norm",
    "reward.time_limit_s",
  ):
    if values[key] <= 0:
      raise ValueError(f"{key}={values[key]} must be greater than 0.")
  for key, allowed in _CHOICES.items():
    one_of(key, values[key], allowed)
  if config.run.profile >= config.run.steps:
    raise ValueError(
      f"run.profile={config.run.profile} must be less than run.steps="
      f"{config.run.steps}: the first step compiles and is left out."
    )
  trackers.names(config.run.logger)
  _check_sampling(config)
  if config.data.source:
    from rspo_jax.datasets import published

    if published.split_name(config.data.source)[0]:
      published.locate(config.data.source)
      return _check_model(config)
    # One file a split: which splits a run reads is seen when it loads them.
    path = config.data.source.replace("{split}", config.eval.split)
    if not os.path.isfile(os.path.expanduser(path)):
      raise ValueError(
        f"data.source={config.data.source!r}: {path!r} is not a file; give a "
        "JSONL or CSV file (with {split} in its path for one file a split), "
        "or leave it empty."
      )
  _check_model(config)


def check_reachable(config) -> None:
  """Asks a bucket for the checkpoint that model.path names, within a moment.

  Raises:
    ValueError: it is not there, or cannot be asked for.
  """
  path = config.model.path
  if not path.startswith(mirror.BUCKET):
    return
  folder = mirror.bucket_path(path)
  what = f"model.path={path}"
  if not mirror.answer(what, lambda: (folder / "config.json").exists()):
    raise ValueError(
      f"{what} holds no config.json; give a checkpoint folder in the Hugging "
      "Face layout (of a run: gs://BUCKET/RUN/model)."
    )


def _check_model(config) -> None:
  """The checkpoint's folder, or the shape of a new model."""
  if config.model.path:
    resolve_model_path(config.model.path)
  else:
    _check_new_model(config.model.new)


def _sampler(
  config, length, block, steps, temperature, group
) -> sampler_settings.SamplerSettings:
  """The sampler's options at a length; errors name the keys of the group."""
  keys = config.sampler
  result = sampler_settings.SamplerSettings(
    completion_length=length,
    block_length=block,
    steps=steps,
    temperature=float(temperature),
    remasking=keys.remasking,
    algorithm=keys.algorithm,
    cfg_scale=keys.cfg_scale,
    # 1 and 0 keep every token, 0 switches off: no key is ever null.
    top_p=None if keys.top_p == 1 else keys.top_p,
    top_k=keys.top_k or None,
    cache=keys.cache,
    threshold=keys.threshold or None,
    factor=keys.factor or None,
    stop_at_eos=keys.stop_at_eos,
    order_temperature=keys.order_temperature,
  )
  try:
    sampler_settings.validate(result)
  except ValueError as error:
    # Evaluation has keys of its own for these.
    text = str(error)
    for key in ("completion_length", "block_length", "steps"):
      text = text.replace(f"sampler.{key}", f"{group}.{key}")
    raise ValueError(text) from error
  return result


def rollout_sampler(config) -> sampler_settings.SamplerSettings:
  """How training rollouts are sampled."""
  keys = config.sampler
  steps = keys.steps or keys.completion_length
  shape = (keys.completion_length, keys.block_length, steps)
  return _sampler(config, *shape, config.rollout.temperature, "sampler")


def eval_sampler(
  config, length: int, temperature: float
) -> sampler_settings.SamplerSettings:
  """How an evaluation at a completion length samples."""
  keys, own = config.sampler, config.eval
  block = own.block_length or min(keys.block_length, length)
  most = keys.steps or keys.completion_length
  steps = own.steps or max(1, most * length // keys.completion_length)
  return _sampler(config, length, block, steps, temperature, "eval")


def _check_sampling(config) -> None:
  """Names of the sampler's choices, and what they exclude."""
  keys = config.sampler
  one_of("sampler.algorithm", keys.algorithm, sampler_settings.ALGORITHMS)
  one_of("sampler.remasking", keys.remasking, sampler_settings.REMASKING)
  one_of("sampler.cache", keys.cache, sampler_settings.CACHES)
  rollout_sampler(config)
  own_length = config.eval.completion_length or keys.completion_length
  eval_sampler(config, own_length, config.eval.temperature)
  if (
    keys.stop_at_eos
    and config.likelihood.scope == "canvas"
    and config.objective.name != "sft"
  ):
    raise ValueError(
      "sampler.stop_at_eos=True leaves what follows a first EOS unsampled, but "
      "likelihood.scope='canvas' scores it; use likelihood.scope='completion', "
      "or sampler.stop_at_eos=False."
    )


def _check_new_model(new) -> None:
  """Sizes of a model that is made from nothing."""
  for key, value in new.to_dict().items():
    if not isinstance(value, str) and not value > 0:
      raise ValueError(f"model.new.{key}={value} must be greater than 0.")
  if new.width % (2 * new.heads):
    raise ValueError(
      f"model.new.width={new.width} must be an even multiple of "
      f"model.new.heads={new.heads} (rotary pairs); use "
      f"{-(-new.width // (2 * new.heads)) * 2 * new.heads}."
    )
  if new.heads % new.kv_heads:
    raise ValueError(
      f"model.new.kv_heads={new.kv_heads} must divide model.new.heads="
      f"{new.heads}; use {math.gcd(new.heads, new.kv_heads)}."
    )


def one_of(key: str, value: str, allowed) -> None:
  """Refuses a name that is not allowed; offers the nearest."""
  allowed = sorted(allowed)
  if value not in allowed:
    near = difflib.get_close_matches(str(value), allowed, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
      f"{key}={value!r} is not known; {hint}choose from {', '.join(allowed)}."
    )


def embedded_names() -> list[str]:
  """Names of the checkpoints that the package carries."""
  folder = pathlib.Path(__file__).parent / "checkpoints"
  return sorted(path.parent.name for path in folder.glob("*/config.json"))


def resolve_model_path(path: str) -> str:
  """A folder for `model.path`; "embedded:NAME" becomes the package's own."""
  if path.startswith(EMBEDDED):
    name = path.removeprefix(EMBEDDED)
    one_of("model.path", path, [EMBEDDED + n for n in embedded_names()])
    return str(pathlib.Path(__file__).parent / "checkpoints" / name)
  if not path or "://" in path:
    return path
  path = os.path.expanduser(path)
  if not os.path.isdir(path):
    raise ValueError(
      f"model.path={path!r} is not a folder; give one with config.json, "
      "*.safetensors and tokenizer.json."
    )
  if not os.path.isfile(os.path.join(path, "config.json")):
    raise ValueError(
      f"model.path={path!r} holds no config.json; give a checkpoint folder in "
      "the Hugging Face layout (of a run: DIR/model)."
    )
  return path
