"""A checked config, cut into the frozen settings of the rooms below.

Nothing below this module sees a ConfigDict. Keys are checked one by one by
`config/schema.py`, across fields by `run/rules.py`; every refusal is a
ValueError that names the key, its value and a remedy, before anything
expensive starts.
"""

import dataclasses
import itertools
import math
import os
from typing import Any

from rspo_jax.algorithm import (
  likelihood,
  microbatches,
  objectives,
  optimizer,
  scoring,
)
from rspo_jax.config import keys, schema
from rspo_jax.devices import sharding, workers
from rspo_jax.models import lora
from rspo_jax.run import rules, samplers
from rspo_jax.sampling import settings as sampling
from rspo_jax.sampling.settings import SamplerSettings
from rspo_jax.tasks import own


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
  greedy: SamplerSettings
  sampled: SamplerSettings
  seed: int


@dataclasses.dataclass(frozen=True)
class Settings:
  """A whole run, ready to build.

  Groups that are used as the config has them keep their names and keys.

  Attributes:
    model_folder: where model.path leads; "" trains a new model.
    adapter: settings of a new adapter, or None.
    adapter_folder: of an adapter that the run starts from, or "".
    reward: how users' functions are called.
    sampler: of training rollouts.
    greedy, sampled: of eval/accuracy and eval/accuracy_sampled.
    evaluations: of --mode=eval, one or more.
    step: how an update is cut into pieces.
    scores: which scores a step needs.
  """

  model: schema.Model
  model_folder: str
  lora: schema.Lora
  adapter: lora.LoraSettings | None
  adapter_folder: str
  task: schema.Task
  reward: own.RewardSettings
  data: schema.Data
  rollout: schema.Rollout
  sampler: SamplerSettings
  greedy: SamplerSettings
  sampled: SamplerSettings
  likelihood: likelihood.LikelihoodSettings
  objective: objectives.ObjectiveSettings
  optimizer: optimizer.OptimizerSettings
  step: microbatches.StepSettings
  scores: scoring.ScorePlan
  mesh: schema.Mesh
  eval: schema.Eval
  evaluations: tuple[Evaluation, ...]
  run: schema.Run

  @property
  def supervised(self) -> bool:
    """Whether demonstrations take the place of rollouts."""
    return self.objective.name == "sft"


def build(config, devices: int, planning: bool = False) -> Settings:
  """Checks the config and cuts it into settings.

  Args:
    config: a ConfigDict with exactly the keys of config/schema.py.
    devices: number of devices of the run.
    planning: nothing will run, so that model.path may still be missing.

  Raises:
    ValueError: names the first key that cannot be, its value and a remedy.
  """
  c = rules.check_early(config)
  keys.check_names(c)
  rules.check_before_cutting(c, planning)
  settings = _cut(c, _shards(c.mesh, devices))
  rules.check_settings(c, settings)
  return settings


def _cut(c: schema.Config, shards: int) -> Settings:
  """The settings of a config whose keys are fine one by one."""
  sampler = samplers.of_rollouts(c)
  length = c.eval.completion_length or c.sampler.completion_length
  masks = _likelihood_settings(c, sampler)
  objective = _derived(
    objectives.ObjectiveSettings,
    c.objective,
    group_size=c.rollout.group_size,
    draw_size=masks.draw_size,
  )
  step = _step_settings(c, objective, masks, shards)
  return Settings(
    model=c.model,
    model_folder=rules.resolve_model_path(c.model.path),
    lora=c.lora,
    adapter=_adapter(c.lora),
    adapter_folder=os.path.expanduser(c.lora.path),
    task=c.task,
    reward=_reward_settings(c.reward),
    data=c.data,
    rollout=c.rollout,
    sampler=sampler,
    greedy=samplers.of_evaluation(c, length, 0.0),
    sampled=samplers.of_evaluation(c, length, c.eval.temperature),
    likelihood=masks,
    objective=objective,
    optimizer=_derived(
      optimizer.OptimizerSettings,
      c.optimizer,
      total_steps=c.run.steps * c.train.updates_per_rollout,
    ),
    step=step,
    scores=scoring.plan(
      objective,
      step,
      masks.masks,
      c.rollout.prompts * c.rollout.group_size,
      shared_base=bool(c.lora.rank or c.lora.path) and c.lora.dual,
      stale=bool(c.rollout.stale_steps),
    ),
    mesh=c.mesh,
    eval=c.eval,
    evaluations=_evaluations(c, length),
    run=c.run,
  )


def _derived(kind: type, group: Any, **more) -> Any:
  """A group of keys as the settings that extend it."""
  values = {
    field.name: getattr(group, field.name)
    for field in dataclasses.fields(group)
  }
  return kind(**values | more)


def _shards(mesh: schema.Mesh, devices: int) -> int:
  """Devices that share the batch."""
  data, fsdp, _ = sharding.mesh_shape(
    mesh.data, mesh.fsdp, mesh.tensor, devices
  )
  sharding.check_rollout_tensor(mesh.rollout_tensor, devices)
  return data * fsdp


def _likelihood_settings(c: schema.Config, sampler: SamplerSettings):
  """How completions are scored (likelihood.LikelihoodSettings)."""
  return _derived(
    likelihood.LikelihoodSettings,
    c.likelihood,
    masks=_canvases(c, sampler),
    block_length=c.likelihood.block_length or c.sampler.block_length,
  )


def _canvases(c: schema.Config, sampler: SamplerSettings) -> int:
  """K; a trace's is one canvas for every `shrink` steps of the sampler.

  Raises:
    ValueError: names key, value and remedy.
  """
  scheme, masks = c.likelihood.scheme, c.likelihood.masks
  if not likelihood.ESTIMATORS[scheme].needs_trace:
    return masks
  # A threshold may commit one position a step, whatever the steps are.
  longest = sampler.completion_length
  if not sampler.adaptive:
    longest = min(longest, sampler.steps)
  wanted = -(-longest // c.likelihood.shrink)
  if masks not in (0, wanted):
    raise ValueError(
      f"likelihood.masks={masks} must be {wanted}, or 0, with "
      f"likelihood.scheme={scheme!r}: one canvas for every likelihood.shrink="
      f"{c.likelihood.shrink} of up to {longest} sampling steps."
    )
  return wanted


def _step_settings(c: schema.Config, objective, masks, shards: int):
  """Micro-batches and passes of an update (microbatches.StepSettings)."""
  total = c.rollout.prompts * c.rollout.group_size
  micro = c.train.micro_batch
  rules.check_shared(c, shards)
  if total % micro:
    near = shards * _nearest_divisor(total // shards, micro // shards)
    raise ValueError(
      f"train.micro_batch={micro} must divide the {total} sequences of a step "
      f"(rollout.prompts x rollout.group_size); use {near}."
    )
  step = _derived(
    microbatches.StepSettings,
    c.train,
    shards=shards,
    micro_masks=_micro_masks(c.train.micro_masks, masks),
  )
  return step


def _micro_masks(wish: int, masks) -> int:
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


def _adapter(keys: schema.Lora) -> lora.LoraSettings | None:
  """The new adapter that is trained, if any."""
  if not keys.rank:
    return None
  return lora.LoraSettings(
    rank=keys.rank,
    alpha=float(keys.alpha),
    targets=tuple(filter(None, keys.targets.split(","))),
    rslora=keys.rslora,
  )


def _reward_settings(reward: schema.Reward) -> own.RewardSettings:
  """How users' functions are called."""
  try:
    limits = workers.Limits(
      time_s=reward.time_limit_s, memory_bytes=reward.memory_mb << 20
    )
  except ValueError as error:
    raise ValueError(f"reward.memory_mb={reward.memory_mb}: {error}") from error
  return own.RewardSettings(reward.extra, reward.workers, limits)


def _nearest_divisor(number: int, wish: int) -> int:
  """The divisor of a number that is nearest to a wish."""
  low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
  return min(
    (d for n in low for d in (n, number // n)), key=lambda d: abs(d - wish)
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
      ("algorithm", sampling.ALGORITHMS),
      ("remasking", sampling.REMASKING),
      ("cache", sampling.CACHES),
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
      keys.one_of("the part", key, names)
      changes[names[key]] = key
      continue
    keys.one_of("the number", key, numbers)
    try:
      changes[key] = numbers[key](value)
    except ValueError as error:
      raise ValueError(f"{key}={value} must be a number.") from error
  return changes


def _evaluations(c: schema.Config, length: int) -> tuple[Evaluation, ...]:
  """The evaluations of --mode=eval: lengths x samplers x seeds.

  Args:
    c: the config.
    length: completion length where no list says otherwise.
  """
  e = c.eval
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
    lengths or [length], specs or [""], seeds or [c.run.seed]
  ):
    pair = [
      samplers.of_evaluation(c, own_length, t) for t in (0.0, e.temperature)
    ]
    if spec:
      try:
        changes = _sampler_changes(spec)
        pair = [dataclasses.replace(one, **changes) for one in pair]
        for one in pair:
          sampling.validate(one)
      except ValueError as error:
        raise ValueError(f"eval.samplers={spec!r}: {error}") from error
    name = "-".join([spec] * bool(specs) + [f"seed{seed}"] * bool(seeds))
    found.append(Evaluation(name, *pair, seed))
  return tuple(found)
