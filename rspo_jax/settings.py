"""Checks a finished config across fields and cuts it into frozen settings.

Nothing below this module sees a ConfigDict. Every refusal is a ValueError that
names the key, its value and a remedy, before anything expensive starts.
"""

import dataclasses
import itertools
import math
import os
from typing import Any

from rspo_jax import config_checks, sampler_settings
from rspo_jax.config_checks import eval_sampler, one_of, rollout_sampler


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
  lora: dict[
    str, Any
  ]  # settings (lora.LoraSettings | None), path, dual, merge_dtype
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


def build(config, devices: int, planning: bool = False) -> Settings:
  """Checks the config and cuts it into settings.

  Args:
    config: a ConfigDict with exactly the keys of configs/base.py.
    devices: number of devices of the run.
    planning: nothing will run, so that model.path may still be missing.

  Raises:
    ValueError: names the first key that cannot be, its value and a remedy.
  """
  from rspo_jax import sharding, tasks, train_step
  from rspo_jax.tasks import base

  config_checks.check_values(config)
  reward = _reward_settings(config.reward)
  task = tasks.find(config.task.name, reward)
  _check_names(config, task)
  _check_groups(config, task)
  if not planning:
    _check_has_model(config, task)
  sampler = rollout_sampler(config)
  shards = _shards(config, devices)
  masks = _likelihood_settings(config, sampler)
  objective = _objective_settings(config, masks)
  _check_objective(config, objective, sampler, shards)
  _check_leave_one_out(objective, masks)
  step = _step_settings(config, objective, masks, shards)
  length = config.eval.completion_length or config.sampler.completion_length
  updates = config.run.steps * config.train.updates_per_rollout
  return Settings(
    model=_model(config.model),
    lora=_adapter(config.lora),
    task={
      "name": task.name,
      "prompt_style": config.task.prompt_style,
      "protocol": config.task.protocol,
      "reward": reward,
      "weights": config.task.reward_weights.to_dict() or None,
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
    sampler=sampler,
    greedy=eval_sampler(config, length, 0.0),
    sampled=eval_sampler(config, length, config.eval.temperature),
    likelihood=masks,
    objective=objective,
    normalize_advantages=config.objective.normalize_advantages,
    skip_equal_groups=config.objective.skip_equal_groups,
    reference_every=config.objective.reference_every,
    optimizer=train_step.OptimizerSettings(
      **config.optimizer.to_dict(), total_steps=updates
    ),
    step=step,
    mesh={axis: config.mesh[axis] for axis in sharding.AXES},
    rollout_tensor=config.mesh.rollout_tensor,
    eval=EvalSettings(
      **{
        field.name: config.eval[field.name]
        for field in dataclasses.fields(EvalSettings)
      }
    ),
    evaluations=_evaluations(config, length),
    run=RunSettings(**config.run.to_dict()),
  )


def _check_names(config, task) -> None:
  """Names that must be in a table of the program."""
  from rspo_jax import likelihood, objectives, train_step
  from rspo_jax.models import published
  from rspo_jax.tasks import base

  for part in config.task.reward_weights:
    one_of("part of task.reward_weights", part, task.weights)
  tables = {
    "task.prompt_style": task.styles,
    "task.protocol": base.PROTOCOLS,
    "eval.split": base.SPLITS,
    "objective.name": objectives.OBJECTIVES,
    "likelihood.scheme": likelihood.ESTIMATORS,
    "likelihood.scope": likelihood.SCOPES,
    "train.passes": train_step.PASSES,
    "optimizer.schedule": train_step.SCHEDULES,
  }
  for key, allowed in objectives.CHOICES.items():
    tables[f"objective.{key}"] = allowed
  if config.model.published:
    tables["model.published"] = published.PUBLISHED
  for key, allowed in tables.items():
    group, _, field = key.partition(".")
    one_of(key, config[group][field], allowed)
  if config.run.keep_best and config.eval.split == "test":
    raise ValueError(
      f"run.keep_best={config.run.keep_best} would choose by eval.split='test',"
      " which is for the end; use eval.split='validation', or keep_best=0."
    )


def _check_groups(config, task) -> None:
  """Demonstrations for supervised runs, completions to compare for others."""
  size = config.rollout.group_size
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
  if supervised and size != 1:
    raise ValueError(
      f"rollout.group_size={size} has no meaning with "
      "objective.name='sft': a prompt has one demonstration; use 1."
    )
  if not supervised and size < 2:
    raise ValueError(
      f"rollout.group_size={size} leaves nothing to "
      "compare a completion with; use 2 or more."
    )
  if not supervised and config.rollout.temperature == 0:
    raise ValueError(
      "rollout.temperature=0 gives every group identical completions; use a "
      "temperature > 0."
    )


def _check_has_model(config, task) -> None:
  """Reinforcement learning starts from a checkpoint."""
  if config.model.path or config.objective.name == "sft":
    return
  if config.task.prompt_style != "compact":
    raise ValueError(
      f"model.path='' names no checkpoint, and task.name={task.name!r} needs "
      "one that reads and writes text: give --config.model.path=FOLDER with "
      "LLaDA or Dream in the Hugging Face layout."
    )
  names = ", ".join(
    config_checks.EMBEDDED + name for name in config_checks.embedded_names()
  )
  raise ValueError(
    "model.path='' names no checkpoint, and reinforcement learning needs "
    f"one; give a folder or one of {names}."
  )


def _shards(config, devices: int) -> int:
  """Devices that share the batch; what is divided among them must divide."""
  from rspo_jax import sharding

  data, fsdp, _ = sharding.mesh_shape(
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices
  )
  sharding.check_rollout_tensor(config.mesh.rollout_tensor, devices)
  shards = data * fsdp
  for key, value in (
    ("rollout.prompts", config.rollout.prompts),
    ("train.micro_batch", config.train.micro_batch),
    ("eval.batch", config.eval.batch),
  ):
    if value % shards:
      raise ValueError(
        f"{key}={value} must be a multiple of the {shards} devices that share "
        f"the batch (mesh.data x mesh.fsdp); use {-(-value // shards) * shards}."
      )
  return shards


def _likelihood_settings(config, sampler):
  """How completions are scored (likelihood.LikelihoodSettings)."""
  from rspo_jax import likelihood

  keys = config.likelihood
  return likelihood.LikelihoodSettings(
    scheme=keys.scheme,
    masks=_canvases(config, sampler),
    scope=keys.scope,
    block_length=keys.block_length or config.sampler.block_length,
    prompt_mask=float(keys.prompt_mask),
    shrink=keys.shrink,
  )


def _objective_settings(config, masks):
  """The objective and its options (objectives.ObjectiveSettings)."""
  from rspo_jax import objectives

  options = {
    field.name: config.objective[field.name]
    for field in dataclasses.fields(objectives.ObjectiveSettings)
    if field.name in config.objective
  }
  options |= {"lambda_": float(config.objective.lambda_)}
  return objectives.ObjectiveSettings(
    **options,
    group_size=config.rollout.group_size,
    draw_size=masks.draw_size,
  )


def _check_leave_one_out(objective, masks) -> None:
  """A draw left out must leave another one."""
  from rspo_jax import likelihood

  least = 2 * masks.draw_size
  if objective.gap_masks != "leave_one_out" or masks.masks >= least:
    return
  remedy = f"use likelihood.masks={least} or more, not {masks.masks}."
  if likelihood.ESTIMATORS[masks.scheme].joint:
    remedy = (
      f"likelihood.scheme={masks.scheme!r} draws all its masks "
      "together; use 'uniform'."
    )
  raise ValueError(
    "objective.gap_masks='leave_one_out' needs two independent draws; " + remedy
  )


def _step_settings(config, objective, masks, shards: int):
  """Micro-batches and passes of an update (train_step.StepSettings)."""
  from rspo_jax import train_step

  total = config.rollout.prompts * config.rollout.group_size
  micro = config.train.micro_batch
  if total % micro:
    near = shards * _nearest_divisor(total // shards, micro // shards)
    raise ValueError(
      f"train.micro_batch={micro} must divide the {total} sequences of a step "
      f"(rollout.prompts x rollout.group_size); use {near}."
    )
  step = train_step.StepSettings(
    micro_batch=micro,
    passes=config.train.passes,
    shards=shards,
    updates_per_rollout=config.train.updates_per_rollout,
    micro_masks=_micro_masks(config.train.micro_masks, masks),
  )
  train_step.resolve_passes(step, objective, total)
  return step


def _model(keys) -> dict[str, Any]:
  """Where the model comes from and how it computes."""
  fields = (
    "path",
    "published",
    "compute_dtype",
    "param_dtype",
    "attention",
    "remat",
    "head_chunks",
  )
  return {field: keys[field] for field in fields} | {
    "folder": config_checks.resolve_model_path(keys.path),
    "new": keys.new.to_dict(),
  }


def _adapter(keys) -> dict[str, Any]:
  """The adapter that is trained, if any: settings, path, dual, merge_dtype."""
  from rspo_jax.models import lora

  path, here = keys.path, keys.path and "://" not in keys.path
  if here:
    path = os.path.expanduser(path)
  if here and not os.path.isfile(os.path.join(path, "adapter_config.json")):
    raise ValueError(
      f"lora.path={keys.path!r} holds no adapter_config.json; give a "
      "folder in PEFT's layout (of a run: DIR/adapter), or leave it empty for "
      "a new adapter."
    )
  settings = None
  if keys.rank:
    settings = lora.LoraSettings(
      rank=keys.rank,
      alpha=float(keys.alpha),
      targets=tuple(filter(None, keys.targets.split(","))),
      rslora=keys.rslora,
    )
  return {
    "settings": settings,
    "path": path,
    "dual": keys.dual,
    "merge_dtype": keys.merge_dtype,
  }


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
      one_of("the part", key, names)
      changes[names[key]] = key
      continue
    one_of("the number", key, numbers)
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
      "objective.skip_equal_groups=False leaves groups without any pair of "
      f"unequal rewards, from which objective.name={objective.name!r} learns "
      "nothing while momentum goes on; use True."
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
