"""Everything a run computes with: model, data layout and compiled functions.

`build` loads the model onto the mesh and prepares the jitted functions; it
compiles nothing and reads no data. The loop (`train.py`) calls them one after
another; the planner (`planner.py`) compiles them for a mesh that is not there,
with an `abstract_model`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rspo_jax import (
  data,
  objectives,
  rollout,
  sharding,
  tasks,
  traces,
  train_step,
)
from rspo_jax import settings as settings_lib
from rspo_jax.models import families, fresh, hf_weights, transformer


@dataclasses.dataclass
class Program:
  """Everything a run computes with: model, data and compiled functions.

  `params` are the initial parameters on the mesh; they stay untouched and
  serve as the frozen reference.
  """

  settings: settings_lib.Settings
  mesh: jax.sharding.Mesh
  model: hf_weights.Model
  params: Any
  state_template: Any
  optimizer: Any
  learning_rate: Any
  rollout_fn: Any
  greedy_fn: Any
  sampled_fn: Any
  estimate_fn: Any
  update_fn: Any
  refresh_fn: Any
  present_fn: Any
  sampling: Any  # (SamplerSettings, group size) -> a jitted rollout

  @property
  def task(self):
    """The task of the run."""
    task = self.settings.task
    return tasks.find(task["name"], task["reward"])

  def prompt(self, example) -> str:
    """Text of an example's prompt as the model is given it."""
    style = self.settings.task["prompt_style"]
    return data.prompt_text(self.task, example, style, self.model.tokenizer)

  def judge(self, examples, texts) -> rollout.Judged:
    """Verdicts under the run's protocol and reward weights."""
    task = self.settings.task
    return rollout.judge(
      self.task, examples, texts, task["protocol"], task["weights"]
    )

  def to_text(self, tokens, mask) -> list[str]:
    """Texts of completions up to their first EOS."""
    return rollout.to_text(self.model.tokenizer, tokens, mask)

  @functools.cached_property
  def pieces(self) -> traces.Pieces:
    """Text of single tokens."""
    return traces.Pieces(self.model.tokenizer)

  def compiled_programs(self) -> dict[str, int]:
    """Number of compilations of each jitted function so far."""
    names = ("rollout_fn", "greedy_fn", "sampled_fn", "estimate_fn")
    names += ("update_fn", "present_fn")
    return {name: getattr(self, name)._cache_size() for name in names}


def _shardings(mesh, config):
  """Where the parameters of a model live."""
  boxed = jax.eval_shape(
    functools.partial(transformer.init, config, boxed=True), jax.random.key(0)
  )
  return sharding.shardings(mesh, boxed)


def _stored(settings: settings_lib.Settings, params):
  """Parameters in the dtype that they are stored in."""
  dtype = settings.model["param_dtype"]
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def model_config(
  settings: settings_lib.Settings, config: families.ModelConfig, mesh
) -> families.ModelConfig:
  """A checkpoint's shape with the run's compute settings.

  Raises:
    ValueError: the run's sequences are longer than the checkpoint was made for.
  """
  dtype = settings.model["compute_dtype"]
  if dtype == "auto":
    # Of the devices that compute, which need not be at hand (planner.py).
    platform = mesh.devices.flat[0].platform
    dtype = "float32" if platform == "cpu" else "bfloat16"
  longest = settings.prompt_length + max(
    settings.sampler.completion_length,
    *(each.greedy.completion_length for each in settings.evaluations),
  )
  if longest > config.max_length:
    raise ValueError(
      f"data.prompt_length={settings.prompt_length} and the completion length "
      f"make {longest} tokens, but the checkpoint was made for "
      f"{config.max_length}; shorten one of them."
    )
  return dataclasses.replace(
    config,
    compute_dtype=dtype,
    attention=settings.model["attention"],
    remat=settings.model["remat"],
    head_chunks=settings.model["head_chunks"],
  )


def _load(settings: settings_lib.Settings, mesh) -> hf_weights.Model:
  """The run's model with parameters on the mesh, compute settings applied."""
  model_settings = settings.model
  if model_settings["folder"]:
    # Each parameter goes straight to its place: whole, a large model would fit
    # on no single device.
    model = hf_weights.load_model(
      model_settings["folder"],
      model_settings["param_dtype"],
      functools.partial(_shardings, mesh),
    )
  else:
    key = jax.random.fold_in(jax.random.key(settings.run.seed), 0x696E6974)
    try:
      model = fresh.new_model(model_settings["new"], key)
    except ValueError as error:
      raise ValueError(f"model.new: {error}") from error
  if model.tokenizer is None:
    raise ValueError(
      f"model.path={model_settings['path']!r} has no tokenizer.json, so its "
      "completions cannot be read; put the model's tokenizer files beside it."
    )
  config = model_config(settings, model.config, mesh)
  params = model.params
  if not model_settings["folder"]:
    params = _stored(settings, params)
    params = jax.device_put(params, _shardings(mesh, config))
  return dataclasses.replace(model, config=config, params=params)


def abstract_model(
  settings: settings_lib.Settings, config: families.ModelConfig, mesh
) -> hf_weights.Model:
  """A model of shapes, dtypes and places alone, as `assemble` takes it."""
  config = model_config(settings, config, mesh)
  shapes = jax.eval_shape(
    lambda key: _stored(settings, transformer.init(config, key)),
    jax.random.key(0),
  )
  return hf_weights.Model(
    config=config, params=_placed(shapes, _shardings(mesh, config))
  )


def _placed(shapes, shardings):
  """Abstract arrays with the shardings that belong to them."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    shapes,
    shardings,
  )


def build(settings: settings_lib.Settings) -> Program:
  """Loads the model and prepares the jitted functions; compiles nothing."""
  mesh = sharding.make_mesh(**settings.mesh)
  return assemble(settings, _load(settings, mesh), mesh)


def assemble(
  settings: settings_lib.Settings, model: hf_weights.Model, mesh
) -> Program:
  """Prepares the jitted functions of a loaded or an abstract model.

  Args:
    settings: the run.
    model: its parameters on the mesh, or `abstract_model`.
    mesh: of devices, or of a topology's descriptions of them.
  """
  config = model.config
  optimizer = train_step.make_optimizer(settings.optimizer)
  learning_rate = train_step.schedule(settings.optimizer)

  def fresh_state(key):
    params = _stored(settings, transformer.init(config, key, boxed=True))
    return train_step.init_state(params, optimizer, settings.reference_every)

  boxed = jax.eval_shape(fresh_state, jax.random.key(0))
  state_shardings = sharding.shardings(mesh, boxed)
  template = _placed(nn.meta.unbox(boxed), state_shardings)
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  logprob_fn = transformer.make_logprob_fn(config)
  denoise_fn = transformer.make_denoise_fn(config)
  completions = rollout.Completions(rows, rows, rows, rows, whole, whole)

  def sampling(settings_of_sampler, group_size):
    return jax.jit(
      rollout.make_rollout(
        denoise_fn,
        settings_of_sampler,
        group_size,
        config.mask_id,
        config.eos_id,
      ),
      out_shardings=completions,
    )

  step = (settings.step, settings.likelihood)
  objective = objectives.OBJECTIVES[settings.objective.name]
  return Program(
    settings=settings,
    mesh=mesh,
    model=model,
    params=model.params,
    state_template=template,
    optimizer=optimizer,
    learning_rate=learning_rate,
    rollout_fn=sampling(settings.sampler, settings.rollout.group_size),
    greedy_fn=sampling(settings.greedy, 1),
    sampled_fn=sampling(settings.sampled, 1),
    estimate_fn=jax.jit(
      train_step.make_estimate(
        logprob_fn, config.mask_id, *step, objective.per_token
      ),
      out_shardings=rows,
    ),
    update_fn=jax.jit(
      train_step.make_update(
        logprob_fn,
        config.mask_id,
        optimizer,
        learning_rate,
        *step,
        settings.objective,
      ),
      donate_argnums=0,
      out_shardings=(state_shardings, whole),
    ),
    refresh_fn=jax.jit(
      train_step.refresh_reference,
      donate_argnums=0,
      out_shardings=state_shardings,
    ),
    present_fn=jax.jit(
      functools.partial(
        rollout.present,
        scope=settings.likelihood.scope,
        with_trace=settings.likelihood.needs_trace,
      ),
      out_shardings=rows,
    ),
    sampling=sampling,
  )


def fresh_state(program: Program):
  """Step 0: a copy of the parameters (donated later) and empty moments."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state_template)
  start = jax.jit(
    lambda params: train_step.init_state(
      jax.tree.map(jnp.copy, params),
      program.optimizer,
      program.settings.reference_every,
    ),
    out_shardings=shardings,
  )
  return start(program.params)
