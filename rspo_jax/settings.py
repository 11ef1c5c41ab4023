"""Checks a finished config across fields and cuts it into frozen settings.

Nothing below this module sees a ConfigDict. Every refusal is a ValueError that
names the key, its value and a remedy, before anything expensive starts.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import pathlib
import stat
import tempfile
from typing import Any

from rspo_jax import mirror, sampler_settings

EMBEDDED = "embedded:"
CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
  """How the completions of a step come about.

  Attributes:
    prompts: of a step, B.
    group_size: completions of a prompt, G.
    temperature: of sampling.
    keep_groups: groups of a step that are kept at most; 0: all.
    stale_steps: steps by which the parameters that sample are behind.
  """

  prompts: int
  group_size: int
  temperature: float
  keep_groups: int
  stale_steps: int


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """What is evaluated, and how many prompts at a time."""

  split: str
  prompts: int
  batch: int
  temperature: float
  every: int
  samples: int
  d1_files: bool


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One of the evaluations of --mode=eval.

  Attributes:
    name: what tells it from the others, part of its files' names; "" where
      there is one only.
    greedy, sampled: at temperature 0 and at eval.temperature.
    seed: of its random stream.
  """

  name: str
  greedy: sampler_settings.SamplerSettings
  sampled: sampler_settings.SamplerSettings
  seed: int


@dataclasses.dataclass(frozen=True)
class RunSettings:
  """Length, seed and outputs of a run."""

  steps: int
  seed: int
  checkpoint_every: int
  keep_checkpoints: int
  keep_best: int
  keep_every: int
  non_finite_limit: int
  collapse_window: int
  grace_s: float
  accept_changes: bool
  samples_every: int
  tensorboard: bool
  logger: str
  profile: int
  export: bool
  compilation_cache: str
  log: str


@dataclasses.dataclass(frozen=True)
class Settings:
  """A whole run, ready to build."""

  model: dict[str, Any]
  lora: dict[str, Any]  # settings (lora.LoraSettings | None), path, dual
  task: dict[str, Any]
  data: Any  # tasks.base.DataSettings
  prompt_length: int
  long_prompts: str
  corrupt_share: float
  rollout: RolloutSettings
  sampler: sampler_settings.SamplerSettings  # of training rollouts
  greedy: sampler_settings.SamplerSettings  # of eval/accuracy
  sampled: sampler_settings.SamplerSettings  # of eval/accuracy_sampled
  likelihood: Any  # likelihood.LikelihoodSettings
  objective: Any  # objectives.ObjectiveSettings
  normalize_advantages: bool
  skip_equal_groups: bool
  reference_every: int
  optimizer: Any  # train_step.OptimizerSettings
  step: Any  # train_step.StepSettings
  mesh: dict[str, int]
  rollout_tensor: int
  eval: EvalSettings
  evaluations: tuple[Evaluation, ...]  # of --mode=eval, one or more
  run: RunSettings

  @property
  def supervised(self) -> bool:
    """Whether demonstrations take the place of rollouts."""
    return self.objective.name == "sft"


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
  "sampler.threshold": (0.0, 1.0, True),
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

  values = flat(config.to_dict())
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
    _one_of(key, values[key], allowed)
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
  _one_of("sampler.algorithm", keys.algorithm, sampler_settings.ALGORITHMS)
  _one_of("sampler.remasking", keys.remasking, sampler_settings.REMASKING)
  _one_of("sampler.cache", keys.cache, sampler_settings.CACHES)
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


def _one_of(key: str, value: str, allowed) -> None:
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
    _one_of("model.path", path, [EMBEDDED + n for n in embedded_names()])
    return str(pathlib.Path(__file__).parent / "checkpoints" / name)
  if not path or "://" in path:
    return path
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


def build(config, devices: int, planning: bool = False) -> Settings:
  """Checks the config and cuts it into settings.

  Args:
    config: a ConfigDict with exactly the keys of configs/base.py.
    devices: number of devices of the run.
    planning: nothing will run, so that model.path may still be missing.

  Raises:
    ValueError: names the first key that cannot be, its value and a remedy.
  """
  from rspo_jax import (
    likelihood,
    objectives,
    sharding,
    tasks,
    train_step,
  )
  from rspo_jax.models import lora, published
  from rspo_jax.tasks import base

  check_values(config)
  reward = _reward_settings(config.reward)
  task = tasks.find(config.task.name, reward)
  _one_of("task.prompt_style", config.task.prompt_style, task.styles)
  _one_of("task.protocol", config.task.protocol, base.PROTOCOLS)
  weights = config.task.reward_weights.to_dict()
  for part in weights:
    _one_of("part of task.reward_weights", part, task.weights)
  _one_of("eval.split", config.eval.split, base.SPLITS)
  _one_of("objective.name", config.objective.name, objectives.OBJECTIVES)
  for key, allowed in objectives.CHOICES.items():
    _one_of(f"objective.{key}", config.objective[key], allowed)
  _one_of("likelihood.scheme", config.likelihood.scheme, likelihood.ESTIMATORS)
  _one_of("likelihood.scope", config.likelihood.scope, likelihood.SCOPES)
  _one_of("train.passes", config.train.passes, train_step.PASSES)
  _one_of("optimizer.schedule", config.optimizer.schedule, train_step.SCHEDULES)

  supervised = config.objective.name == "sft"
  if supervised and (task.demonstration is None):
    raise ValueError(
      f"objective.name='sft' needs demonstrations, which task.name="
      f"{task.name!r} does not have."
    )
  if config.data.corrupt_share and task.corrupt is None:
    raise ValueError(
      f"data.corrupt_share={config.data.corrupt_share} needs answers of mixed "
      f"quality, which task.name={task.name!r} does not have; use 0."
    )
  if supervised and config.rollout.group_size != 1:
    raise ValueError(
      f"rollout.group_size={config.rollout.group_size} has no meaning with "
      "objective.name='sft': a prompt has one demonstration; use 1."
    )
  if not supervised and config.rollout.group_size < 2:
    raise ValueError(
      f"rollout.group_size={config.rollout.group_size} leaves nothing to "
      "compare a completion with; use 2 or more."
    )
  if not supervised and config.rollout.temperature == 0:
    raise ValueError(
      "rollout.temperature=0 gives every group identical completions; use a "
      "temperature > 0."
    )
  if config.model.published:
    _one_of("model.published", config.model.published, published.PUBLISHED)
  if not supervised and not config.model.path and not planning:
    if config.task.prompt_style != "compact":
      raise ValueError(
        f"model.path='' names no checkpoint, and task.name={task.name!r} needs "
        "one that reads and writes text: give --config.model.path=FOLDER with "
        "LLaDA or Dream in the Hugging Face layout."
      )
    raise ValueError(
      "model.path='' names no checkpoint, and reinforcement learning needs "
      f"one; give a folder or one of "
      f"{', '.join(EMBEDDED + name for name in embedded_names())}."
    )

  if config.run.keep_best and config.eval.split == "test":
    raise ValueError(
      f"run.keep_best={config.run.keep_best} would choose by eval.split='test',"
      " which is for the end; use eval.split='validation', or keep_best=0."
    )

  eval_length = (
    config.eval.completion_length or config.sampler.completion_length
  )
  train_sampler = rollout_sampler(config)
  shape = sharding.mesh_shape(
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices
  )
  sharding.check_rollout_tensor(config.mesh.rollout_tensor, devices)
  shards = shape[0] * shape[1]
  total = config.rollout.prompts * config.rollout.group_size
  micro = config.train.micro_batch
  for key, value in (
    ("rollout.prompts", config.rollout.prompts),
    ("train.micro_batch", micro),
    ("eval.batch", config.eval.batch),
  ):
    if value % shards:
      raise ValueError(
        f"{key}={value} must be a multiple of the {shards} devices that share "
        f"the batch (mesh.data x mesh.fsdp); use {-(-value // shards) * shards}."
      )
  if total % micro:
    near = shards * _nearest_divisor(total // shards, micro // shards)
    raise ValueError(
      f"train.micro_batch={micro} must divide the {total} sequences of a step "
      f"(rollout.prompts x rollout.group_size); use {near}."
    )
  mask_settings = likelihood.LikelihoodSettings(
    scheme=config.likelihood.scheme,
    masks=_canvases(config, train_sampler),
    scope=config.likelihood.scope,
    block_length=config.likelihood.block_length or config.sampler.block_length,
    prompt_mask=float(config.likelihood.prompt_mask),
    shrink=config.likelihood.shrink,
  )
  options = {
    field.name: config.objective[field.name]
    for field in dataclasses.fields(objectives.ObjectiveSettings)
    if field.name in config.objective
  }
  options |= {"lambda_": float(config.objective.lambda_)}
  objective = objectives.ObjectiveSettings(
    **options,
    group_size=config.rollout.group_size,
    draw_size=mask_settings.draw_size,
  )
  _check_objective(config, objective, train_sampler, shards)
  if (
    objective.gap_masks == "leave_one_out"
    and mask_settings.masks < 2 * mask_settings.draw_size
  ):
    remedy = (
      f"use likelihood.masks={2 * mask_settings.draw_size} or more, not "
      f"{mask_settings.masks}."
    )
    if likelihood.ESTIMATORS[mask_settings.scheme].joint:
      remedy = (
        f"likelihood.scheme={mask_settings.scheme!r} draws all its masks "
        "together; use 'uniform'."
      )
    raise ValueError(
      "objective.gap_masks='leave_one_out' needs two independent draws; "
      + remedy
    )
  step = train_step.StepSettings(
    micro_batch=micro,
    passes=config.train.passes,
    shards=shards,
    updates_per_rollout=config.train.updates_per_rollout,
    micro_masks=_micro_masks(config.train.micro_masks, mask_settings),
  )
  train_step.resolve_passes(step, objective, total)

  model = {
    "path": config.model.path,
    "published": config.model.published,
    "folder": resolve_model_path(config.model.path),
    "compute_dtype": config.model.compute_dtype,
    "param_dtype": config.model.param_dtype,
    "attention": config.model.attention,
    "remat": config.model.remat,
    "head_chunks": config.model.head_chunks,
    "new": config.model.new.to_dict(),
  }
  here = config.lora.path and "://" not in config.lora.path
  if here and not os.path.isfile(
    os.path.join(config.lora.path, "adapter_config.json")
  ):
    raise ValueError(
      f"lora.path={config.lora.path!r} holds no adapter_config.json; give a "
      "folder in PEFT's layout (of a run: DIR/adapter), or leave it empty for "
      "a new adapter."
    )
  adapter = None
  if config.lora.rank:
    adapter = lora.LoraSettings(
      rank=config.lora.rank,
      alpha=float(config.lora.alpha),
      targets=tuple(filter(None, config.lora.targets.split(","))),
      rslora=config.lora.rslora,
    )
  optimizer = config.optimizer.to_dict() | {
    "total_steps": config.run.steps * config.train.updates_per_rollout
  }
  return Settings(
    model=model,
    lora={
      "settings": adapter,
      "path": config.lora.path,
      "dual": config.lora.dual,
    },
    task={
      "name": task.name,
      "prompt_style": config.task.prompt_style,
      "protocol": config.task.protocol,
      "reward": reward,
      "weights": weights or None,
    },
    data=base.DataSettings(
      size=config.data.size,
      seed=config.data.seed,
      data_dir=config.data.dir,
      source=config.data.source,
    ),
    prompt_length=config.data.prompt_length,
    long_prompts=config.data.long_prompts,
    corrupt_share=config.data.corrupt_share,
    rollout=RolloutSettings(**config.rollout.to_dict()),
    sampler=train_sampler,
    greedy=eval_sampler(config, eval_length, 0.0),
    sampled=eval_sampler(config, eval_length, config.eval.temperature),
    likelihood=mask_settings,
    objective=objective,
    normalize_advantages=config.objective.normalize_advantages,
    skip_equal_groups=config.objective.skip_equal_groups,
    reference_every=config.objective.reference_every,
    optimizer=train_step.OptimizerSettings(**optimizer),
    step=step,
    mesh={axis: config.mesh[axis] for axis in sharding.AXES},
    rollout_tensor=config.mesh.rollout_tensor,
    eval=EvalSettings(
      split=config.eval.split,
      prompts=config.eval.prompts,
      batch=config.eval.batch,
      temperature=config.eval.temperature,
      every=config.eval.every,
      samples=config.eval.samples,
      d1_files=config.eval.d1_files,
    ),
    evaluations=_evaluations(config, eval_length),
    run=RunSettings(**config.run.to_dict()),
  )


def _listed(key: str, text: str, kind, what: str) -> list:
  """The values of a comma-separated list, each once.

  Raises:
    ValueError: one is not of its kind.
  """
  try:
    values = [kind(part) for part in text.split(",") if part.strip()]
  except ValueError as error:
    raise ValueError(
      f"{key}={text!r} must be {what}, separated by commas."
    ) from error
  return list(dict.fromkeys(values))


def _whole(text: str, least: int = 0) -> int:
  """A whole number that is not too small or large."""
  value = int(text)
  if not least <= value < 2**31:
    raise ValueError(text)
  return value


def _sampler_changes(text: str) -> dict[str, Any]:
  """What an entry of eval.samplers changes in the sampler's settings.

  Args:
    text: names of an algorithm, a remasking, a cache, and KEY=NUMBER, joined
      by +.

  Raises:
    ValueError: names the part that is not known.
  """
  names = {
    name: field
    for field, table in (
      ("algorithm", sampler_settings.ALGORITHMS),
      ("remasking", sampler_settings.REMASKING),
      ("cache", sampler_settings.CACHES),
    )
    for name in table
  }
  numbers = {
    "threshold": float,
    "factor": float,
    "cfg_scale": float,
    "top_p": float,
    "top_k": int,
  }
  changes = {}
  for part in text.split("+"):
    key, equals, value = part.strip().partition("=")
    if not equals:
      _one_of("the part", key, names)
      changes[names[key]] = key
      continue
    _one_of("the number", key, numbers)
    try:
      changes[key] = numbers[key](value)
    except ValueError as error:
      raise ValueError(f"{key}={value} must be a number.") from error
  return changes


def _evaluations(config, length: int) -> tuple[Evaluation, ...]:
  """The evaluations of --mode=eval: lengths x samplers x seeds.

  Args:
    config: the config.
    length: completion length where no list says otherwise.
  """
  e = config.eval
  lengths = _listed(
    "eval.completion_lengths",
    e.completion_lengths,
    lambda part: _whole(part, 1),
    "whole numbers from 1 on",
  )
  specs = _listed("eval.samplers", e.samplers, str.strip, "samplers")
  seeds = _listed(
    "eval.seeds", e.seeds, _whole, "whole numbers that are not negative"
  )
  found = []
  for own_length, spec, seed in itertools.product(
    lengths or [length], specs or [""], seeds or [config.run.seed]
  ):
    pair = [eval_sampler(config, own_length, t) for t in (0.0, e.temperature)]
    if spec:
      try:
        changes = _sampler_changes(spec)
        pair = [dataclasses.replace(one, **changes) for one in pair]
        for one in pair:
          sampler_settings.validate(one)
      except ValueError as error:
        raise ValueError(f"eval.samplers={spec!r}: {error}") from error
    name = "-".join([spec] * bool(specs) + [f"seed{seed}"] * bool(seeds))
    found.append(Evaluation(name, *pair, seed))
  return tuple(found)


def _canvases(config, sampler) -> int:
  """K; a trace's is one canvas for every `shrink` steps of the sampler.

  Args:
    config: the whole config.
    sampler: `SamplerSettings` of the rollouts.

  Raises:
    ValueError: names key, value and remedy.
  """
  from rspo_jax import likelihood

  scheme, masks = config.likelihood.scheme, config.likelihood.masks
  if not likelihood.ESTIMATORS[scheme].needs_trace:
    return masks
  # A threshold may commit one position a step, whatever the steps are.
  longest = sampler.completion_length
  if not sampler.adaptive:
    longest = min(longest, sampler.steps)
  wanted = -(-longest // config.likelihood.shrink)
  if masks not in (0, wanted):
    raise ValueError(
      f"likelihood.masks={masks} must be {wanted}, or 0, with "
      f"likelihood.scheme={scheme!r}: one canvas for every likelihood.shrink="
      f"{config.likelihood.shrink} of up to {longest} sampling steps."
    )
  return wanted


def _check_objective(config, objective, sampler, shards: int) -> None:
  """Refuses what an objective cannot be trained with.

  Args:
    config: the whole config.
    objective: `ObjectiveSettings`.
    sampler: `SamplerSettings` of the rollouts.
    shards: devices that share the batch.

  Raises:
    ValueError: names key, value and remedy.
  """
  from rspo_jax import likelihood, objectives

  entry = objectives.OBJECTIVES[objective.name]
  scheme = config.likelihood.scheme
  if entry.estimators is not None and scheme not in entry.estimators:
    raise ValueError(
      f"likelihood.scheme={scheme!r} cannot serve objective.name="
      f"{objective.name!r}; use {' or '.join(map(repr, entry.estimators))}."
    )
  estimator = likelihood.ESTIMATORS[scheme]
  if estimator.needs_trace and objective.name == "sft":
    raise ValueError(
      f"likelihood.scheme={scheme!r} follows the sampler's steps, and "
      "demonstrations have none; use 'uniform'."
    )
  if config.train.updates_per_rollout > 1 and not entry.reuse:
    raise ValueError(
      f"train.updates_per_rollout={config.train.updates_per_rollout} has no "
      f"meaning with objective.name={objective.name!r}, which has no rollouts; "
      "use 1."
    )
  if config.rollout.stale_steps:
    reason = objectives.on_policy_reason(objective)
    if reason:
      raise ValueError(
        f"rollout.stale_steps={config.rollout.stale_steps} trains on "
        f"completions of older parameters, but {reason}. Otherwise use "
        "rollout.stale_steps=0."
      )
  if entry.needs_difference and not config.objective.skip_equal_groups:
    raise ValueError(
      "objective.skip_equal_groups=False leaves groups without any right-wrong "
      f"pair, from which objective.name={objective.name!r} learns nothing while "
      "momentum goes on; use True."
    )
  if entry.finishes and (
    sampler.adaptive
    or sampler.cache != "none"
    or sampler.stop_at_eos
    or sampler.steps < 2
  ):
    raise ValueError(
      f"objective.name={objective.name!r} finishes partial canvases by the "
      "sampler's fixed schedule; use sampler.cache='none', threshold=0, "
      "factor=0, stop_at_eos=False and at least 2 steps."
    )
  keep = config.rollout.keep_groups
  if keep and not config.objective.skip_equal_groups:
    raise ValueError(
      f"rollout.keep_groups={keep} chooses among groups whose rewards differ; "
      "use objective.skip_equal_groups=True, or keep_groups=0."
    )
  if keep % shards:
    raise ValueError(
      f"rollout.keep_groups={keep} must be a multiple of the {shards} devices "
      f"that share the batch; use {-(-keep // shards) * shards}."
    )
  if objective.lambda_share and not objective.lambda_:
    raise ValueError(
      f"objective.lambda_share={objective.lambda_share} needs a lambda to start "
      "from; use objective.lambda_=1, or lambda_share=0."
    )
  if objective.solved_advantage and objective.name != "rspo":
    raise ValueError(
      f"objective.solved_advantage={objective.solved_advantage} belongs to "
      f"objective.name='rspo'; use 0 with {objective.name!r}."
    )
  if config.objective.reference_every and not entry.uses_reference(objective):
    raise ValueError(
      f"objective.reference_every={config.objective.reference_every} refreshes "
      f"a reference that objective.name={objective.name!r} does not use; use 0."
    )


def _reward_settings(reward):
  """How users' functions are called (tasks.own.RewardSettings)."""
  from rspo_jax import workers
  from rspo_jax.tasks import own

  try:
    limits = workers.Limits(
      time_s=reward.time_limit_s, memory_bytes=reward.memory_mb << 20
    )
  except ValueError as error:
    raise ValueError(f"reward.memory_mb={reward.memory_mb}: {error}") from error
  return own.RewardSettings(reward.extra, reward.workers, limits)


def _micro_masks(wish: int, masks: Any) -> int:
  """`train.micro_masks`, 0 where it is all of them; `masks`: their settings.

  Raises:
    ValueError: not whole draws, or no divisor of a sequence's masks.
  """
  draws, size = masks.masks // masks.draw_size, masks.draw_size
  if not wish or wish == masks.masks:
    return 0
  if wish % size or masks.masks % wish:
    near = size * _nearest_divisor(draws, max(wish // size, 1))
    raise ValueError(
      f"train.micro_masks={wish} must divide the {masks.masks} masks of a "
      f"sequence and be a multiple of the {size} of a draw with "
      f"likelihood.scheme={masks.scheme!r}; use {near}."
    )
  return wish


def _nearest_divisor(number: int, wish: int) -> int:
  """The divisor of a number that is nearest to a wish."""
  low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
  return min(
    (d for n in low for d in (n, number // n)), key=lambda d: abs(d - wish)
  )


# Keys that may change between the parts of one run: they say where and how
# loudly, not what is computed.
FREE_KEYS = (
  "run.checkpoint_every",
  "run.keep_checkpoints",
  "run.keep_best",
  "run.keep_every",
  "run.non_finite_limit",
  "run.collapse_window",
  "run.grace_s",
  "run.accept_changes",
  "run.samples_every",
  "run.tensorboard",
  "run.logger",
  "run.profile",
  "run.export",
  "run.compilation_cache",
  "run.log",
  "data.dir",
  "reward.workers",
  "reward.memory_mb",
  "mesh.data",
  "mesh.fsdp",
  "mesh.tensor",
  "mesh.rollout_tensor",
)


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
  """Nested dict -> {"group.key": value}."""
  out = {}
  for key, value in config.items():
    if isinstance(value, dict):
      out |= flat(value, f"{prefix}{key}.")
    else:
      out[prefix + key] = value
  return out


def config_hash(config: dict) -> str:
  """Eight hex digits that name a resolved config."""
  text = json.dumps(config, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def check_workdir(workdir: str, config: dict, mode: str) -> None:
  """Refuses a folder that is not ours, holds another run, or is read-only.

  A folder in a bucket is asked the same, and the local one beside it.

  Args:
    workdir: the folder as given.
    config: the resolved config.
    mode: "train" or "eval"; an evaluation may have another config than the
      run in the folder.

  Raises:
    ValueError: names folder and remedy; nothing was written.
  """
  home = mirror.Home(workdir)
  folder = home.local
  try:
    if home.in_bucket:
      before = mirror.answer(
        f"--workdir={workdir}", lambda: _probe_bucket(home.address)
      )
    else:
      before = _run_in(folder)
    # Whether it can be written is seen by doing so: permission bits say
    # nothing to root, or of a read-only disk.
    parent = folder
    while not parent.exists():
      parent = parent.parent
    os.rmdir(tempfile.mkdtemp(prefix=".rspo_jax-", dir=parent))
  except OSError as error:
    raise ValueError(
      f"--workdir={workdir} cannot be used ({error.strerror}); choose a folder "
      "that can be written."
      + f" (Local copies go to {folder}.)"
      * home.in_bucket
    ) from error
  accepted = config["run"]["accept_changes"]
  if before is not None and mode == "train" and not accepted:
    check_same_run(before, config, workdir)


def _probe_bucket(folder) -> dict | None:
  """`_run_in` of a folder in a bucket that can be written, as it is seen."""
  probe = folder / f".rspo_jax-{os.getpid()}-{os.urandom(4).hex()}"
  before = _run_in(folder)
  probe.write_text("")
  probe.unlink()
  return before


def _run_in(folder) -> dict | None:
  """Config of the run that a folder holds, None where there is none yet.

  Args:
    folder: a `pathlib.Path`, or an `epath.Path` in a bucket.
  """
  # One question: in a bucket a folder is there while something is in it, and
  # that may be the probe of another process.
  try:
    found = folder.stat()
  except (FileNotFoundError, NotADirectoryError):
    return None
  in_bucket = not isinstance(folder, pathlib.Path)
  if not (found.is_directory if in_bucket else stat.S_ISDIR(found.st_mode)):
    raise ValueError(f"--workdir={folder} is a file; name a folder.")
  before = read_config(folder)
  if before is not None:
    return before
  try:
    names = [path.name for path in folder.iterdir()]
  except FileNotFoundError:
    return None
  # An evaluation leaves eval/ alone; a start that was cut off, a part of
  # config.json.
  strangers = [
    name
    for name in names
    if name != "eval" and not name.startswith((CONFIG, ".rspo_jax-"))
  ]
  if strangers:
    raise ValueError(
      f"--workdir={folder} holds no run of rspo_jax but {strangers[0]!r}; "
      "choose a new folder."
    )
  return None


def read_config(folder) -> dict | None:
  """The config.json of a run's folder, None where there is none.

  Args:
    folder: a `pathlib.Path`, or an `epath.Path` in a bucket.

  Raises:
    ValueError: it cannot be read, or belongs to something else.
  """
  path = folder / CONFIG
  if not path.exists():
    return None
  try:
    config = json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{path} cannot be read ({error}); choose a new --workdir."
    ) from error
  groups = ("model", "task", "run", "objective")
  if not isinstance(config, dict) or not all(
    isinstance(config.get(group), dict) for group in groups
  ):
    raise ValueError(
      f"{path} is not the config of a run of rspo_jax; choose a new --workdir."
    )
  return config


def _defaults() -> dict[str, Any]:
  """Default of every key, {} where the configs are not at hand."""
  try:
    from configs import base
  except ImportError:
    return {}
  return flat(base.get_config().to_dict())


def changed_keys(old: dict, new: dict) -> list[str]:
  """Keys in which two configs differ that change the meaning of a run."""
  before, after = flat(old), flat(new)
  # Keys that have come since the run began stood at their defaults then.
  before |= {k: v for k, v in _defaults().items() if k in after.keys() - before}
  return [
    f"{key}={after.get(key)!r} (was {before.get(key)!r})"
    for key in sorted(before.keys() | after.keys())
    if key not in FREE_KEYS and before.get(key) != after.get(key)
  ]


def check_same_run(old: dict, new: dict, workdir: str) -> None:
  """Refuses to continue a run under a config that means something else.

  Raises:
    ValueError: names the keys that differ.
  """
  changed = changed_keys(old, new)
  if changed:
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    raise ValueError(
      f"--workdir={workdir} holds a run with another config: "
      f"{', '.join(changed[:5])}{more}. Use another --workdir, or the config "
      "of that run; --config.run.accept_changes=true goes on with the new one."
    )
