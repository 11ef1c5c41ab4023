"""Checks a finished config across fields and cuts it into frozen settings.

Nothing below this module sees a ConfigDict. Every refusal is a ValueError that
names the key, its value and a remedy, before anything expensive starts.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
from typing import Any

EMBEDDED = "embedded:"


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
  """Prompts of a step B, completions of a prompt G, temperature."""

  prompts: int
  group_size: int
  temperature: float


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """What is evaluated, and how many prompts at a time."""

  split: str
  prompts: int
  batch: int
  temperature: float
  every: int


@dataclasses.dataclass(frozen=True)
class RunSettings:
  """Length, seed and outputs of a run."""

  steps: int
  seed: int
  checkpoint_every: int
  keep_checkpoints: int
  samples_every: int
  tensorboard: bool
  export: bool
  compilation_cache: str
  log: str


@dataclasses.dataclass(frozen=True)
class Settings:
  """A whole run, ready to build."""

  model: dict[str, Any]
  task: dict[str, Any]
  data: Any  # tasks.base.DataSettings
  prompt_length: int
  corrupt_share: float
  rollout: RolloutSettings
  sampler: Any  # sampler.SamplerSettings of training rollouts
  greedy: Any  # of eval/accuracy
  sampled: Any  # of eval/accuracy_sampled
  likelihood: Any  # likelihood.LikelihoodSettings
  objective: Any  # objectives.ObjectiveSettings
  normalize_advantages: bool
  skip_equal_groups: bool
  optimizer: Any  # train_step.OptimizerSettings
  step: Any  # train_step.StepSettings
  mesh: dict[str, int]
  eval: EvalSettings
  run: RunSettings

  @property
  def supervised(self) -> bool:
    """Whether demonstrations take the place of rollouts."""
    return self.objective.name == "sft"


def _positive(config, *keys: str) -> None:
  """Refuses counts that are not positive integers."""
  for key in keys:
    group, name = key.split(".")
    value = config[group][name]
    if value < 1:
      raise ValueError(f"{key}={value} must be at least 1.")


def _not_negative(config, *keys: str) -> None:
  for key in keys:
    group, name = key.split(".")
    value = config[group][name]
    if not value >= 0:
      raise ValueError(f"{key}={value} must not be negative.")


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
  return sorted(path.name for path in folder.glob("*") if path.is_dir())


def resolve_model_path(path: str) -> str:
  """A folder for `model.path`; "embedded:NAME" becomes the package's own."""
  if path.startswith(EMBEDDED):
    name = path.removeprefix(EMBEDDED)
    _one_of("model.path", path, [EMBEDDED + n for n in embedded_names()])
    return str(pathlib.Path(__file__).parent / "checkpoints" / name)
  if path and "://" not in path and not os.path.isdir(path):
    raise ValueError(
      f"model.path={path!r} is not a folder; give one with config.json, "
      "*.safetensors and tokenizer.json."
    )
  return path


def build(config, devices: int) -> Settings:
  """Checks the config and cuts it into settings.

  Args:
    config: a ConfigDict with exactly the keys of configs/base.py.
    devices: number of devices of the run.

  Raises:
    ValueError: names the first key that cannot be, its value and a remedy.
  """
  from rspo_jax import likelihood, objectives, sampler, sharding, train_step
  from rspo_jax.tasks import TASKS, base

  _positive(
    config,
    "rollout.prompts",
    "rollout.group_size",
    "data.prompt_length",
    "sampler.completion_length",
    "sampler.block_length",
    "sampler.steps",
    "train.micro_batch",
    "eval.batch",
    "run.steps",
    "run.checkpoint_every",
    "run.keep_checkpoints",
  )
  _not_negative(
    config,
    "rollout.temperature",
    "eval.temperature",
    "eval.prompts",
    "eval.every",
    "eval.completion_length",
    "eval.block_length",
    "eval.steps",
    "run.seed",
    "run.samples_every",
    "optimizer.warmup_steps",
    "data.seed",
  )
  _one_of("task.name", config.task.name, TASKS)
  task = TASKS[config.task.name]
  _one_of("task.prompt_style", config.task.prompt_style, task.styles)
  _one_of("task.protocol", config.task.protocol, base.PROTOCOLS)
  weights = config.task.reward_weights.to_dict()
  base.resolve_weights(task.weights, weights or None)
  _one_of("eval.split", config.eval.split, base.SPLITS)
  _one_of("data.size", config.data.size, ("small", "large"))
  _one_of("run.log", config.run.log, ("quiet", "normal", "debug"))
  _one_of(
    "model.compute_dtype",
    config.model.compute_dtype,
    ("auto", "float32", "bfloat16"),
  )
  _one_of(
    "model.param_dtype", config.model.param_dtype, ("float32", "bfloat16")
  )
  _one_of("model.attention", config.model.attention, ("einsum", "flash"))
  _one_of("objective.name", config.objective.name, objectives.OBJECTIVES)
  _one_of("likelihood.scheme", config.likelihood.scheme, likelihood.ESTIMATORS)
  _one_of("train.passes", config.train.passes, train_step.PASSES)
  if not 0.0 <= config.data.corrupt_share <= 1.0:
    raise ValueError(
      f"data.corrupt_share={config.data.corrupt_share} must lie in [0, 1]."
    )
  if config.data.source and not os.path.isfile(config.data.source):
    raise ValueError(
      f"data.source={config.data.source!r} is not a file; give a JSONL or CSV "
      "file, or leave it empty."
    )

  supervised = config.objective.name == "sft"
  if supervised and (task.demonstration is None):
    raise ValueError(
      f"objective.name='sft' needs demonstrations, which task.name="
      f"{task.name!r} does not have."
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
  if not supervised and not config.model.path:
    raise ValueError(
      "model.path='' names no checkpoint, and reinforcement learning needs "
      f"one; give a folder or one of "
      f"{', '.join(EMBEDDED + name for name in embedded_names())}."
    )

  def sampler_settings(length, block, steps, temperature):
    settings = sampler.SamplerSettings(
      completion_length=length,
      block_length=block,
      steps=steps,
      temperature=temperature,
      remasking=config.sampler.remasking,
      algorithm=config.sampler.algorithm,
    )
    sampler.validate(settings)
    return settings

  train_length = config.sampler.completion_length
  train_sampler = sampler_settings(
    train_length,
    config.sampler.block_length,
    config.sampler.steps,
    config.rollout.temperature,
  )
  eval_length = config.eval.completion_length or train_length
  block = config.eval.block_length or min(
    config.sampler.block_length, eval_length
  )
  steps = config.eval.steps or max(
    1, config.sampler.steps * eval_length // train_length
  )
  shape = sharding.mesh_shape(
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices
  )
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
    near = max(
      (n for n in range(shards, total + 1, shards) if total % n == 0),
      key=lambda n: -abs(n - micro),
    )
    raise ValueError(
      f"train.micro_batch={micro} must divide the {total} sequences of a step "
      f"(rollout.prompts x rollout.group_size); use {near}."
    )
  mask_settings = likelihood.LikelihoodSettings(
    scheme=config.likelihood.scheme,
    masks=config.likelihood.masks,
    scope=config.likelihood.scope,
  )
  objective = objectives.ObjectiveSettings(
    name=config.objective.name,
    lambda_=float(config.objective.lambda_),
    lambda_unit=config.objective.lambda_unit,
    centring=config.objective.centring,
    subtract_reference=config.objective.subtract_reference,
    gap_masks=config.objective.gap_masks,
    group_size=config.rollout.group_size,
    draw_size=mask_settings.draw_size,
  )
  if (
    objective.gap_masks == "leave_one_out"
    and mask_settings.masks < 2 * mask_settings.draw_size
  ):
    raise ValueError(
      "objective.gap_masks='leave_one_out' needs two independent draws; use "
      f"likelihood.masks={2 * mask_settings.draw_size} or more, not "
      f"{mask_settings.masks}."
    )
  step = train_step.StepSettings(
    micro_batch=micro, passes=config.train.passes, shards=shards
  )
  train_step.resolve_passes(step, objective, total)

  model = {
    "path": config.model.path,
    "folder": resolve_model_path(config.model.path),
    "compute_dtype": config.model.compute_dtype,
    "param_dtype": config.model.param_dtype,
    "attention": config.model.attention,
    "remat": config.model.remat,
    "head_chunks": config.model.head_chunks,
    "new": config.model.new.to_dict(),
  }
  optimizer = config.optimizer.to_dict() | {"total_steps": config.run.steps}
  return Settings(
    model=model,
    task={
      "name": task.name,
      "prompt_style": config.task.prompt_style,
      "protocol": config.task.protocol,
      "weights": weights or None,
    },
    data=base.DataSettings(
      size=config.data.size,
      seed=config.data.seed,
      data_dir=config.data.dir,
      source=config.data.source,
    ),
    prompt_length=config.data.prompt_length,
    corrupt_share=config.data.corrupt_share,
    rollout=RolloutSettings(**config.rollout.to_dict()),
    sampler=train_sampler,
    greedy=sampler_settings(eval_length, block, steps, 0.0),
    sampled=sampler_settings(
      eval_length, block, steps, config.eval.temperature
    ),
    likelihood=mask_settings,
    objective=objective,
    normalize_advantages=config.objective.normalize_advantages,
    skip_equal_groups=config.objective.skip_equal_groups,
    optimizer=train_step.OptimizerSettings(**optimizer),
    step=step,
    mesh=config.mesh.to_dict(),
    eval=EvalSettings(
      split=config.eval.split,
      prompts=config.eval.prompts,
      batch=config.eval.batch,
      temperature=config.eval.temperature,
      every=config.eval.every,
    ),
    run=RunSettings(**config.run.to_dict()),
  )


# Keys that may change between the parts of one run: they say where and how
# loudly, not what is computed.
FREE_KEYS = (
  "run.checkpoint_every",
  "run.keep_checkpoints",
  "run.samples_every",
  "run.tensorboard",
  "run.export",
  "run.compilation_cache",
  "run.log",
  "data.dir",
  "mesh.data",
  "mesh.fsdp",
  "mesh.tensor",
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


def check_same_run(old: dict, new: dict, workdir: str) -> None:
  """Refuses to continue a run under a config that means something else.

  Raises:
    ValueError: names the keys that differ.
  """
  before, after = flat(old), flat(new)
  changed = [
    f"{key}={after.get(key)!r} (was {before.get(key)!r})"
    for key in sorted(before.keys() | after.keys())
    if key not in FREE_KEYS and before.get(key) != after.get(key)
  ]
  if changed:
    raise ValueError(
      f"{workdir} holds a run with another config: {', '.join(changed)}. Use "
      "another --workdir, or the config of that run."
    )
