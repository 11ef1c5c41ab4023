"""Rules across keys: small named functions in three lists.

`EARLY` need no JAX and refuse a command in a moment, `BEFORE` need the tables
of the program, `AFTER` the settings that were cut. A rule raises a ValueError
that names the key, its value and a remedy, or returns None. To add one, write
a function and put it into a list.
"""

import glob
import math
import os
import pathlib

from rspo_jax.config import keys, schema
from rspo_jax.run import samplers
from rspo_jax.storage import mirror

EMBEDDED = "embedded:"
_CHECKPOINTS = pathlib.Path(__file__).parents[1] / "checkpoints"


def check_early(config) -> schema.Config:
  """Checks what can be checked without JAX, in a moment.

  Args:
    config: a ConfigDict with exactly the keys of config/schema.py.

  Returns:
    The config, typed.

  Raises:
    ValueError: names key, value and remedy.
  """
  c = keys.typed(config.to_dict(), schema.Config)
  keys.check_values(c)
  for rule in EARLY:
    rule(c)
  return c


def check_before_cutting(c: schema.Config, planning: bool) -> None:
  """Checks a config against the tables of the program.

  Args:
    c: the config.
    planning: nothing will run, so that model.path may still be missing.

  Raises:
    ValueError: names key, value and remedy.
  """
  for rule in BEFORE:
    if not (planning and rule is reinforcement_starts_from_a_checkpoint):
      rule(c)


def check_settings(c: schema.Config, settings) -> None:
  """Checks a config against the settings that were cut from it.

  Raises:
    ValueError: names key, value and remedy.
  """
  for rule in AFTER:
    rule(c, settings)


# --- Without JAX -------------------------------------------------------------


def the_first_step_is_not_profiled(c: schema.Config) -> None:
  """It compiles, and is left out of a profile."""
  if c.run.profile >= c.run.steps:
    raise ValueError(
      f"run.profile={c.run.profile} must be less than run.steps="
      f"{c.run.steps}: the first step compiles and is left out."
    )


def loggers_are_known(c: schema.Config) -> None:
  """run.logger names trackers."""
  from rspo_jax.reporting import trackers

  trackers.names(c.run.logger)


def samplers_fit_together(c: schema.Config) -> None:
  """Options of the sampler, in training and in evaluation."""
  keys.check_names(c.sampler, "sampler.")
  samplers.of_rollouts(c)
  length = c.eval.completion_length or c.sampler.completion_length
  samplers.of_evaluation(c, length, c.eval.temperature)


def what_is_scored_was_sampled(c: schema.Config) -> None:
  """Positions behind an end are not part of a canvas that is scored."""
  if (
    c.sampler.stop_at_eos
    and c.likelihood.scope == "canvas"
    and c.objective.name != "sft"
  ):
    raise ValueError(
      "sampler.stop_at_eos=True leaves what follows a first EOS unsampled, but "
      "likelihood.scope='canvas' scores it; use likelihood.scope='completion', "
      "or sampler.stop_at_eos=False."
    )


def the_source_is_a_file(c: schema.Config) -> None:
  """data.source is a published file by name, or a file."""
  from rspo_jax.datasets import published

  if not c.data.source:
    return
  if published.split_name(c.data.source)[0]:
    published.locate(c.data.source)
    return
  # One file a split: which splits a run reads is seen when it loads them.
  path = c.data.source.replace("{split}", c.eval.split)
  if not os.path.isfile(os.path.expanduser(path)):
    raise ValueError(
      f"data.source={c.data.source!r}: {path!r} is not a file; give a "
      "JSONL or CSV file (with {split} in its path for one file a split), "
      "or leave it empty."
    )


def the_model_is_there(c: schema.Config) -> None:
  """The checkpoint's folder, or the shape of a new model."""
  if c.model.path:
    resolve_model_path(c.model.path)
    return
  new = c.model.new
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


EARLY = (
  the_first_step_is_not_profiled,
  loggers_are_known,
  samplers_fit_together,
  what_is_scored_was_sampled,
  the_source_is_a_file,
  the_model_is_there,
)


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


def embedded_names() -> list[str]:
  """Names of the checkpoints that the package carries."""
  found = glob.glob(str(_CHECKPOINTS / "*" / "config.json"))
  return sorted(pathlib.Path(path).parent.name for path in found)


def resolve_model_path(path: str) -> str:
  """A folder for `model.path`; "embedded:NAME" becomes the package's own."""
  if path.startswith(EMBEDDED):
    name = path.removeprefix(EMBEDDED)
    keys.one_of("model.path", path, [EMBEDDED + n for n in embedded_names()])
    return str(_CHECKPOINTS / name)
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


# --- With the tables of the program ------------------------------------------


def _task(c: schema.Config):
  """The task of the run, as far as its tables go."""
  from rspo_jax import tasks
  from rspo_jax.tasks import own

  return tasks.find(c.task.name, own.RewardSettings(c.reward.extra))


def _supervised(c: schema.Config) -> bool:
  return c.objective.name == "sft"


def the_task_has_these_names(c: schema.Config) -> None:
  """Prompt style and rewarded parts are the task's."""
  task = _task(c)
  for part in c.task.reward_weights:
    keys.one_of("part of task.reward_weights", part, task.weights)
  keys.one_of("task.prompt_style", c.task.prompt_style, task.styles)


def the_test_split_chooses_nothing(c: schema.Config) -> None:
  """Best checkpoints are chosen on the validation split."""
  if c.run.keep_best and c.eval.split == "test":
    raise ValueError(
      f"run.keep_best={c.run.keep_best} would choose by eval.split='test',"
      " which is for the end; use eval.split='validation', or keep_best=0."
    )


def supervised_runs_have_demonstrations(c: schema.Config) -> None:
  """A task has demonstrations, and answers of mixed quality, or has not."""
  task = _task(c)
  if _supervised(c) and (task.demonstration is None):
    raise ValueError(
      f"objective.name='sft' needs demonstrations, which task.name="
      f"{task.name!r} does not have."
    )
  if c.data.corrupt_share and task.corrupt is None:
    raise ValueError(
      f"data.corrupt_share={c.data.corrupt_share} needs answers of mixed "
      f"quality, which task.name={task.name!r} does not have; use 0."
    )


def groups_can_be_compared(c: schema.Config) -> None:
  """One demonstration a prompt, or two completions that can differ."""
  size = c.rollout.group_size
  if _supervised(c) and size != 1:
    raise ValueError(
      f"rollout.group_size={size} has no meaning with "
      "objective.name='sft': a prompt has one demonstration; use 1."
    )
  if not _supervised(c) and size < 2:
    raise ValueError(
      f"rollout.group_size={size} leaves nothing to "
      "compare a completion with; use 2 or more."
    )
  if not _supervised(c) and c.rollout.temperature == 0:
    raise ValueError(
      "rollout.temperature=0 gives every group identical completions; use a "
      "temperature > 0."
    )


def reinforcement_starts_from_a_checkpoint(c: schema.Config) -> None:
  """A new model knows nothing that rewards could bring out."""
  if c.model.path or _supervised(c):
    return
  if c.task.prompt_style != "compact":
    raise ValueError(
      f"model.path='' names no checkpoint, and task.name={c.task.name!r} needs "
      "one that reads and writes text: give --config.model.path=FOLDER with "
      "LLaDA or Dream in the Hugging Face layout."
    )
  names = ", ".join(EMBEDDED + name for name in embedded_names())
  raise ValueError(
    "model.path='' names no checkpoint, and reinforcement learning needs "
    f"one; give a folder or one of {names}."
  )


def the_adapter_is_there(c: schema.Config) -> None:
  """lora.path is a folder in PEFT's layout, or in a bucket."""
  path = os.path.expanduser(c.lora.path)
  if not path or "://" in path:
    return
  if not os.path.isfile(os.path.join(path, "adapter_config.json")):
    raise ValueError(
      f"lora.path={c.lora.path!r} holds no adapter_config.json; give a "
      "folder in PEFT's layout (of a run: DIR/adapter), or leave it empty for "
      "a new adapter."
    )


BEFORE = (
  the_task_has_these_names,
  the_test_split_chooses_nothing,
  supervised_runs_have_demonstrations,
  groups_can_be_compared,
  reinforcement_starts_from_a_checkpoint,
  the_adapter_is_there,
)


# --- With the settings -------------------------------------------------------


def check_shared(c: schema.Config, shards: int) -> None:
  """What is divided among the devices that share the batch divides."""
  for key, value in (
    ("rollout.prompts", c.rollout.prompts),
    ("train.micro_batch", c.train.micro_batch),
    ("eval.batch", c.eval.batch),
  ):
    if value % shards:
      raise ValueError(
        f"{key}={value} must be a multiple of the {shards} devices that share "
        f"the batch (mesh.data x mesh.fsdp); use {-(-value // shards) * shards}."
      )


def _entry(settings):
  """What the table of objectives says of the run's."""
  from rspo_jax.algorithm import objectives

  return objectives.OBJECTIVES[settings.objective.name]


def the_scheme_serves_the_objective(c: schema.Config, settings) -> None:
  """An objective may need the masks of certain schemes."""
  allowed = _entry(settings).estimators
  if allowed is not None and c.likelihood.scheme not in allowed:
    raise ValueError(
      f"likelihood.scheme={c.likelihood.scheme!r} cannot serve objective.name="
      f"{c.objective.name!r}; use {' or '.join(map(repr, allowed))}."
    )


def demonstrations_have_no_trace(c: schema.Config, settings) -> None:
  """Schemes that follow the sampler need something that was sampled."""
  from rspo_jax.algorithm import likelihood

  if likelihood.ESTIMATORS[c.likelihood.scheme].needs_trace and _supervised(c):
    raise ValueError(
      f"likelihood.scheme={c.likelihood.scheme!r} follows the sampler's steps, "
      "and demonstrations have none; use 'uniform'."
    )


def only_rollouts_are_used_again(c: schema.Config, settings) -> None:
  """Several updates on one rollout need a rollout."""
  updates = c.train.updates_per_rollout
  if updates > 1 and not _entry(settings).reuse:
    raise ValueError(
      f"train.updates_per_rollout={updates} has no "
      f"meaning with objective.name={c.objective.name!r}, which has no "
      "rollouts; use 1."
    )


def stale_completions_are_corrected(c: schema.Config, settings) -> None:
  """Completions of older parameters suit some objectives only."""
  from rspo_jax.algorithm import objectives

  if not c.rollout.stale_steps:
    return
  reason = objectives.on_policy_reason(settings.objective)
  if reason:
    raise ValueError(
      f"rollout.stale_steps={c.rollout.stale_steps} trains on "
      f"completions of older parameters, but {reason}. Otherwise use "
      "rollout.stale_steps=0."
    )


def pairs_have_a_difference(c: schema.Config, settings) -> None:
  """Groups without a pair teach a comparison nothing."""
  if _entry(settings).needs_difference and not c.objective.skip_equal_groups:
    raise ValueError(
      "objective.skip_equal_groups=False leaves groups without any pair of "
      f"different rewards, from which objective.name={c.objective.name!r} "
      "learns nothing while momentum goes on; use True."
    )


def partial_canvases_have_a_schedule(c: schema.Config, settings) -> None:
  """A forward of the schedule stands for how far a canvas is filled."""
  sampler = settings.sampler
  if _entry(settings).finishes and (
    sampler.adaptive
    or sampler.cache != "none"
    or sampler.stop_at_eos
    or sampler.steps < 2
  ):
    raise ValueError(
      f"objective.name={c.objective.name!r} finishes partial canvases by the "
      "sampler's fixed schedule; use sampler.cache='none', threshold=0, "
      "factor=0, stop_at_eos=False and at least 2 steps."
    )


def kept_groups_differ_and_divide(c: schema.Config, settings) -> None:
  """keep_groups chooses among groups that teach, and shards divide it."""
  keep, shards = c.rollout.keep_groups, settings.step.shards
  if keep and not c.objective.skip_equal_groups:
    raise ValueError(
      f"rollout.keep_groups={keep} chooses among groups whose rewards differ; "
      "use objective.skip_equal_groups=True, or keep_groups=0."
    )
  if keep % shards:
    raise ValueError(
      f"rollout.keep_groups={keep} must be a multiple of the {shards} devices "
      f"that share the batch; use {-(-keep // shards) * shards}."
    )


def lambda_starts_somewhere(c: schema.Config, settings) -> None:
  """A lambda that follows a share multiplies the last one."""
  if c.objective.lambda_share and not c.objective.lambda_:
    raise ValueError(
      f"objective.lambda_share={c.objective.lambda_share} needs a lambda to "
      "start from; use objective.lambda_=1, or lambda_share=0."
    )


def solved_groups_are_rspos(c: schema.Config, settings) -> None:
  """Other objectives have their own word on groups that are all right."""
  if c.objective.solved_advantage and c.objective.name != "rspo":
    raise ValueError(
      f"objective.solved_advantage={c.objective.solved_advantage} belongs to "
      f"objective.name='rspo'; use 0 with {c.objective.name!r}."
    )


def a_refreshed_reference_is_used(c: schema.Config, settings) -> None:
  """Nothing is gained by refreshing what nobody reads."""
  every = c.objective.reference_every
  if every and not _entry(settings).uses_reference(settings.objective):
    raise ValueError(
      f"objective.reference_every={every} refreshes "
      f"a reference that objective.name={c.objective.name!r} does not use; "
      "use 0."
    )


def a_draw_left_out_leaves_another(c: schema.Config, settings) -> None:
  """Leave-one-out needs two independent draws."""
  from rspo_jax.algorithm import likelihood

  masks = settings.likelihood
  least = 2 * masks.draw_size
  if settings.objective.gap_masks != "leave_one_out" or masks.masks >= least:
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


AFTER = (
  the_scheme_serves_the_objective,
  demonstrations_have_no_trace,
  only_rollouts_are_used_again,
  stale_completions_are_corrected,
  pairs_have_a_difference,
  partial_canvases_have_a_schedule,
  kept_groups_differ_and_divide,
  lambda_starts_somewhere,
  solved_groups_are_rspos,
  a_refreshed_reference_is_used,
  a_draw_left_out_leaves_another,
)
