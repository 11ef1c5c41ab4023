"""Everything a run computes with: model, data layout and compiled functions.

`build` loads the model onto the mesh and prepares the jitted functions; it
compiles nothing and reads no data. A run (`runs.py`) calls them one after
another; the planner (`planner.py`) compiles them for a mesh that is not there,
with an `abstract_model`.
"""

import dataclasses
import functools
import math
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
from rspo_jax.models import (
  attention,
  families,
  fresh,
  hf_adapters,
  hf_weights,
  lora,
  transformer,
)

_ADAPTER = 0x6C6F7261  # fold of the run's key: the new adapter


@dataclasses.dataclass(frozen=True)
class Layout:
  """Brings arrays where they are wanted, abstract ones too.

  Attributes:
    shardings: where, leaf by leaf.
    fn: jitted, tree -> tree.
  """

  shardings: Any
  fn: Any

  def __call__(self, tree):
    """The tree in its new places."""
    if isinstance(jax.tree.leaves(tree)[0], jax.ShapeDtypeStruct):
      return _placed(tree, self.shardings)
    return self.fn(tree)


@dataclasses.dataclass
class Program:
  """Everything a run computes with: model, data and compiled functions.

  Attributes:
    params: the reference, as the jitted functions take parameters; on the mesh
      and never changed. All of them, or `lora.Adapted`.
    frozen: with an adapter, what policy and reference share (`lora.Adapted`
      without the policy's adapter); None where all parameters are trained.
    lora: settings of the adapter, or None.
    pair_fn: scores (policy, reference) in one pass; None where the reference
      is scored by `estimate_fn`.
    The other names ending in _fn: jitted functions of the loop.
  """

  settings: settings_lib.Settings
  mesh: jax.sharding.Mesh
  model: hf_weights.Model
  params: Any
  frozen: Any
  lora: lora.LoraSettings | None
  state_template: Any
  optimizer: Any
  learning_rate: Any
  rollout_fn: Any
  finish_fn: Any
  greedy_fn: Any
  sampled_fn: Any
  estimate_fn: Any
  pair_fn: Any
  update_fn: Any
  refresh_fn: Any
  present_fn: Any
  reorder_fn: Any
  sampling: Any  # (SamplerSettings, group size) -> a jitted rollout
  lay_out: "Layout | None" = None  # of the parameters, for sampling
  lay_out_adapter: "Layout | None" = None

  @functools.cached_property
  def _base_for_sampling(self):
    return self.lay_out(self.params.base)

  def for_sampling(self, params):
    """Parameters as the functions that sample take them.

    With `mesh.rollout_tensor` they are laid out anew: all of them or, on a
    frozen base, the adapter; the base once, and that copy stays.
    """
    if self.lay_out is None:
      return params
    if not isinstance(params, lora.Adapted):
      return self.lay_out(params)
    adapter = params.adapter
    if adapter is not None:
      adapter = self.lay_out_adapter(adapter)
    # Sampling knows one stream, the policy's.
    return lora.Adapted(self._base_for_sampling, adapter, None, params.scale)

  def ahead_template(self) -> dict[str, Any]:
    """Abstract arrays of a rollout that waits for its step.

    Its completions and, for ratios, the values of each of the step's updates
    under the parameters that sampled them.
    """
    settings = self.settings
    rows = sharding.batch_sharding(self.mesh)
    whole = sharding.replicated(self.mesh)
    prompts = (settings.rollout.prompts, settings.prompt_length)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = self.policy(self.state_template.params)
    old = []
    with self.mesh, nn.logical_axis_rules(sharding.RULES):
      completions = jax.eval_shape(
        self.rollout_fn,
        self.for_sampling(params),
        jax.ShapeDtypeStruct(prompts, jnp.int32),
        jax.ShapeDtypeStruct(prompts, jnp.bool_),
        key,
      )
      if objectives.OBJECTIVES[settings.objective.name].ratio:
        batch = jax.eval_shape(self.present_fn, completions)
        values = jax.eval_shape(self.estimate_fn, params, batch, key)
        old = [values] * settings.step.updates_per_rollout
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=rows if x.ndim else whole
      ),
      {"completions": completions, "old": old},
    )

  def policy(self, trained):
    """Parameters for the jitted functions out of what the state holds."""
    return policy(trained, self.frozen)

  @property
  def task(self):
    """The task of the run."""
    task = self.settings.task
    return tasks.find(task["name"], task["reward"])

  def prompt(self, example) -> str:
    """Text of an example's prompt as the model is given it."""
    style = self.settings.task["prompt_style"]
    return data.prompt_text(self.task, example, style, self.model.tokenizer)

  def user_text(self, example) -> str:
    """What of an example's prompt is the user's, before any template."""
    return self.task.prompt(example, self.settings.task["prompt_style"])

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
    names += ("pair_fn", "update_fn", "present_fn")
    functions = {name: getattr(self, name) for name in names}
    return {n: fn._cache_size() for n, fn in functions.items() if fn}


def policy(trained, frozen, reference=None):
  """Parameters as the jitted functions take them.

  Args:
    trained: what the state holds, all parameters or an adapter.
    frozen: `Program.frozen`.
    reference: the state's own, where it is refreshed.
  """
  if frozen is None:
    return trained
  if reference is not None:
    frozen = frozen.replace(reference=reference)
  return frozen.replace(adapter=trained)


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
    ValueError: the run's sequences are longer than the checkpoint was made
      for; heads that flash attention cannot take.
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
  if settings.model["attention"] == "flash":
    attention.check(config.head_dim, mesh)
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
  model = _load(settings, mesh)
  adapter = None
  if settings.lora["path"]:
    adapter = _load_adapter(settings, model, mesh)
  return assemble(settings, model, mesh, adapter)


def _load_adapter(settings, model, mesh):
  """(LoraSettings, adapter on the mesh) of the folder that a run starts from.

  Raises:
    ValueError: the folder is of another rank than was asked for.
  """
  path, asked = settings.lora["path"], settings.lora["settings"]
  found, adapter, _ = hf_adapters.load_adapter(path, model.config)
  if asked is not None and asked.rank != found.rank:
    raise ValueError(
      f"lora.rank={asked.rank} is not that of lora.path={path!r}, which is "
      f"{found.rank}; use lora.rank=0 to take everything from the folder."
    )
  boxed = jax.eval_shape(
    functools.partial(lora.boxed, model.config, found), jax.random.key(0)
  )
  return found, jax.device_put(adapter, sharding.shardings(mesh, boxed))


def assemble(
  settings: settings_lib.Settings,
  model: hf_weights.Model,
  mesh,
  adapter: tuple[lora.LoraSettings, Any] | None = None,
) -> Program:
  """Prepares the jitted functions of a loaded or an abstract model.

  Args:
    settings: the run.
    model: its parameters on the mesh, or `abstract_model`.
    mesh: of devices, or of a topology's descriptions of them.
    adapter: the adapter that a run starts from, with its settings; None: what
      `settings.lora` says, or none at all.
  """
  config = model.config
  optimizer = train_step.make_optimizer(settings.optimizer)
  learning_rate = train_step.schedule(settings.optimizer)
  lora_settings, start = adapter or (settings.lora["settings"], None)
  params, frozen = model.params, None
  if lora_settings is not None:
    # The reference is the base with the adapter that the run began with.
    frozen = lora.Adapted(model.params, None, start, lora_settings.scale)
    params = lora.Adapted(model.params, start, None, lora_settings.scale)

  def fresh_state(key):
    if lora_settings is not None:
      trained = lora.boxed(config, lora_settings, key)
    else:
      trained = _stored(settings, transformer.init(config, key, boxed=True))
    return train_step.init_state(trained, optimizer, settings.reference_every)

  boxed = jax.eval_shape(fresh_state, jax.random.key(0))
  state_shardings = sharding.shardings(mesh, boxed)
  template = _placed(nn.meta.unbox(boxed), state_shardings)
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  jit = functools.partial(jax.jit, compiler_options=compiler_options(mesh))
  score_fn = transformer.make_logprob_fn(config, mesh)
  both_fn = transformer.make_logprob_fn(config, mesh, dual=True)
  rollout_mesh = sharding.rollout_mesh(mesh, settings.rollout_tensor)
  raw_denoise_fn = transformer.make_denoise_fn(config, rollout_mesh)

  def logprob_fn(params, *arguments):
    return score_fn(lora.weights(params), *arguments)

  def both_logprob_fn(params, *arguments):
    return both_fn(lora.weights(params), *arguments)

  def denoise_fn(params, *arguments):
    return raw_denoise_fn(lora.weights(params), *arguments)

  completions = rollout.Completions(rows, rows, rows, rows, whole, whole)

  def sampling(settings_of_sampler, group_size):
    return jit(
      rollout.make_rollout(
        denoise_fn,
        settings_of_sampler,
        group_size,
        config.mask_id,
        config.eos_id,
      ),
      out_shardings=completions,
    )

  def layout(before, after):
    moved = functools.partial(_laid_out, rollout_mesh, before)
    return Layout(after, jit(moved, out_shardings=after))

  lay_out = lay_out_adapter = None
  if rollout_mesh is not mesh:
    _check_heads(config, settings.rollout_tensor)
    lay_out = layout(_shardings(mesh, config), _shardings(rollout_mesh, config))
    if lora_settings is not None:
      boxed_adapter = jax.eval_shape(
        functools.partial(lora.boxed, config, lora_settings),
        jax.random.key(0),
      )
      lay_out_adapter = layout(
        sharding.shardings(mesh, boxed_adapter),
        sharding.shardings(rollout_mesh, boxed_adapter),
      )

  step = (settings.step, settings.likelihood)
  objective = objectives.OBJECTIVES[settings.objective.name]
  uses_reference = objective.uses_reference(settings.objective)
  dual = frozen is not None and settings.lora["dual"] and uses_reference
  return Program(
    settings=settings,
    mesh=mesh,
    model=model,
    params=params,
    frozen=frozen,
    lora=lora_settings,
    state_template=template,
    optimizer=optimizer,
    learning_rate=learning_rate,
    finish_fn=jit(
      rollout.make_finish(
        denoise_fn, settings.sampler, config.mask_id, config.eos_id
      ),
      out_shardings=completions,
    ),
    rollout_fn=sampling(settings.sampler, settings.rollout.group_size),
    greedy_fn=sampling(settings.greedy, 1),
    sampled_fn=sampling(settings.sampled, 1),
    estimate_fn=jit(
      train_step.make_estimate(
        logprob_fn, config.mask_id, *step, objective.per_token
      ),
      out_shardings=rows,
    ),
    pair_fn=jit(
      train_step.make_estimate(
        both_logprob_fn, config.mask_id, *step, objective.per_token
      ),
      out_shardings=rows,
    )
    if dual
    else None,
    update_fn=jit(
      train_step.make_update(
        logprob_fn,
        config.mask_id,
        optimizer,
        learning_rate,
        *step,
        settings.objective,
        policy,
        both_logprob_fn if dual else None,
        settings.optimizer.moment_dtype,
      ),
      donate_argnums=0,
      out_shardings=(state_shardings, whole),
    ),
    refresh_fn=jit(
      train_step.refresh_reference,
      donate_argnums=0,
      out_shardings=state_shardings,
    ),
    present_fn=jit(
      functools.partial(
        rollout.present,
        scope=settings.likelihood.scope,
        with_trace=settings.likelihood.needs_trace,
      ),
      out_shardings=rows,
    ),
    reorder_fn=jit(train_step.make_reorder(settings.step), out_shardings=rows),
    sampling=sampling,
    lay_out=lay_out,
    lay_out_adapter=lay_out_adapter,
  )


def _laid_out(mesh, shardings, tree):
  """The tree on its way from training's shardings to those of `mesh`."""

  def moved(leaf, where):
    for stop in sharding.waypoints(mesh, where, leaf.shape):
      leaf = jax.lax.with_sharding_constraint(leaf, stop)
    return leaf

  return jax.tree.map(moved, tree, shardings)


def _check_heads(config: families.ModelConfig, tensor: int) -> None:
  """Refuses to split what does not divide, which would stay whole unasked."""
  if config.kv_heads % tensor:
    raise ValueError(
      f"mesh.rollout_tensor={tensor} must divide the {config.kv_heads} heads "
      f"of keys and values; use {math.gcd(tensor, config.kv_heads)}."
    )


def compiler_options(mesh) -> dict[str, str]:
  """What the compiler of the mesh's devices is told.

  On TPUs it would split the products with gathered weights into pieces that
  travel while they are multiplied; with the split on the contracting axis each
  piece adds to a partial sum, and the modelled step is a third longer.
  """
  if mesh.devices.flat[0].platform != "tpu":
    return {}
  return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def fresh_state(program: Program):
  """Step 0: what is trained, copied (donated later), and empty moments."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state_template)

  def state_of(trained):
    return train_step.init_state(
      trained, program.optimizer, program.settings.reference_every
    )

  if program.lora is not None and program.params.adapter is None:
    key = jax.random.key(program.settings.run.seed)
    start = jax.jit(
      lambda key: state_of(lora.init(program.model.config, program.lora, key)),
      out_shardings=shardings,
    )
    return start(jax.random.fold_in(key, _ADAPTER))
  trained = program.params if program.lora is None else program.params.adapter
  start = jax.jit(
    lambda trained: state_of(jax.tree.map(jnp.copy, trained)),
    out_shardings=shardings,
  )
  return start(trained)


def merged(program: Program, trained) -> hf_weights.Model:
  """The trained model with all its weights, for export.

  An adapter is added to the base in float32 and rounded to the base's dtype,
  or with lora.merge_dtype=float32 to none.
  """
  if program.lora is not None:
    scale = program.lora.scale
    exact = program.settings.lora["merge_dtype"] == "float32"

    def merge(base, adapter):
      if exact:
        base = jax.tree.map(lambda x: x.astype(jnp.float32), base)
      return lora.merge(base, adapter, scale)

    trained = jax.jit(
      merge,
      out_shardings=jax.tree.map(lambda x: x.sharding, program.model.params),
    )(program.frozen.base, trained)
  return dataclasses.replace(program.model, params=trained)


@jax.jit
def is_finite(state) -> jax.Array:
  """bool []: whether every number of a state is finite."""
  leaves = [
    x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in leaves]))
