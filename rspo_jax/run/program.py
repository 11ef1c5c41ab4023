"""Everything a run computes with: model, data layout and compiled functions.

`build` loads the model onto the mesh and prepares the jitted functions; it
compiles nothing and reads no data. A step (`step.py`) calls them one after
another; the planner (`planner.py`) compiles them for a mesh that is not there,
with an abstract model (`loading.py`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rspo_jax import tasks
from rspo_jax.algorithm import objectives, types, update
from rspo_jax.algorithm import optimizer as optimizers
from rspo_jax.devices import sharding
from rspo_jax.models import checkpoints, families, functions, lora, transformer
from rspo_jax.reporting import transcripts
from rspo_jax.run import compiled, data, layouts, loading, rollout
from rspo_jax.run import settings as settings_lib
from rspo_jax.run.compiled import Compiled, Hook
from rspo_jax.sampling.settings import SamplerSettings

_ADAPTER = 0x6C6F7261  # fold of the run's key: the new adapter


@dataclasses.dataclass
class Program:
  """Everything a run computes with: model, data and compiled functions.

  Attributes:
    reference: parameters of the reference, as the jitted functions take them;
      on the mesh and never changed. All of them, or `lora.Adapted`.
    lora: settings of the adapter, or None.
    state_template: `TrainState` of abstract arrays.
    rollouts: a sampler's settings and a group's size -> its rollout.
    finish_fn: completes partial canvases.
    batch_fn: (completions, findings) -> the batch.
    estimate_fn: scores under given parameters.
    pair_fn: scores (policy, reference) in one pass; None where they share no
      base.
    reorder_fn: scores of a rollout in the order of its batch.
    update_fn: one update; the state is donated.
    refresh_fn: makes the policy the reference; the state is donated.
    hook: what a run does around first calls.
    lay_out, lay_out_adapter: of the parameters, for sampling.
  """

  settings: settings_lib.Settings
  mesh: jax.sharding.Mesh
  model: checkpoints.Model
  reference: Any
  lora: lora.LoraSettings | None
  state_template: types.TrainState
  optimizer: Any
  rollouts: Callable[[str, SamplerSettings, int], Compiled]
  finish_fn: Compiled
  rollout_fn: Compiled
  batch_fn: Compiled
  estimate_fn: Compiled
  pair_fn: Compiled | None
  reorder_fn: Compiled
  update_fn: Compiled
  refresh_fn: Compiled
  hook: Hook
  lay_out: layouts.Layout | None = None
  lay_out_adapter: layouts.Layout | None = None
  evaluation_fns: dict[SamplerSettings, Compiled] = dataclasses.field(
    default_factory=dict
  )

  @functools.cached_property
  def frozen(self) -> lora.Adapted | None:
    """With an adapter, what policy and reference share; else None."""
    if self.lora is None:
      return None
    return self.reference.replace(
      adapter=None, reference=self.reference.adapter
    )

  @functools.cached_property
  def _base_for_sampling(self):
    return self.lay_out(self.reference.base)

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

  def policy(self, trained, reference=None):
    """Parameters for the jitted functions out of what the state holds."""
    return joined(trained, self.frozen, reference)

  def evaluation_fn(self, sampler: SamplerSettings, name: str) -> Compiled:
    """The rollout of an evaluation, made once for the settings of a sampler."""
    if sampler not in self.evaluation_fns:
      self.evaluation_fns[sampler] = self.rollouts(name, sampler, 1)
    return self.evaluation_fns[sampler]

  def abstract_batch(self, completions) -> types.RolloutBatch:
    """The batch of abstract completions."""
    rollout_settings = self.settings.rollout
    found = rollout.before_rewards(
      rollout_settings.prompts, rollout_settings.group_size
    )
    return self.batch_fn.shapes(completions, found)

  def ahead_template(self) -> dict[str, Any]:
    """Abstract arrays of a rollout that waits for its step.

    Its completions and, for ratios, the scores of each of the step's updates
    under the parameters that sampled them.
    """
    settings = self.settings
    rows = sharding.batch_sharding(self.mesh)
    whole = sharding.replicated(self.mesh)
    prompts = (settings.rollout.prompts, settings.data.prompt_length)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = self.policy(self.state_template.params)
    completions = self.rollout_fn.shapes(
      self.for_sampling(params),
      jax.ShapeDtypeStruct(prompts, jnp.int32),
      jax.ShapeDtypeStruct(prompts, jnp.bool_),
      key,
    )
    old = []
    if settings.scores.ratio == "sampler":
      batch = self.abstract_batch(completions)
      scores = self.estimate_fn.shapes(params, batch, key)
      old = [scores] * settings.scores.updates
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=rows if x.ndim else whole
      ),
      {"completions": completions, "old": old},
    )

  @property
  def task(self):
    """The task of the run."""
    return tasks.find(self.settings.task.name, self.settings.reward)

  def prompt(self, example) -> str:
    """Text of an example's prompt as the model is given it."""
    style = self.settings.task.prompt_style
    return data.prompt_text(self.task, example, style, self.model.tokenizer)

  def user_text(self, example) -> str:
    """What of an example's prompt is the user's, before any template."""
    return self.task.prompt(example, self.settings.task.prompt_style)

  def prompts(self, examples) -> data.Prompts:
    """The prompts of examples, tokenised when they are met."""
    return data.Prompts(
      examples,
      self.prompt,
      self.model.tokenizer.encode,
      self.settings.data.prompt_length,
      self.model.config.pad_id,
      self.settings.data.long_prompts,
      self.user_text,
    )

  def judge(self, examples, texts) -> rollout.Judged:
    """Verdicts under the run's protocol and reward weights."""
    task = self.settings.task
    return rollout.judge(
      self.task, examples, texts, task.protocol, task.reward_weights or None
    )

  def to_text(self, tokens, mask) -> list[str]:
    """Texts of completions up to their first EOS."""
    return rollout.to_text(self.model.tokenizer, tokens, mask)

  @functools.cached_property
  def pieces(self) -> transcripts.Pieces:
    """Text of single tokens."""
    return transcripts.Pieces(self.model.tokenizer)

  def compilations(self) -> dict[str, int]:
    """How often each of the functions was compiled so far, by name."""
    functions = [*vars(self).values(), *self.evaluation_fns.values()]
    return {
      each.name: each.compilations
      for each in functions
      if isinstance(each, Compiled)
    }


def joined(trained, frozen, reference=None):
  """What is trained and what is frozen, as the jitted functions take them.

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


def build(settings: settings_lib.Settings) -> Program:
  """Loads the model and prepares the jitted functions; compiles nothing."""
  mesh = sharding.make_mesh(*settings.mesh.axes)
  model = loading.load_model(settings, mesh)
  adapter = None
  if settings.adapter_folder:
    adapter = loading.load_adapter(settings, model, mesh)
  return assemble(settings, model, mesh, adapter)


def assemble(
  settings: settings_lib.Settings,
  model: checkpoints.Model,
  mesh,
  adapter: tuple[lora.LoraSettings, Any] | None = None,
) -> Program:
  """Prepares the jitted functions of a loaded or an abstract model.

  Args:
    settings: the run.
    model: its parameters on the mesh, or `loading.abstract_model`.
    mesh: of devices, or of a topology's descriptions of them.
    adapter: the adapter that a run starts from, with its settings; None: what
      `settings.adapter` says, or none at all.
  """
  lora_settings, start = adapter or (settings.adapter, None)
  reference = model.params
  if lora_settings is not None:
    # The reference is the base with the adapter that the run began with.
    reference = lora.Adapted(model.params, start, None, lora_settings.scale)
  optimizer = optimizers.make_optimizer(settings.optimizer)
  places, template = _state_template(
    settings, model.config, mesh, lora_settings, optimizer
  )
  maker = _Maker(settings, model.config, mesh)
  return Program(
    settings=settings,
    mesh=mesh,
    model=model,
    reference=reference,
    lora=lora_settings,
    state_template=template,
    optimizer=optimizer,
    hook=maker.hook,
    **maker.sampling(),
    **maker.scoring(),
    **maker.updating(optimizer, places),
    **layouts.layouts(settings, model.config, mesh, lora_settings),
  )


def _state_template(settings, config, mesh, lora_settings, optimizer):
  """(shardings of the state, the state of abstract arrays)."""

  def fresh(key):
    if lora_settings is not None:
      trained = lora.boxed(config, lora_settings, key)
    else:
      trained = loading.stored(
        settings, transformer.init(config, key, boxed=True)
      )
    return types.init_state(
      trained, optimizer, settings.objective.reference_every
    )

  boxed = jax.eval_shape(fresh, jax.random.key(0))
  places = sharding.shardings(mesh, boxed)
  return places, loading.placed(nn.meta.unbox(boxed), places)


@dataclasses.dataclass
class _Maker:
  """Makes the jitted functions of a program."""

  settings: settings_lib.Settings
  config: families.ModelConfig
  mesh: jax.sharding.Mesh
  hook: Hook = dataclasses.field(default_factory=Hook)

  def compiled(self, name: str, fn, places, donate=()) -> Compiled:
    """A function, jitted, whose results lie where they should."""
    jitted = jax.jit(
      fn,
      out_shardings=places,
      donate_argnums=donate,
      compiler_options=compiled.compiler_options(self.mesh),
    )
    return Compiled(name, jitted, self.mesh, self.hook)

  def sampling(self) -> dict[str, Any]:
    """Functions that make completions."""
    settings, config = self.settings, self.config
    rollout_mesh = sharding.rollout_mesh(
      self.mesh, settings.mesh.rollout_tensor
    )
    denoise_fn = _of_weights(functions.make_denoise_fn(config, rollout_mesh))
    rows = sharding.batch_sharding(self.mesh)
    whole = sharding.replicated(self.mesh)
    places = rollout.Completions(rows, rows, rows, rows, whole, whole)
    ids = (config.mask_id, config.eos_id)

    def rollouts(name, sampler, group_size):
      fn = rollout.make_rollout(denoise_fn, sampler, group_size, *ids)
      return self.compiled(name, fn, places)

    finish = rollout.make_finish(denoise_fn, settings.sampler, *ids)
    return {
      "rollouts": rollouts,
      "rollout_fn": rollouts(
        "rollout", settings.sampler, settings.rollout.group_size
      ),
      "finish_fn": self.compiled("finishing", finish, places),
    }

  def scoring(self) -> dict[str, Any]:
    """Functions that make batches and score them."""
    settings = self.settings
    rows = sharding.batch_sharding(self.mesh)
    batch = functools.partial(
      rollout.make_batch,
      scope=settings.likelihood.scope,
      with_trace=settings.likelihood.needs_trace,
    )

    def estimate(name, dual):
      fn = update.make_estimate(
        self.logprob_fn(dual),
        self.config.mask_id,
        settings.step,
        settings.likelihood,
        objectives.OBJECTIVES[settings.objective.name].per_token,
      )
      return self.compiled(name, fn, rows)

    return {
      "batch_fn": self.compiled("batch", batch, rows),
      "estimate_fn": estimate("scores", False),
      "pair_fn": estimate("scores of both", True)
      if settings.scores.shared_base
      else None,
      "reorder_fn": self.compiled(
        "order of scores", update.make_reorder(settings.step), rows
      ),
    }

  def updating(self, optimizer, places) -> dict[str, Any]:
    """Functions that change the state; `places` are its shardings."""
    settings = self.settings
    rows = sharding.batch_sharding(self.mesh)
    whole = sharding.replicated(self.mesh)
    fn = update.make_update(
      self.logprob_fn(),
      self.config.mask_id,
      optimizer,
      optimizers.schedule(settings.optimizer),
      settings.step,
      settings.likelihood,
      settings.objective,
      settings.scores,
      joined,
      self.logprob_fn(dual=True),
      settings.optimizer.moment_dtype,
    )
    refresh = types.refresh_reference
    return {
      "update_fn": self.compiled("update", fn, (places, whole, rows), 0),
      "refresh_fn": self.compiled("refreshing", refresh, places, 0),
    }

  def logprob_fn(self, dual: bool = False):
    """What scores rows, of the policy or, `dual`, of both streams."""
    fn = functions.make_logprob_fn(self.config, self.mesh, dual=dual)
    return _of_weights(fn)


def _of_weights(fn):
  """A model's function that takes parameters as a program has them."""

  def of_params(params, *arguments):
    return fn(lora.weights(params), *arguments)

  return of_params


def fresh_state(program: Program) -> types.TrainState:
  """Step 0: what is trained, copied (donated later), and empty moments."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state_template)

  def state_of(trained):
    return types.init_state(
      trained, program.optimizer, program.settings.objective.reference_every
    )

  start = program.reference
  if program.lora is not None:
    start = program.reference.adapter
  if start is None:
    key = jax.random.key(program.settings.run.seed)
    fresh = jax.jit(
      lambda key: state_of(lora.init(program.model.config, program.lora, key)),
      out_shardings=shardings,
    )
    return fresh(jax.random.fold_in(key, _ADAPTER))
  copied = jax.jit(
    lambda trained: state_of(jax.tree.map(jnp.copy, trained)),
    out_shardings=shardings,
  )
  return copied(start)


def merged(program: Program, trained) -> checkpoints.Model:
  """The trained model with all its weights, for export.

  An adapter is added to the base in float32 and rounded to the base's dtype,
  or with lora.merge_dtype=float32 to none.
  """
  if program.lora is not None:
    scale = program.lora.scale
    exact = program.settings.lora.merge_dtype == "float32"

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
