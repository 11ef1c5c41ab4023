"""The run's model on the mesh, with its compute settings; or its shapes alone."""

import dataclasses
import functools

import jax

from rspo_jax.devices import sharding
from rspo_jax.models import (
  adapters,
  attention,
  checkpoints,
  families,
  fresh,
  lora,
  transformer,
)
from rspo_jax.run import settings as settings_lib


def model_config(
  settings: settings_lib.Settings, config: families.ModelConfig, mesh
) -> families.ModelConfig:
  """A checkpoint's shape with the run's compute settings.

  Raises:
    ValueError: the run's sequences are longer than the checkpoint was made
      for; heads that flash attention cannot take.
  """
  dtype = settings.model.compute_dtype
  if dtype == "auto":
    # Of the devices that compute, which need not be at hand (planner.py).
    platform = mesh.devices.flat[0].platform
    dtype = "float32" if platform == "cpu" else "bfloat16"
  longest = settings.data.prompt_length + max(
    settings.sampler.completion_length,
    *(each.greedy.completion_length for each in settings.evaluations),
  )
  if longest > config.max_length:
    raise ValueError(
      f"data.prompt_length={settings.data.prompt_length} and the completion length "
      f"make {longest} tokens, but the checkpoint was made for "
      f"{config.max_length}; shorten one of them."
    )
  if settings.model.attention == "flash":
    attention.check(config.head_dim, mesh)
  return dataclasses.replace(
    config,
    compute_dtype=dtype,
    attention=settings.model.attention,
    remat=settings.model.remat,
    head_chunks=settings.model.head_chunks,
  )


def load_model(settings: settings_lib.Settings, mesh) -> checkpoints.Model:
  """The run's model with parameters on the mesh, compute settings applied."""
  if settings.model_folder:
    # Each parameter goes straight to its place: whole, a large model would fit
    # on no single device.
    model = checkpoints.load_model(
      settings.model_folder,
      settings.model.param_dtype,
      functools.partial(shardings, mesh),
    )
  else:
    key = jax.random.fold_in(jax.random.key(settings.run.seed), 0x696E6974)
    try:
      model = fresh.new_model(settings.model.new, key)
    except ValueError as error:
      raise ValueError(f"model.new: {error}") from error
  if model.tokenizer is None:
    raise ValueError(
      f"model.path={settings.model.path!r} has no tokenizer.json, so its "
      "completions cannot be read; put the model's tokenizer files beside it."
    )
  config = model_config(settings, model.config, mesh)
  params = model.params
  if not settings.model_folder:
    params = stored(settings, params)
    params = jax.device_put(params, shardings(mesh, config))
  return dataclasses.replace(model, config=config, params=params)


def load_adapter(settings, model, mesh):
  """(LoraSettings, adapter on the mesh) of the folder that a run starts from.

  Raises:
    ValueError: the folder is of another rank than was asked for.
  """
  path, asked = settings.adapter_folder, settings.adapter
  found, adapter, _ = adapters.load_adapter(path, model.config)
  if asked is not None and asked.rank != found.rank:
    raise ValueError(
      f"lora.rank={asked.rank} is not that of lora.path={path!r}, which is "
      f"{found.rank}; use lora.rank=0 to take everything from the folder."
    )
  boxed = jax.eval_shape(
    functools.partial(lora.boxed, model.config, found), jax.random.key(0)
  )
  return found, jax.device_put(adapter, sharding.shardings(mesh, boxed))


def abstract_model(
  settings: settings_lib.Settings, config: families.ModelConfig, mesh
) -> checkpoints.Model:
  """A model of shapes, dtypes and places alone, as `assemble` takes it."""
  config = model_config(settings, config, mesh)
  shapes = jax.eval_shape(
    lambda key: stored(settings, transformer.init(config, key)),
    jax.random.key(0),
  )
  return checkpoints.Model(
    config=config, params=placed(shapes, shardings(mesh, config))
  )


def shardings(mesh, config):
  """Where the parameters of a model live."""
  boxed = jax.eval_shape(
    functools.partial(transformer.init, config, boxed=True), jax.random.key(0)
  )
  return sharding.shardings(mesh, boxed)


def stored(settings: settings_lib.Settings, params):
  """Parameters in the dtype that they are stored in."""
  dtype = settings.model.param_dtype
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def placed(shapes, shardings):
  """Abstract arrays with the shardings that belong to them."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    shapes,
    shardings,
  )
