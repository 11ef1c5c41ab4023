"""Checkpoints in the Hugging Face layout: read into params, written back.

Reading, in order:

1. config.json becomes a `ModelConfig` (`families.from_hf`), the tokenizer's
   files a `Tokenizer`.
2. One table per family pairs checkpoint names with parameter paths; with the
   shapes of `transformer.init` it says which tensors a checkpoint must hold.
   All headers are compared with that before a single weight is read, so that
   a checkpoint is loaded whole or not at all.
3. One stacked parameter at a time: its layers are read and cast into one host
   buffer, which is transposed from torch's [out, in] to [in, out] on its way
   to the devices, before the next one is begun. The host holds the checkpoint
   and one parameter, never two copies.

Writing goes the same way back under the same names, so that a checkpoint read
and saved in its own dtype is the same bit for bit.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from rspo_jax.models import (
  families,
  model_folder,
  safetensors_files,
  transformer,
)
from rspo_jax.models.families import (
  CheckpointError,
  ModelConfig,
  UnsupportedConfig,
)
from rspo_jax.models.safetensors_files import INDEX, MissingTensor, Stored
from rspo_jax.models.tokenizer import Tokenizer
from rspo_jax.storage import files

SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9  # the hub's own limit for one file

# Small files that other programs want beside the weights: some by name, and
# the code of the original model.
_COMPANIONS = re.compile(
  r"generation_config\.json"
  r"|(?:modeling|configuration|tokenization|generation)_.*\.py"
)

# Tokens whose ids a config.json or a tokenizer names.
_ROLES = ("mask", "eos", "pad")


class UnexpectedTensor(CheckpointError):
  """A file holds a tensor that the config has no place for."""


class WrongShape(CheckpointError):
  """A tensor has another shape than the config says."""


@dataclasses.dataclass(frozen=True)
class Model:
  """A loaded checkpoint.

  Attributes:
    config: shape and behaviour.
    params: the parameter tree of `transformer`, layers stacked.
    tokenizer: None if the folder has none.
    source_config: config.json as read, for writing back.
    source_files: other small files of the folder, written back unchanged.
  """

  config: ModelConfig
  params: Any
  tokenizer: Tokenizer | None = None
  source_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  source_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter and the checkpoint tensors that it is made of.

  Attributes:
    path: keys in the parameter tree.
    shape: of the parameter, the stacked axes in front.
    axes: what the stacked axes count, as the weight table names them; empty
      where one tensor is the whole parameter.
    names: checkpoint names, one for each place along the stacked axes.
    transposed: the checkpoint stores the transposed matrix.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  names: tuple[str, ...]
  transposed: bool

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Shape of each tensor in the checkpoint."""
    shape = self.shape[len(self.axes) :]
    return shape[::-1] if self.transposed else shape


def leaves(config: ModelConfig) -> list[Leaf]:
  """The parameters of a model with their names in its family's checkpoints."""
  modules = families.family_of(config).modules
  module_by_path = {path: name for name, path in modules.items()}
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  result = []
  for path, leaf in sorted(traverse_util.flatten_dict(shapes).items()):
    module = module_by_path.get(path[:-1])
    if module is None:
      raise UnsupportedConfig(
        f"{config.family} checkpoints have no tensor for the parameter "
        f"{'/'.join(path)}; the config asks for a module that this family "
        "does not have."
      )
    suffix = "bias" if path[-1] == "bias" else "weight"
    axes = tuple(re.findall(r"\{(\w+)\}", module))
    counts = map(range, leaf.shape[: len(axes)])
    names = tuple(
      f"{module.format(**dict(zip(axes, place, strict=True)))}.{suffix}"
      for place in itertools.product(*counts)
    )
    result.append(
      Leaf(path, tuple(leaf.shape), axes, names, path[-1] == "kernel")
    )
  return result


def load_model(path, dtype="float32", shardings=None) -> Model:
  """Reads a LLaDA or Dream checkpoint.

  Args:
    path: folder (local or `gs://`), or a hub id `owner/name` when
      `huggingface_hub` is installed.
    dtype: of the parameters: "float32", "bfloat16" or "float16". With
      "bfloat16" the model also computes in it, otherwise in float32;
      `config.compute_dtype` can be replaced afterwards.
    shardings: tree of `jax.sharding.Sharding` like the parameters, or a
      function from the ModelConfig to such a tree; None puts everything on
      the default device.

  Returns:
    The model, with the tokenizer if the folder has one.

  Raises:
    MissingTensor, UnexpectedTensor, DuplicateTensor, WrongShape,
    UnsupportedConfig, CorruptFile: each names tensor or key, and file.
    CheckpointError: there is no checkpoint at this path.
  """
  dtype = safetensors_files.storage_dtype(dtype)
  folder = model_folder.resolve_folder(path)
  described = load_config(folder)
  config = described.config
  wanted = leaves(config)
  stored = safetensors_files.read_headers(folder)
  check_tensors(wanted, stored, str(folder))
  if dtype == np.dtype("bfloat16"):
    config = dataclasses.replace(config, compute_dtype="bfloat16")
  if callable(shardings):
    shardings = shardings(config)
  sharding_by_path = traverse_util.flatten_dict(shardings or {})
  arrays = {}
  with safetensors_files.Reader(folder) as reader:
    for leaf in wanted:
      buffer = _read_leaf(reader, leaf, stored, dtype)
      arrays[leaf.path] = _place(buffer, sharding_by_path.get(leaf.path))
      del buffer
      # The runtime drops its hold on a host buffer only when it is called
      # again; without this two parameters would be in host memory.
      jax.device_put(np.float32(0))
  names = sorted(entry.name for entry in folder.iterdir())
  companions, _ = model_folder.read_companions(
    folder, filter(_COMPANIONS.fullmatch, names)
  )
  params = traverse_util.unflatten_dict(arrays)
  return dataclasses.replace(
    described, config=config, params=params, source_files=companions
  )


def load_config(path) -> Model:
  """Reads what a checkpoint is, but no weights: `params` is None.

  Raises:
    UnsupportedConfig, CorruptFile, CheckpointError: as `load_model`.
  """
  folder = model_folder.resolve_folder(path)
  source_config = model_folder.read_config(folder)
  tokenizer = Tokenizer.load(folder, source_config)
  ids = {}
  if tokenizer is not None:
    ids = {f"{r}_token_id": getattr(tokenizer, f"{r}_id") for r in _ROLES}
  config = families.from_hf(source_config, ids)
  if tokenizer is not None:
    _check_rows(tokenizer, config.vocab_size, str(folder))
  return Model(config, None, tokenizer, source_config)


def _check_rows(tokenizer: Tokenizer, rows: int, where: str) -> None:
  """Refuses a tokenizer whose ids the embedding has no rows for."""
  id_by_token = tokenizer.backend.get_vocab()
  token = max(id_by_token, key=id_by_token.get)
  if id_by_token[token] >= rows:
    count = sum(id_ >= rows for id_ in id_by_token.values())
    raise UnsupportedConfig(
      f"{where}: the tokenizer gives {token!r:.80} the id {id_by_token[token]},"
      f" but the embedding has {rows} rows ({count} tokens have none); take the "
      "tokenizer that belongs to the weights, or add rows to them."
    )


def save_model(model: Model, path) -> None:
  """Writes a checkpoint folder that `load_model` reads back bit for bit.

  The dtype of each parameter decides its storage. Files appear under their
  names only when they are complete, config.json last.

  Args:
    model: what to write; its `source_config` is kept field by field, or
      derived from `config` where it is empty.
    path: folder, made if it is not there; weights of an earlier save in it
      are replaced.

  Raises:
    ValueError: the path is a file, config and source_config contradict each
      other, or parameters have other names, shapes or dtypes than the config
      says.
  """
  from etils import epath

  folder = epath.Path(path).expanduser()
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"path={path} is a file; give the folder of a checkpoint.")
  source_config = _config_to_write(model)
  wanted = leaves(model.config)
  by_path = traverse_util.flatten_dict(model.params)
  _check_params(wanted, by_path)
  shards = _plan_shards(wanted, by_path)
  # Every process takes part in gathering, the first one writes.
  writes = jax.process_index() == 0
  if writes:
    model_folder.make_folder(folder)
  for name, shard in shards.items():
    tensors = _host_tensors(shard, by_path)
    if writes:
      kinds = {
        leaf.names[place]: (by_path[leaf.path].dtype, leaf.tensor_shape)
        for leaf, place in shard
      }
      safetensors_files.write(folder / name, kinds, tensors)
    else:
      collections.deque(tensors, maxlen=0)
  if not writes:
    return
  if len(shards) > 1:
    files.write_json(folder / INDEX, _index(shards, by_path))
  keep = {*shards, INDEX} if len(shards) > 1 else set(shards)
  for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
    if old.name not in keep and old.exists():
      old.unlink()
  for name, content in model.source_files.items():
    files.write(folder / name, content)
  if model.tokenizer is not None:
    model.tokenizer.save(folder)
  files.write_json(folder / "config.json", source_config)


def check_tensors(
  wanted: list[Leaf], stored: Mapping[str, Stored], where: str
) -> None:
  """Compares what the config calls for with what the files hold.

  Raises:
    MissingTensor, UnexpectedTensor, WrongShape, UnsupportedConfig.
  """
  shape_by_name = {
    name: leaf.tensor_shape for leaf in wanted for name in leaf.names
  }
  missing = [name for name in shape_by_name if name not in stored]
  places = sorted({tensor.file for tensor in stored.values()})
  if missing:
    raise MissingTensor(
      f"{where}: {missing[0]} (shape {shape_by_name[missing[0]]}) is in none "
      f"of {places}{_more(missing)}. The config calls for it; download the "
      "checkpoint again, or correct config.json."
    )
  left = [name for name in stored if name not in shape_by_name]
  if left:
    raise UnexpectedTensor(
      f"{where}: {stored[left[0]].file} holds {left[0]} (shape "
      f"{stored[left[0]].shape}), for which the config has no place"
      f"{_more(left)}. Config and weights are of different models; correct "
      "config.json, or remove the tensor."
    )
  for name, shape in shape_by_name.items():
    if stored[name].shape != shape:
      raise WrongShape(
        f"{where}: {name} in {stored[name].file} has shape "
        f"{stored[name].shape}, the config calls for {shape}; correct "
        "config.json or take the weights that belong to it."
      )


def _more(names) -> str:
  """' and n more' for messages that name only the first."""
  return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _read_leaf(reader, leaf: Leaf, stored, dtype: np.dtype) -> np.ndarray:
  """Reads one parameter into a new host buffer; returns it in its shape."""
  buffer = np.empty((len(leaf.names), *leaf.tensor_shape), dtype)
  for place, name in enumerate(leaf.names):
    reader.read(stored[name], buffer[place])
  if leaf.transposed:
    # A view: the runtime transposes tile by tile as it copies to the device,
    # five times faster than numpy does.
    buffer = buffer.swapaxes(-1, -2)
  return buffer.reshape(leaf.shape)


def _place(buffer: np.ndarray, sharding):
  """Puts a host buffer on its devices and waits for it."""
  if sharding is None:
    array = jax.device_put(buffer)
  else:
    array = jax.make_array_from_callback(
      buffer.shape, sharding, lambda index: buffer[index]
    )
  return jax.block_until_ready(array)


def _config_to_write(model: Model) -> dict[str, Any]:
  """config.json of a model, checked against its ModelConfig."""
  if not model.source_config:
    config = families.to_hf(model.config)
  else:
    config = dict(model.source_config)
    ids = {f"{r}_token_id": getattr(model.config, f"{r}_id") for r in _ROLES}
    told = families.to_hf(families.from_hf(config, ids))
    ours = families.to_hf(model.config)
    for key, value in ours.items():
      if told[key] != value:
        raise ValueError(
          f"the model's config says {key}={value!r} but its source_config "
          f"{told[key]!r}; give source_config={{}} to have it derived."
        )
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)}
  if len(dtypes) == 1:
    for key in ("torch_dtype", "dtype"):
      if key in config:
        config[key] = next(iter(dtypes))
  return config


def _check_params(wanted, by_path) -> None:
  """Refuses parameters that the config's checkpoint could not hold."""
  differing = by_path.keys() ^ {leaf.path for leaf in wanted}
  if differing:
    names = sorted("/".join(path) for path in differing)
    raise ValueError(
      f"the config and the parameters differ in {names}: one of the two has no "
      "place for them; give the config that they were made with."
    )
  for leaf in wanted:
    array = by_path[leaf.path]
    if tuple(array.shape) != leaf.shape:
      raise ValueError(
        f"{'/'.join(leaf.path)} has shape {tuple(array.shape)}, the config "
        f"calls for {leaf.shape}."
      )
    safetensors_files.storage_dtype(array.dtype)


def _plan_shards(wanted, by_path) -> dict[str, list[tuple[Leaf, int]]]:
  """File name -> its tensors as (leaf, place), within SHARD_BYTES each."""
  shards, used = [[]], 0
  for leaf in wanted:
    size = math.prod(leaf.tensor_shape) * by_path[leaf.path].dtype.itemsize
    for place in range(len(leaf.names)):
      if shards[-1] and used + size > SHARD_BYTES:
        shards.append([])
        used = 0
      shards[-1].append((leaf, place))
      used += size
  if len(shards) == 1:
    return {SINGLE: shards[0]}
  total = len(shards)
  return {
    f"model-{i + 1:05d}-of-{total:05d}.safetensors": shard
    for i, shard in enumerate(shards)
  }


def _index(shards, by_path) -> dict[str, Any]:
  """The index of several shards."""
  total = sum(array.size * array.dtype.itemsize for array in by_path.values())
  weight_map = {
    leaf.names[place]: file
    for file, shard in shards.items()
    for leaf, place in shard
  }
  return {
    "metadata": {"total_size": total},
    "weight_map": dict(sorted(weight_map.items())),
  }


def _host_tensors(shard, by_path) -> Iterator[np.ndarray]:
  """A shard's tensors, one parameter in host memory at a time."""
  held = None
  for leaf, place in shard:
    if held != leaf.path:
      host = to_host(by_path[leaf.path])
      host = host.reshape(len(leaf.names), *leaf.shape[len(leaf.axes) :])
      held = leaf.path
    yield host[place].T if leaf.transposed else host[place]


def to_host(array) -> np.ndarray:
  """A parameter as numpy, gathered from other processes where needed."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)
