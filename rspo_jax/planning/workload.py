"""The workload of a plan: the command line's numbers in the run's config.

What does not divide is refused with the nearest number that does, or planned
with it and noted.
"""

import dataclasses

from rspo_jax.config import load


@dataclasses.dataclass(frozen=True)
class Options:
  """The command line of a plan.

  Attributes:
    config: FILE[:ARG].
    overrides: text by config key.
    topology: as given; may be "" or a kind alone with `search`.
    sequences, masks, prompt, completion, micro_batches: None: the config's.
    search, quick, json, no_cache: switches.
  """

  config: str
  overrides: dict[str, str]
  topology: str
  sequences: int | None = None
  masks: int | None = None
  prompt: int | None = None
  completion: int | None = None
  micro_batches: int | None = None
  search: bool = False
  quick: bool = False
  json: bool = False
  no_cache: bool = False

  @property
  def kind(self) -> str:
    """The kind of device, such as "v5e" or "gpu"."""
    return self.topology.partition(":")[0].lower()


def configure(options: Options, devices: int):
  """The config with the workload of the command line.

  Args:
    options: the command line.
    devices: of the slice, to which the batch is fitted.

  Returns:
    (config, notes): what had to be changed to make the numbers fit is noted.

  Raises:
    ValueError: numbers that do not divide, with the nearest that do.
  """
  from rspo_jax.devices import sharding

  config = load.load_config(options.config)
  for key, text in options.overrides.items():
    load.override(config, key, text)
  notes = []
  if options.masks:
    config.likelihood.masks = options.masks
  if options.prompt:
    config.data.prompt_length = options.prompt
  if options.completion:
    _set_completion(config, options.completion, notes)
  sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
  mesh = sharding.mesh_shape(**sizes, devices=devices)
  shards = mesh[0] * mesh[1]
  if options.sequences:
    _set_sequences(config, options.sequences, shards, notes)
  total = config.rollout.prompts * config.rollout.group_size
  if options.micro_batches:
    _set_micro_batches(config, options.micro_batches, total, shards)
  elif options.sequences:
    _fit_micro_batch(config, total, shards, notes)
  # Evaluation is no part of a plan.
  config.eval.batch = -(-config.eval.batch // shards) * shards
  return config.lock(), notes


def _set_completion(config, length: int, notes) -> None:
  """Completions of another length, at as many tokens a denoising step."""
  sampler = config.sampler
  before = sampler.completion_length
  if length == before:
    return
  block = max(
    n
    for n in range(1, min(sampler.block_length, length) + 1)
    if length % n == 0
  )
  blocks = length // block
  steps = max(round(sampler.steps * length / before / blocks), 1) * blocks
  sampler.completion_length = length
  sampler.block_length, sampler.steps = block, steps
  notes.append(
    f"--completion={length}: planned with sampler.block_length={block} and "
    f"sampler.steps={steps}"
  )


def _set_sequences(config, total: int, shards: int, notes) -> None:
  """A batch of `total` sequences in whole groups, groups whole on a shard."""
  if config.objective.name == "sft":
    config.rollout.prompts = total
    return
  group = config.rollout.group_size
  possible = [
    size
    for size in range(2, total // shards + 1)
    if total % shards == 0 and total // shards % size == 0
  ]
  if not possible:
    near = max(round(total / (2 * shards)), 1) * 2 * shards
    raise ValueError(
      f"--sequences={total} leaves no group of 2 or more whole on each of the "
      f"{shards} devices that share the batch; use --sequences={near}."
    )
  size = min(possible, key=lambda size: (abs(size - group), size))
  if size != group:
    notes.append(
      f"{total} sequences on {shards} devices are no whole groups of "
      f"rollout.group_size={group}: planned with groups of {size}"
    )
  config.rollout.group_size = size
  config.rollout.prompts = total // size


def _set_micro_batches(config, count: int, total: int, shards: int) -> None:
  """`count` micro-batches of the step's sequences."""
  if total % (count * shards):
    each = total // shards
    near = min(
      (n for n in range(1, each + 1) if each % n == 0),
      key=lambda n: abs(n - count),
    )
    raise ValueError(
      f"--micro_batches={count} must divide the {each} sequences of each of the "
      f"{shards} devices that share the batch; use --micro_batches={near}."
      if each and total % shards == 0
      else f"{total} sequences must be a multiple of the {shards} devices that "
      f"share the batch; use --sequences={-(-total // shards) * shards}."
    )
  config.train.micro_batch = total // count


def _fit_micro_batch(config, total: int, shards: int, notes) -> None:
  """The micro-batch of the config, or the nearest that divides the batch."""
  wish = config.train.micro_batch
  each = total // shards
  sizes = [shards * n for n in range(1, each + 1) if each % n == 0]
  config.train.micro_batch = min(sizes, key=lambda size: abs(size - wish))
  if config.train.micro_batch != wish:
    notes.append(
      f"train.micro_batch={wish} does not divide {total} sequences on {shards} "
      f"devices: planned with {config.train.micro_batch}"
    )
