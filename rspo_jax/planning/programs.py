"""The programs of a run on a slice that is not there, and what each must do.

1. `abstract_program` makes the run's Program (run/program.py) with an abstract
   model on a mesh of the slice's device descriptions.
2. `describe` adds the abstract, sharded arguments that the loop would give to
   each jitted function, what stays in memory beside it, and by arithmetic the
   FLOPs that it cannot do without.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rspo_jax.algorithm import likelihood
from rspo_jax.devices import sharding
from rspo_jax.models import adapters, checkpoints, families, fresh, lora
from rspo_jax.planning import flops
from rspo_jax.run import loading
from rspo_jax.run import program as program_lib
from rspo_jax.run import settings as settings_lib


@dataclasses.dataclass
class Call:
  """A jitted function as a step calls it.

  Attributes:
    function: jitted.
    arguments: abstract.
    runs: how often a step calls it.
    trips: turns of the loops whose bound is computed on the device.
    uses: names of the resident trees that it is given.
    useful: FLOPs over the mesh that it cannot do without.
    temporaries: bytes of what is known to be among its temporaries.
  """

  function: Any
  arguments: tuple
  runs: int
  trips: int
  uses: tuple[str, ...] = ()
  useful: float = 0.0
  temporaries: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Described:
  """A program with all that a step calls.

  Attributes:
    program: the run's Program on the abstract mesh.
    calls: by name.
    resident: bytes of each tree that a chip keeps from step to step, such as
      "moments".
    needed: useful FLOPs of update and scores together; the policy's scores of
      two passes are the price of exactness and not in it.
  """

  program: program_lib.Program
  calls: dict[str, Call]
  resident: dict[str, float]
  needed: float

  def given(self, name: str) -> dict[str, float]:
    """Bytes of the resident trees that a call is given."""
    return {tree: self.resident[tree] for tree in self.calls[name].uses}

  def beside(self, name: str) -> float:
    """Bytes that stay in memory and are not given to a call."""
    given = self.calls[name].uses
    return sum(v for tree, v in self.resident.items() if tree not in given)


def chip_bytes(tree) -> float:
  """Bytes of a tree of abstract arrays on one chip."""
  total = 0.0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape)
    total += math.prod(shape) * leaf.dtype.itemsize
  return total


def model_config(settings: settings_lib.Settings) -> families.ModelConfig:
  """Shape of the model that a config names; reads no weights.

  Raises:
    ValueError: the config names none, or one that cannot be read.
  """
  if settings.model_folder:
    return checkpoints.load_config(settings.model_folder).config
  if settings.model.published:
    return families.PUBLISHED[settings.model.published]
  if not settings.supervised:
    raise ValueError(
      "model.path='' and model.published='' name no model to plan for; give "
      "--config.model.path=FOLDER, or --config.model.published="
      f"{next(iter(families.PUBLISHED))}."
    )
  return fresh.new_model(settings.model.new, jax.random.key(0)).config


def abstract_program(
  settings: settings_lib.Settings, config: families.ModelConfig, devices
) -> program_lib.Program:
  """The run's Program for devices that are described only."""
  mesh = sharding.make_mesh(*settings.mesh.axes, devices=devices)
  model = loading.abstract_model(settings, config, mesh)
  adapter = None
  if settings.adapter_folder:
    found = adapters.load_adapter(settings.adapter_folder, config)[0]
    boxed = jax.eval_shape(
      functools.partial(lora.boxed, config, found), jax.random.key(0)
    )
    where = sharding.shardings(mesh, boxed)
    adapter = found, jax.tree.map(_abstract, nn.meta.unbox(boxed), where)
  return program_lib.assemble(settings, model, mesh, adapter)


def check_mesh(
  settings: settings_lib.Settings, config: families.ModelConfig, devices: int
) -> None:
  """Refuses a mesh that does not divide the model.

  A tiny model may stay whole on such a mesh; one that is planned is to be
  sharded.

  Raises:
    ValueError: names the nearest setting that works.
  """
  shape = sharding.mesh_shape(*settings.mesh.axes, devices=devices)

  def check(axis, size, what, common, rest=""):
    ways = shape[sharding.AXES.index(axis)]
    if size % ways:
      common = math.gcd(common, devices)
      works = max(n for n in range(1, ways) if common % n == 0)
      raise ValueError(
        f"mesh.{axis}={ways} must divide the model's {what}; use "
        f"mesh.{axis}={works}{rest}."
      )

  heads, kv_heads = config.heads, config.kv_heads
  common, rest = math.gcd(heads, kv_heads), " and mesh.data for the rest"
  check("tensor", heads, f"{heads} query heads", common)
  check("tensor", kv_heads, f"{kv_heads} key and value heads", common)
  for axis, name in (("fsdp", "width"), ("tensor", "mlp_width")):
    size = getattr(config, name)
    check(axis, size, f"{name}={size}", size, rest)


def _abstract(x, where) -> jax.ShapeDtypeStruct:
  """What has the shape and dtype of x, in its place on the mesh."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def describe(program: program_lib.Program) -> Described:
  """What a step calls, with arguments as the loop gives them, and costs.

  Args:
    program: of an abstract model.
  """
  settings, mesh, state = program.settings, program.mesh, program.state_template
  scores = settings.scores
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def by_rows(tree):
    return jax.tree.map(lambda x: _abstract(x, rows), tree)

  key = _abstract(jax.eval_shape(lambda: jax.random.key(0)), whole)
  shape = (settings.rollout.prompts, settings.data.prompt_length)
  prompts = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    for dtype in (jnp.int32, jnp.bool_)
  ]
  policy = program.policy(state.params)
  sampled = program.for_sampling(policy)
  # One function stands for all scores of a step: the dearest.
  together = scores.before(0).together
  score_fn = program.pair_fn if together else program.estimate_fn
  completions = program.rollout_fn.shapes(sampled, *prompts, key)
  batch = by_rows(program.abstract_batch(completions))
  scored = (policy if scores.shared_base else program.reference, batch, key)
  values = by_rows(score_fn.shapes(*scored))
  values = values[0] if together else values
  resident, uses = _resident(program, sampled)
  useful, needed = _useful(program, *batch.tokens.shape)
  masks = settings.step.micro_masks or settings.likelihood.masks
  # Turns of the loop over micro-batches and parts of the masks.
  pieces = batch.tokens.shape[0] // settings.step.micro_batch
  pieces *= settings.likelihood.masks // masks
  update = (
    state,
    batch,
    settings.objective.lambda_,
    key,
    values if scores.uses_reference and not scores.inside else None,
    values if scores.two_passes else None,
    values if scores.ratio else None,
    program.frozen,
  )
  rollout = (sampled, *prompts, key)
  calls = {
    "update": Call(program.update_fn, update, scores.updates, pieces),
    "scores": Call(score_fn, scored, scores.calls, pieces),
    "rollout": Call(
      program.rollout_fn,
      rollout,
      int(not settings.supervised),
      settings.sampler.block_steps,
    ),
  }
  for name, call in calls.items():
    call.uses, call.useful = uses[name], useful[name]
  calls["update"].temporaries = _temporaries(
    program, masks * batch.tokens.shape[1], summed=pieces > 1
  )
  calls = {name: call for name, call in calls.items() if call.runs}
  return Described(program, calls, resident, needed)


def _resident(program: program_lib.Program, sampled):
  """What a chip keeps: (bytes by tree, names of the trees of each program).

  Args:
    program: of an abstract model.
    sampled: its parameters as the rollout takes them.
  """
  state = program.state_template
  moments = {"moments": chip_bytes(state.opt_state)}
  if program.lora is None:
    resident = {"weights": chip_bytes(state.params)} | moments
    resident["reference"] = chip_bytes(program.reference)
    seen, scoring = ("weights",), ("reference",)
  else:
    resident = {"frozen weights": chip_bytes(program.frozen)}
    resident |= {"adapter": chip_bytes(state.params)} | moments
    seen = scoring = ("frozen weights", "adapter")
  sampling, update = seen, (*seen, "moments")
  if program.lay_out is not None:
    # A copy of its own; under an adapter that of the base stays.
    sampling = ()
    if program.lora is not None:
      sampling = ("frozen weights for sampling",)
      resident[sampling[0]] = chip_bytes(sampled.base)
  refreshed = chip_bytes(state.reference)
  if refreshed:
    resident["refreshed reference"] = refreshed
    update += ("refreshed reference",)
  if program.settings.rollout.stale_steps:
    resident["rollout ahead"] = chip_bytes(program.ahead_template())
  return resident, {"update": update, "scores": scoring, "rollout": sampling}


def _useful(program: program_lib.Program, sequences: int, length: int):
  """FLOPs over the mesh that cannot be done without.

  Returns:
    (by program, of all updates of a step with the reference's scores).
  """
  settings, config = program.settings, program.model.config
  scores, sampler = settings.scores, settings.sampler
  canvases = sequences * scores.masks
  rows = head_rows(settings, sequences)
  forward = flops.forward_flops(config, canvases, length, rows)
  adapter = 0.0
  if program.lora is not None:
    shapes = lora.kernel_shapes(config)
    adapter = flops.adapter_flops(
      [shapes[target] for target in program.lora.targets],
      program.lora.rank,
      canvases * length,
    )
  learned = flops.useful_update(config, canvases, length, rows, adapter)
  together = scores.before(0).together
  denoised = flops.forward_flops(
    config, sequences, length, sequences * sampler.block_length
  )
  useful = {
    "update": learned + forward * scores.inside,
    "scores": 2 * forward + adapter if together else forward,
    "rollout": sampler.steps * denoised,
  }
  return useful, scores.updates * (learned + forward * scores.uses_reference)


def head_rows(settings: settings_lib.Settings, sequences: int) -> int:
  """Rows of a batch at which the head is evaluated, from the scheme."""
  scored = jax.ShapeDtypeStruct(
    (1, settings.sampler.completion_length), jnp.bool_
  )
  masks = jax.eval_shape(
    lambda key, scored: likelihood.draw_masks(
      key, settings.likelihood, scored, settings.data.prompt_length
    ),
    jax.random.key(0),
    scored,
  )
  return sequences * math.prod(masks.rows.shape)


def _temporaries(
  program: program_lib.Program, tokens: int, summed: bool
) -> dict[str, float]:
  """Bytes of what an update surely holds at a time.

  Args:
    program: of an abstract model.
    tokens: of one sequence with the masks that are differentiated together.
    summed: gradients are summed over pieces, in the wider of their dtypes.
  """
  settings, config = program.settings, program.model.config
  step, moments = settings.step, settings.optimizer.moment_dtype

  def gradient(x):
    dtype = jnp.promote_types(x.dtype, moments) if summed else x.dtype
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

  gradients = jax.tree.map(gradient, program.state_template.params)
  kept = {"gradients": chip_bytes(gradients)}
  if config.remat:
    layer = step.micro_batch // step.shards * tokens * config.width
    layer *= jnp.dtype(config.compute_dtype).itemsize
    kept["layer inputs"] = layer * config.layers
  return kept
